"""The black-box attacker's own classifier: smaller, trained on other images (NoiSec section 5.1)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from noisec.benchmarks.detection.baselines.base import in_arrays
from noisec.benchmarks.detection.subject import Subject
from noisec.builders.networks import ConvClassifier
from noisec.builders.protect import LogitsOnly, Protected
from noisec.builders.train import Schedule, load_network, optimise
from noisec.builders.workbench import Workbench

TRAINED_ON = 20000
SCHEDULE = Schedule(6, 128, 4e-3)


def surrogate(subject: Subject, bench: Workbench, seed: int) -> Protected:
    """Two blocks of widths 16 and 32, trained on the last training images."""
    images = subject.splits.train[-TRAINED_ON:]
    network = ConvClassifier(subject.splits.shape, subject.protected.classes, (16, 32), (128,), layers=2, dropout=0.1)

    def make(folder: Path) -> None:
        torch.manual_seed(seed)

        def loss(batch: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(network(batch)[0], labels)

        optimise(network, images, loss, SCHEDULE, folder, "training surrogate")

    inputs = {"data": str(subject.spec.data), "images": len(images), "schedule": vars(SCHEDULE), "seed": seed}
    logits = LogitsOnly(load_network(network, bench.step("surrogate", inputs, make)))

    return Protected(Path(), logits, in_arrays(logits), subject.protected.classes, 128, "surrogate")
