"""A guard under test, as it lies in a model repository: its images, its stages, and the same stages with gradients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from noisec import contract, manifest
from noisec.builders import datasets
from noisec.builders.head import read_head
from noisec.builders.images import BATCH, Floats, Splits, in_batches
from noisec.builders.protect import Protected
from noisec.builders.release import Release
from noisec.builders.repository import read_widths
from noisec.builders.stages import StageRunner, Tensors, in_process
from noisec.builders.torchgraph import TorchGraph
from noisec.python_backend.scorer.detectors import Head


class Answering(nn.Module):
    """A stage's graph as a module with one output.

    Args:
        stage: folder with ``model.onnx``
        output: the tensor that it answers
    """

    def __init__(self, stage: Path, output: str) -> None:
        super().__init__()
        self.graph = TorchGraph(stage / "model.onnx")
        self.output = output

    def forward(self, images: Tensor) -> Tensor:
        """float32 [n, C, H, W] -> float32 [n, ...]"""
        return self.graph.named(images)[self.output]


@dataclass(frozen=True)
class Subject(Release):
    """A release, and the images that its guard was built with."""

    splits: Splits

    @classmethod
    def open(cls, repository: Path, name: str, work: Path) -> Subject:
        """Read a guard and its images.

        Args:
            work: folder for decoded images

        Raises:
            NoisecError: the guard or its data is not there.
        """
        found = Release.newest(repository, name)
        splits = datasets.load_splits(found.spec.data, found.spec.seed, cache=work / "images")
        return cls(repository, name, found.release, found.spec, splits)

    @cached_property
    def digests(self) -> dict[str, str]:
        """What every result depends on: SHA-256 of the stages and the scorer, and of the images."""
        files = {stage: folder / "model.onnx" for stage, folder in self.stages.items()}
        files["scorer"] = self.folder("scorer") / "scorer.npz"
        return {**{name: manifest.digest(path) for name, path in files.items()}, "data": str(self.spec.data), "files": self.splits.digest}

    @cached_property
    def head(self) -> Head:
        """The classifier's last layer."""
        return read_head(self.stages["classifier"] / "model.onnx", self.splits.fit[:BATCH].floats())

    @cached_property
    def runner(self) -> StageRunner:
        """Runs every classifier pass that the stages can make, also those that the guard's own detectors do without."""
        passes = tuple(one for one in contract.PASSES if one not in contract.COPIES or one in self.spec.copies)
        return StageRunner(in_process(self.stages), passes, self.spec.noise_source)

    def tensors(self, batches: Iterable[Floats] | Floats, count: int, title: str = "running stages") -> Tensors:
        """Everything that a detector may read: tensor name -> float32 [count, ...]."""
        return self.runner(in_batches(batches) if isinstance(batches, np.ndarray) else batches, count, title)

    @cached_property
    def classifier(self) -> nn.Module:
        """Images float32 [n, C, H, W] -> logits [n, classes], with gradients."""
        return Answering(self.stages["classifier"], contract.LOGITS)

    @cached_property
    def features(self) -> nn.Module:
        """Images float32 [n, C, H, W] -> penultimate activations [n, d], with gradients."""
        return Answering(self.stages["classifier"], contract.PENULTIMATE)

    @cached_property
    def denoiser(self) -> nn.Module:
        """Images float32 [n, C, H, W] -> reconstructions, with gradients."""
        return Answering(self.stages["autoencoder"], contract.RECONSTRUCTION)

    @cached_property
    def protected(self) -> Protected:
        """The classifier as attacks want it."""
        widths, _ = read_widths(self.repository, self.name)
        return Protected(self.stages["classifier"], self.classifier, self.predict, widths.classes, widths.features, self.name)

    def predict(self, images: Floats) -> Floats:
        """Logits float32 [n, classes] of float32 [n, C, H, W]."""
        with torch.no_grad():
            logits: Floats = self.classifier(torch.from_numpy(images)).numpy()
        return logits
