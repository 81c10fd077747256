"""The classifier that a guard protects, as the steps after it need it: trained here, or the user's own."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noisec import contract
from noisec.builders.classifier import check_preprocessing, choose_penultimate, dissect, make_stage, read_model
from noisec.builders.export import export_plain, export_stage
from noisec.builders.graphs import save_graph
from noisec.builders.images import Floats, Splits
from noisec.builders.networks import CLASSIFIERS
from noisec.builders.progress import console
from noisec.builders.spec import ClassifierSpec, GuardSpec, PreprocessingSpec, depended_on
from noisec.builders.train import load_network, train_classifier
from noisec.builders.workbench import Workbench
from noisec.errors import NoisecError
from noisec.python_backend.scorer.session import open_session

STAGE = "model.onnx"


@dataclass(frozen=True)
class Protected:
    """A classifier, and the stage made of it."""

    stage: Path
    """folder with ``model.onnx`` (and its external data): IMAGE -> LOGITS, PENULTIMATE"""
    network: nn.Module | None
    """images -> logits with gradients, for white-box attacks; None where there is only an ONNX file"""
    original: Callable[[Floats], Floats]
    """images float32 [n, C, H, W] in [0, 1] -> the original classifier's answer [n, classes], past everything that was made of it here"""
    classes: int
    features: int
    """width of the penultimate layer"""
    description: str


class Preprocessing(nn.Module):
    """What the specification declares, in torch: the reference for the nodes that are compiled into the graph."""

    def __init__(self, spec: PreprocessingSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, images: Tensor) -> Tensor:
        spec = self.spec
        result = images.flip(1) if spec.channel_order == "bgr" else images
        if spec.size and tuple(spec.size) != tuple(result.shape[2:]):
            result = nn.functional.interpolate(result, spec.size, mode="bilinear", align_corners=False)
        result = result * spec.scale
        for values, apply in ((spec.mean, torch.sub), (spec.std, torch.div)):
            if values:
                result = apply(result, torch.tensor(values, device=result.device)[:, None, None])
        return result


