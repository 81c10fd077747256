"""What every baseline is, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from noisec.builders.images import Floats, Images
from noisec.errors import NoisecError

Doubles = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Scalar = TypeVar("Scalar", bound=np.generic)
Network = Callable[[Floats], Floats]
"""images float32 [n, C, H, W] in [0, 1] -> logits float32 [n, classes]: all that a black-box detector sees of the classifier"""
Features = Callable[[Tensor], Tensor]
"""images float32 [n, C, H, W] in [0, 1] -> penultimate activations float32 [n, d]"""

BATCH = 128
"""images in one forward pass"""


class Baseline(Protocol):
    """A detector that learns from clean images alone."""

    name: str

    def fit(self, images: Images, predict: Network) -> None:
        """Learn from clean images, disjoint from everything that is tested."""

    def score(self, pixels: Floats) -> Floats:
        """float32 [n], higher is more suspicious, from float32 [n, C, H, W] in [0, 1]. Row by row: other rows change nothing."""


class Supervised(Protocol):
    """A detector that also learns from attacks."""

    name: str

    def fit(self, images: Images, predict: Network, attacked: Floats) -> None:
        """Learn from clean images, and from attacks on the last of them.

        Args:
            attacked: float32 [m, C, H, W] in [0, 1], the last ``m < n`` images, attacked. The others fit densities and manifolds, for
                these an image's own density would be no measure of how natural it is
        """

    def score(self, pixels: Floats) -> Floats:
        """As a ``Baseline``'s."""


def batched(function: Callable[[Floats], npt.NDArray[Scalar]], rows: Floats) -> npt.NDArray[Scalar]:
    """A function of rows, images or others, applied to at most ``BATCH`` at a time."""
    return np.concatenate([function(rows[start : start + BATCH]) for start in range(0, max(len(rows), 1), BATCH)])


def in_arrays(function: Callable[[Tensor], Tensor]) -> Callable[[Floats], Floats]:
    """A torch function as one from arrays to arrays, without gradients."""

    def run(pixels: Floats) -> Floats:
        with torch.no_grad():
            result: Floats = function(torch.from_numpy(np.ascontiguousarray(pixels))).numpy()
        return result

    return run


def softmax(logits: Floats, temperature: float = 1.0) -> Tensor:
    """Probabilities float64 [n, classes] from logits [n, classes]."""
    return torch.softmax(torch.from_numpy(np.asarray(logits, np.float64)) / temperature, dim=1)


def predicted(predict: Network, pixels: Floats) -> Labels:
    """The classifier's labels int64 [n]."""
    labels: Labels = batched(predict, pixels).argmax(axis=1)
    return labels


def part(images: Images, attacked: Floats) -> tuple[Images, Images]:
    """The images that were not attacked, and those that were.

    Raises:
        NoisecError: there are none of one kind.
    """
    if not 0 < len(attacked) < len(images):
        raise NoisecError(f"{len(attacked)} of {len(images)} fit images are attacked; attack some of them, but not all")
    return images[: len(images) - len(attacked)], images[len(images) - len(attacked) :]


def decision(rule: Any, statistics: Doubles) -> Floats:
    """Log odds float32 [n] of a fitted scikit-learn rule, from [n, statistics]: unlike a probability they never saturate."""
    odds: Floats = rule.decision_function(statistics).astype(np.float32)
    return odds
