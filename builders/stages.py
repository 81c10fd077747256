"""Network stages, asked one after the other in the ensemble's order, in this process or on a server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton_grpc
from tritonclient.grpc import model_config_pb2

from noisec import contract
from noisec.builders.figures import Answers
from noisec.builders.images import BATCH, Floats
from noisec.builders.passes import fused_passes, passes_needed
from noisec.builders.progress import tracked
from noisec.builders.spec import GuardSpec
from noisec.contract import stage_model
from noisec.errors import NoisecError
from noisec.python_backend.runtimes.tensorrt.names import graph_sizes, plan_name
from noisec.python_backend.scorer.scoring import Scorer
from noisec.python_backend.scorer.session import open_session

Tensors = dict[str, Floats]
Infer = Callable[[str, Floats, Sequence[str]], Tensors]
"""(``autoencoder`` or ``classifier``, IMAGE float32 [n, C, H, W], output names) -> output name -> float32 [n, ...]"""


class StageRunner:
    """Runs a guard's network stages over many images.

    Args:
        infer: :func:`in_process` or :func:`served`
        passes: classifier passes, the image's among them
        noise_source: the autoencoder stage's output that the noise pass feeds to the classifier stage
        fused: passes that the layout puts into the autoencoder stage, which makes those of the classifier's copies in any case
    """

    def __init__(self, infer: Infer, passes: tuple[contract.Pass, ...], noise_source: str, fused: tuple[contract.Pass, ...] = ()) -> None:
        self._infer = infer
        own = tuple(one for one in passes if one in contract.COPIES or one in fused)
        self._passes = tuple(one for one in passes if one not in own)
        self._sources = {"noise": noise_source, "reconstruction": contract.RECONSTRUCTION}
        self._made = (contract.NOISE_LEVEL, contract.IN_RANGE, *(contract.PASSES[one] for one in own))

    @classmethod
    def of(cls, spec: GuardSpec, infer: Infer) -> StageRunner:
        """Runs exactly the passes that a guard's detectors need, in its layout."""
        return cls(infer, passes_needed(spec), spec.noise_source, fused_passes(spec))

    def __call__(self, batches: Iterable[Floats], count: int, title: str = "running stages") -> Tensors:
        """LOGITS and everything that a scorer reads.

        Args:
            batches: float32 [n, C, H, W] each
            count: images in all

        Returns:
            tensor name -> float32 [count, ...]
        """
        results = [self.batch(batch) for batch in tracked(batches, title, -(-count // BATCH))]
        return joined(results)

    def batch(self, images: Floats) -> Tensors:
        """The same of one batch, float32 [n, C, H, W]."""
        sources = {one: self._sources[one] for one in self._passes if one != "image"}
        made = self._infer("autoencoder", images, (*self._made, *sources.values()))
        results = {name: made[name] for name in self._made}
        for one in self._passes:
            answer = self._infer("classifier", images if one == "image" else made[sources[one]], contract.CLASSIFIER_OUTPUTS)
            results[contract.PASSES[one]] = answer[contract.PENULTIMATE]
            if one == "image":
                results[contract.LOGITS] = answer[contract.LOGITS]
        return results


def joined(parts: Sequence[Tensors]) -> Tensors:
    """Several answers as one, in order."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def in_process(stages: Mapping[str, Path], threads: int = 0) -> Infer:
    """Stages run by ONNX Runtime in this process.

    Args:
        stages: ``autoencoder`` and ``classifier`` -> folder with the stage's ``model.onnx``
        threads: compute threads; 0 takes every core
    """
    sessions = {stage: open_session(folder / "model.onnx", threads) for stage, folder in stages.items()}
    bytewise = {stage for stage, session in sessions.items() if session.get_inputs()[0].type == "tensor(uint8)"}

    def infer(stage: str, images: Floats, outputs: Sequence[str]) -> Tensors:
        sent = as_bytes(images) if stage in bytewise and images.dtype != np.uint8 else images
        return dict(zip(outputs, sessions[stage].run(list(outputs), {contract.IMAGE: sent}), strict=True))

    return infer


def as_bytes(images: Floats) -> npt.NDArray[np.uint8]:
    """Images as a stage with uint8 input takes them: float32 [n, C, H, W] in [0, 1], rounded to 8 bits.

    Raises:
        NoisecError: they are no images: a noise, or pixels outside [0, 1].
    """
    if not ((images >= -contract.PIXEL_TOLERANCE) & (images <= 1 + contract.PIXEL_TOLERANCE)).all():
        raise NoisecError(f"values from {images.min():.3g} to {images.max():.3g} for a stage that takes bytes: pixels lie in [0, 1]")
    pixels: npt.NDArray[np.uint8] = np.rint(images * np.float32(255)).clip(0, 255).astype(np.uint8)
    return pixels


def on_gpu(stages: Mapping[str, Path], largest: int, *, host_code: bool) -> Infer:
    """Stages run as TensorRT plans on this machine's first GPU.

    Args:
        stages: ``autoencoder`` and ``classifier`` -> folder with the stage's plan for this GPU
        largest: rows of the largest batch
        host_code: whether the plans run code of their own on the host, as those do that were built ``version_compatible``
    """
    import torch

    from noisec.builders.engine import compute_capability, find_tensorrt
    from noisec.python_backend.runtimes.tensorrt.plan import Plan

    trt, name, device = find_tensorrt(), plan_name(compute_capability()), torch.device("cuda", 0)
    sizes = graph_sizes(largest)
    plans = {stage: Plan(trt, folder / name, device, largest, sizes, host_code=host_code) for stage, folder in stages.items()}

    def infer(stage: str, images: Floats, outputs: Sequence[str]) -> Tensors:
        parts = []
        for start in range(0, len(images), largest):
            made = plans[stage](torch.from_numpy(images[start : start + largest]))
            parts.append({name: made[name].cpu().numpy() for name in outputs})
        return joined(parts)

    return infer


def served(url: str, guard: str, release: int) -> Infer:
    """Stages of a served guard, asked over gRPC.

    Raises:
        NoisecError: the server does not serve this release.
    """
    client = triton_grpc.InferenceServerClient(url)
    version = str(release)
    try:
        config = client.get_model_config(stage_model(guard, "classifier"), version).config
    except triton_grpc.InferenceServerException as error:
        raise NoisecError(f"{url}: release {release} of {guard!r} is not served there: {error.message()}") from error

    largest, bytewise = max(1, int(config.max_batch_size)), config.input[0].data_type == model_config_pb2.TYPE_UINT8

    def ask(stage: str, images: Floats, outputs: Sequence[str]) -> Tensors:
        sent = as_bytes(images) if bytewise else np.ascontiguousarray(images)
        image = triton_grpc.InferInput(contract.IMAGE, images.shape, "UINT8" if bytewise else "FP32").set_data_from_numpy(sent)
        requested = [triton_grpc.InferRequestedOutput(name) for name in outputs]
        try:
            result = client.infer(stage_model(guard, stage), [image], model_version=version, outputs=requested)
        except triton_grpc.InferenceServerException as error:
            raise NoisecError(f"{stage_model(guard, stage)}: {error.message()}") from error
        return {name: result.as_numpy(name) for name in outputs}

    def infer(stage: str, images: Floats, outputs: Sequence[str]) -> Tensors:
        return joined([ask(stage, images[start : start + largest], outputs) for start in range(0, len(images), largest)])

    return infer


def ask_guard(run: StageRunner, scorer: Scorer, batches: Iterable[Floats], count: int, title: str) -> Answers:
    """What stages and scorer answer together."""
    tensors = run(batches, count, title)
    verdict = scorer.verdict(tensors)
    return Answers(tensors[contract.LOGITS].argmax(axis=1), verdict.score, verdict.is_malicious)
