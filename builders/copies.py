"""Changed copies of the classifier in the autoencoder stage: their passes are made of the image, whatever other passes a guard makes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from onnx import helper

from noisec import contract
from noisec.builders.classifier import read_model
from noisec.builders.graphs import joined, save_model
from noisec.builders.workbench import DONE


def with_copies(autoencoder: Path, copies: Path, passes: Mapping[contract.Pass, str], folder: Path) -> None:
    """Write the autoencoder stage with copies of the classifier in it.

    Args:
        autoencoder: folder with ``model.onnx``, staged and with float input
        copies: the same of the copies
        passes: pass -> the copies' output that carries its penultimate activations
        folder: gets ``model.onnx``, and what is told of the two graphs in files beside them

    Raises:
        NoisecError: the graphs cannot be joined.
    """
    for path in (*autoencoder.glob("*.json"), *copies.glob("*.json")):
        if path.name != DONE:
            shutil.copyfile(path, folder / path.name)
    prefix = next(iter(passes))
    before = helper.make_node("Identity", [contract.IMAGE], [f"{prefix}/{contract.IMAGE}"], f"{prefix}/feed")
    after = [
        helper.make_node("Identity", [f"{prefix}/{output}"], [contract.PASSES[one]], f"{prefix}/{one}") for one, output in passes.items()
    ]
    save_model(joined(read_model(autoencoder / "model.onnx"), read_model(copies / "model.onnx"), before, after), folder)