class LogitsOnly(nn.Module):
    """A reference classifier without its second output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)[0]
        return logits


def protect(spec: GuardSpec, splits: Splits, bench: Workbench) -> Protected:
    """The classifier of a guard's specification, as a stage.

    Raises:
        NoisecError: files, factory or graph are not as they must be.
    """
    return {"network": _reference, "onnx": _from_onnx, "factory": _from_factory}[spec.classifier.kind](spec, splits, bench)


def _reference(spec: GuardSpec, splits: Splits, bench: Workbench) -> Protected:
    classes = len(splits.class_names)
    backdoor = spec.classifier.backdoor
    if backdoor and backdoor.target >= classes:
        raise NoisecError(f"classifier.backdoor.target is {backdoor.target}; the classes go from 0 to {classes - 1}")
    assert spec.classifier.network is not None
    network = CLASSIFIERS[spec.classifier.network](splits.shape, classes)
    if spec.classifier.weights:
        fill(network, spec.classifier.weights, spec.classifier.network)
        source = fingerprint(network)
    else:
        weights = bench.step(
            "classifier",
            {**training_inputs(spec, splits), "classifier": depended_on(spec.classifier)},
            lambda folder: train_classifier(spec.classifier, splits.train, classes, spec.seed, folder),
        )
        load_network(network, weights)
        source = weights.name
    network.eval()
    stage = bench.step(
        "classifier-stage",
        {"from": source, "shape": splits.shape},
        lambda folder: export_stage(network, splits.shape, contract.CLASSIFIER_OUTPUTS, folder / STAGE),
    )
    with torch.no_grad():
        features = network(torch.zeros(1, *splits.shape))[1].shape[1]
    logits = LogitsOnly(network)
    return Protected(stage, logits, _torch_predictor(logits), classes, features, f"reference network {spec.classifier.network}")


def _from_onnx(spec: GuardSpec, splits: Splits, bench: Workbench) -> Protected:
    assert spec.classifier.onnx is not None
    return _own(
        spec.classifier, spec.classifier.onnx, splits, bench, None, _onnx_predictor(spec.classifier.onnx, spec.classifier.preprocessing)
    )


def _from_factory(spec: GuardSpec, splits: Splits, bench: Workbench) -> Protected:
    own = spec.classifier
    assert own.factory is not None
    check_preprocessing(own.preprocessing, splits.shape[0])
    module = load_module(own.factory, own.weights)
    network = nn.Sequential(Preprocessing(own.preprocessing), module).eval()
    example = Preprocessing(own.preprocessing)(torch.rand(2, *splits.shape))
    _check_answer(own.factory, module, example)
    inputs = {"factory": own.factory, "code": code_digest(own.factory), "weights": fingerprint(module), "shape": list(example.shape)}
    exported = bench.step("export-module", inputs, lambda folder: export_plain(module, example, folder / "original.onnx"))
    return _own(own, exported / "original.onnx", splits, bench, network, _torch_predictor(network))


def _check_answer(factory: str, module: nn.Module, example: Tensor) -> None:
    """Refuse a module that answers something else than logits [n, classes]."""
    with _speaking(f"classifier.factory = {factory!r}: the module does not run on images of {list(example.shape[1:])}"), torch.no_grad():
        answer = module(example)
    if not isinstance(answer, Tensor):
        raise NoisecError(
            f"classifier.factory = {factory!r}: the module answers a {type(answer).__name__}; a guard protects one that answers logits "
            "[n, classes] alone: wrap it in one that does"
        )


def _own(
    spec: ClassifierSpec, path: Path, splits: Splits, bench: Workbench, network: nn.Module | None, original: Callable[[Floats], Floats]
) -> Protected:
    model = read_model(path)
    anatomy = dissect(model, path.name)
    if len(splits.class_names) > anatomy.classes:
        raise NoisecError(
            f"{path.name}: has {anatomy.classes} classes; the labels go from 0 to {len(splits.class_names) - 1}: "
            "give images labelled as the classifier labels them"
        )
    penultimate = choose_penultimate(anatomy, model, spec.penultimate, path.name)
    console.print(f"  penultimate layer of {path.name}: {penultimate.tensor} [{penultimate.width}], {penultimate.why}")

    def make(folder: Path) -> None:
        stage = make_stage(model, anatomy, penultimate, splits.shape, spec.preprocessing, path.name)
        save_graph(stage, folder / STAGE, external=path.stat().st_size < stage.ByteSize() // 2)  # as the classifier's own weights lay
        _check_batches(folder / STAGE, splits.fit[:3].floats())

    inputs = {
        "model": hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest(),
        "shape": splits.shape,
        **spec.model_dump(mode="json", include={"penultimate", "preprocessing"}),
    }
    stage = bench.step("classifier-stage", inputs, make)
    return Protected(stage, network, original, anatomy.classes, penultimate.width, path.name)


def _check_batches(path: Path, images: Floats) -> None:
    """Refuse a graph that answers a batch otherwise than its rows, as one exported for a single batch size may."""
    names = list(contract.CLASSIFIER_OUTPUTS)
    fix = "export it with a dynamic batch dimension"
    with _speaking(f"the classifier does not run with a batch of {len(images)}; {fix}"):
        session = open_session(path)
        together = session.run(names, {contract.IMAGE: images})
        alone = [session.run(names, {contract.IMAGE: image[None]}) for image in images]
    for output, rows in zip(together, zip(*alone, strict=True), strict=True):
        if output.shape[0] != len(images) or not np.allclose(output, np.concatenate(rows), rtol=1e-3, atol=1e-3):
            raise NoisecError(f"the classifier answers a batch otherwise than its images one by one; {fix}")


@contextmanager
def _speaking(what: str) -> Iterator[None]:
    """ONNX Runtime's own exceptions, which share no base class, as errors that a user can read."""
    try:
        yield
    except Exception as error:
        raise NoisecError(f"{what}: {type(error).__name__}: {str(error)[:600]}") from error


