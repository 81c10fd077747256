"""What `noisec inspect` shows of a classifier."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from noisec.builders.classifier import Anatomy, dissect, read_model
from noisec.builders.export import export_plain
from noisec.builders.protect import load_module
from noisec.errors import NoisecError


def inspect_classifier(model: str, shape: str) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of facts, and rows of candidates for the penultimate layer.

    Args:
        model: an ONNX file, or ``package.module:callable`` of a torch module
        shape: ``C,H,W`` of a torch module's input

    Raises:
        NoisecError: the model cannot be read, or is no classifier.
    """
    anatomy = _dissect(model, shape)
    facts = {
        "input": f"{anatomy.input} {_sizes(anatomy.input_shape)}{', channels last' if anatomy.channels_last else ''}",
        "logits": f"{anatomy.logits} [batch, {anatomy.classes}]",
        "parameters": f"{anatomy.parameters:,}",
        "multiply-adds an image": f"{anatomy.multiply_adds:,}",
        "opset": str(anatomy.opset),
    }
    return [list(pair) for pair in facts.items()], [[one.tensor, str(one.width), one.why] for one in anatomy.candidates]


def _dissect(model: str, shape: str) -> Anatomy:
    if ":" not in model or Path(model).exists():
        return dissect(read_model(Path(model)), model)
    try:
        channels, height, width = map(int, shape.split(","))
        if min(channels, height, width) < 1:
            raise ValueError
    except ValueError as error:
        raise NoisecError(f"--shape {shape!r}: expected C,H,W, for example 3,32,32") from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        export_plain(load_module(model, None), torch.rand(2, channels, height, width), path)
        return dissect(read_model(path), model)


def _sizes(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
