"""Networks -> ONNX stage graphs with the names of the tensor contract."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from noisec import contract
from noisec.builders.classifier import IR_VERSION, OPSET
from noisec.builders.spec import PreprocessingSpec
from noisec.errors import NoisecError
from noisec.python_backend.scorer.session import open_session

MAX_DIFFERENCE = 1e-3
"""largest absolute difference between an exported stage and its network that still counts as rounding, relative to the output's scale"""


class AutoencoderStage(nn.Module):
    """IMAGE -> NOISE, RECONSTRUCTION, NOISE_LEVEL, IN_RANGE and, with an offset, NOISE_INPUT: the subtraction is part of the graph.

    Args:
        offset: one for each channel, added to the noise that the classifier is fed
    """

    def __init__(self, denoiser: nn.Module, offset: Sequence[float] = ()) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.offset = torch.tensor(offset)[:, None, None] if offset else None

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        reconstruction = self.denoiser(image)
        noise = image - reconstruction
        level = noise.square().mean(dim=(1, 2, 3)).sqrt().unsqueeze(1)
        # Comparisons, because a NaN need not survive the networks: runtimes may turn ReLU(NaN) into 0.
        low, high = -contract.PIXEL_TOLERANCE, 1 + contract.PIXEL_TOLERANCE
        inside = torch.logical_and(image >= low, image <= high).to(image.dtype).amin(dim=(1, 2, 3)).unsqueeze(1)
        outputs = noise, reconstruction, level, inside
        return outputs if self.offset is None else (*outputs, noise + self.offset)


def noise_offset(preprocessing: PreprocessingSpec) -> tuple[float, ...]:
    """What is added to the noise so that preprocessing makes n / std of it: its mean, in the image's own scale and channel order."""
    means = tuple(mean / preprocessing.scale for mean in preprocessing.mean)
    return means[::-1] if preprocessing.channel_order == "bgr" else means


def export_stage(stage: nn.Module, shape: tuple[int, int, int], outputs: tuple[str, ...], path: Path) -> None:
    """Write a network as a stage of the guard: IMAGE float32 [batch, *shape] in, one tensor for each of ``outputs``."""
    _export(stage, torch.rand(2, *shape), path, input_names=[contract.IMAGE], output_names=list(outputs))


def export_plain(module: nn.Module, example: Tensor, path: Path) -> None:
    """Write any module of one image tensor as ONNX, as its owner would.

    Raises:
        NoisecError: torch cannot export it.
    """
    try:
        _export(module, example, path)
    except Exception as error:
        raise NoisecError(
            f"torch.onnx.export failed for {type(module).__name__} with an input of {list(example.shape)}: {str(error)[:800]}; "
            "export it yourself and give classifier.onnx"
        ) from error


def _export(
    module: nn.Module, example: Tensor, path: Path, input_names: list[str] | None = None, output_names: list[str] | None = None
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
            input_names=input_names,
            output_names=output_names,
        )
    assert program is not None
    model = program.model_proto
    model.ir_version = min(model.ir_version, IR_VERSION)
    _forget_sources(model)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def _forget_sources(model: onnx.ModelProto) -> None:
    """Remove what torch notes of source files and their paths on this machine."""
    graph = model.graph
    del model.metadata_props[:], graph.metadata_props[:]
    for node in graph.node:
        del node.metadata_props[:]
    for value in [*graph.value_info, *graph.input, *graph.output]:
        del value.metadata_props[:]


def export_difference(stage: nn.Module, path: Path, images: npt.NDArray[np.float32]) -> float:
    """Largest absolute difference between an exported stage and its network, over all outputs.

    Args:
        images: float32 [n, C, H, W]

    Raises:
        NoisecError: the difference is more than rounding.
    """
    with torch.no_grad():
        expected = [tensor.numpy() for tensor in stage.eval()(torch.from_numpy(images))]
    found = open_session(path).run(None, {contract.IMAGE: images})
    differences = [float(np.abs(a - b).max()) for a, b in zip(expected, found, strict=True)]
    allowed = [MAX_DIFFERENCE * max(1.0, float(np.abs(a).max())) for a in expected]
    if any(not difference <= limit for difference, limit in zip(differences, allowed, strict=True)):
        raise NoisecError(f"{path.name}: ONNX differs from PyTorch by {max(differences):.2e}; at most {max(allowed):.2e} is rounding")
    return max(differences)