def load_module(factory: str, weights: Path | None) -> nn.Module:
    """The user's module with its weights, in evaluation mode. Weights are read without running pickled code.

    Raises:
        NoisecError: the factory cannot be imported or called, or the weights do not fit.
    """
    package, _, name = factory.partition(":")
    sys.path.insert(0, "")
    try:
        target: Any = importlib.import_module(package)
        for part in name.split("."):
            target = getattr(target, part)
        module = target()
    except Exception as error:
        raise NoisecError(f"classifier.factory = {factory!r} cannot be called: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove("")
    if not isinstance(module, nn.Module):
        raise NoisecError(f"classifier.factory = {factory!r} returned {type(module).__name__}; expected a torch.nn.Module")
    if weights is not None:
        fill(module, weights, factory)
    return module.eval()


def fill(module: nn.Module, weights: Path, what: str) -> None:
    """Load weights into a module.

    Raises:
        NoisecError: they do not fit.
    """
    try:
        module.load_state_dict(read_weights(weights))
    except RuntimeError as error:
        raise NoisecError(f"{weights}: weights do not fit {what}: {str(error)[:600]}") from error


def code_digest(factory: str) -> str:
    """SHA-256 of the file that a factory is in: another forward pass is another classifier, whatever its weights; empty where there is no
    file. Code that it imports from elsewhere is not looked at."""
    path = getattr(sys.modules[factory.partition(":")[0]], "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over a module's parameters and buffers."""
    state = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state_dict from a safetensors file or a torch file; ``state_dict`` wrappers and ``module.`` prefixes are taken off.

    Raises:
        NoisecError: the file is missing, broken, or holds pickled code.
    """
    if not path.is_file():
        raise NoisecError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise NoisecError(f"{path}: not a file of weights alone ({type(error).__name__}: {str(error)[:300]})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise NoisecError(f"{path}: holds a {type(state).__name__}; expected a state_dict: tensors by name")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _torch_predictor(network: nn.Module) -> Callable[[Floats], Floats]:
    def predict(images: Floats) -> Floats:
        with torch.no_grad():
            answer: Floats = network(torch.from_numpy(images)).numpy()
        return answer

    return predict


def _onnx_predictor(path: Path, spec: PreprocessingSpec) -> Callable[[Floats], Floats]:
    """The user's own file, run as it is, at its own batch size."""
    model = read_model(path)
    anatomy = dissect(model, path.name)
    with _speaking(f"{path}: ONNX Runtime cannot load it"):
        session = open_session(path)
    preprocess = Preprocessing(spec)
    fixed = anatomy.input_shape[0] if isinstance(anatomy.input_shape[0], int) else None

    def predict(images: Floats) -> Floats:
        ready = preprocess(torch.from_numpy(images)).numpy()
        if anatomy.image_shape is None:
            ready = ready.reshape(len(ready), -1)
        elif anatomy.channels_last:
            ready = ready.transpose(0, 2, 3, 1)
        size = fixed or len(ready)
        parts = []
        for start in range(0, len(ready), size):
            part = ready[start : start + size]
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            with _speaking(f"{path}: ONNX Runtime cannot run it on images of {list(part.shape[1:])}"):
                answer = session.run([anatomy.output], {anatomy.input: np.ascontiguousarray(filled)})[0]
            parts.append(answer.reshape(size, -1)[: len(part)])
        return np.concatenate(parts)

    return predict


def training_inputs(spec: GuardSpec, splits: Splits) -> dict[str, Any]:
    """What every trained network depends on."""
    data = json.loads(spec.data.model_dump_json())
    return {"data": data, "files": splits.digest, "seed": spec.seed, "torch": torch.__version__}
