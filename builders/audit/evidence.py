"""What an audit found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

UNKNOWN = -1
"""no class is suspected"""
LEAST = 1e-3
"""margins and distances, in logits, and what clean classifiers leave of a share are taken for at least this"""
STATISTICS = {"histogram": "reference", "margins": "reference_margins", "universal": "reference_universal"}
"""what `Evidence` has of each class -> the same of clean classifiers beside it"""


@dataclass(frozen=True)
class Evidence:
    """One method's verdict on one classifier, and the figures that it rests on."""

    method: str
    """``ban``, ``neural-cleanse`` or ``bti-dbf``"""
    backdoored: bool
    """the verdict: ``score > threshold``"""
    score: float
    """what the verdict rests on: for BAN the largest of `suspicion`, for BTI-DBF `top_class_share`, for Neural
    Cleanse the anomaly index"""
    threshold: float
    target: int
    """the suspected target class, also where the verdict is clean; `UNKNOWN` where there is none"""
    top_class_share: float
    """share of held-out images that get the commonest label under neuron noise (BAN) or under the inverted trigger (the others)"""
    share_without_noise: float
    """the same share without noise (BAN), or on the images as they are (the others)"""
    histogram: tuple[float, ...]
    """share of the held-out images that gets each label: what `top_class_share` is the largest of"""
    loss: float
    """mean cross-entropy of the true labels under noise or trigger, in nats"""
    seconds: float
    """wall-clock time of the whole audit"""
    norms: tuple[float, ...] = ()
    """Neural Cleanse: L1 norm of the inverted mask of each class, in pixels"""
    reference: tuple[float, ...] = ()
    """BAN: the histogram of clean classifiers that this one was compared with; empty where that was chance"""
    margins: tuple[float, ...] = ()
    """BAN: how far each class's logit can be driven above the others (`noisec.builders.audit.margins`)"""
    reference_margins: tuple[float, ...] = ()
    """BAN: the same of the clean classifiers; empty where no verdict rests on margins"""
    universal: tuple[float, ...] = ()
    """BAN: mean margin of each class's logit on images of others under the best small perturbation for it, below 0 where it is not the
    largest (`noisec.builders.audit.universal`)"""
    reference_universal: tuple[float, ...] = ()
    """BAN: the same of the clean classifiers; empty where no verdict rests on these"""

    @property
    def suspect(self) -> int | None:
        """What a repair should aim at: the suspected target class where the verdict is a backdoor, else None."""
        return self.target if self.backdoored and self.target != UNKNOWN else None

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Evidence:
        """The same as ``dataclasses.asdict`` gave it, or JSON made of that."""
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
        return cls(**values)


def excess(shares: Sequence[float], expected: Sequence[float] | None = None) -> list[float]:
    """How far each label's share lies above what clean classifiers give it: 0 where it does not, 1 where all images get the label.

    Args:
        shares: of the held-out images, of each label: [classes]
        expected: the same of clean classifiers; chance if left out
    """
    chance = [1 / len(shares)] * len(shares)
    return [(share - usual) / max(1 - usual, LEAST) for share, usual in zip(shares, expected or chance, strict=True)]


def suspicion(evidence: Evidence) -> list[float]:
    """What speaks for a backdoor towards each class: [classes], at most 1, about 0 for a clean classifier.

    It is the excess of BAN's histogram over the reference, or over chance. Where there are largest margins to compare with, it is the mean
    of that and of the share of each margin that lies above what clean classifiers have. Where there are universal perturbations, it is the
    larger of that and of the share of the distance to each class, as clean classifiers have it, that the perturbation makes up: they find
    other triggers. Margins and distances are first scaled so that the middle class has as much as in the clean ones, as a classifier's
    logits have a scale of their own.
    """
    found = np.array(excess(evidence.histogram, evidence.reference))
    if evidence.reference_margins:
        found = (found + _above(evidence.reference_margins, evidence.margins)) / 2
    if evidence.reference_universal:
        found = np.maximum(found, _above(np.negative(evidence.universal), np.negative(evidence.reference_universal)))
    above: list[float] = found.tolist()
    return above


def _above(smaller: npt.ArrayLike, larger: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Share of each larger one that the smaller one leaves, where both have the same scale in the middle: [classes], at most 1."""
    part = np.maximum(smaller, LEAST) / np.maximum(larger, LEAST)
    left: npt.NDArray[np.float64] = 1 - part / np.median(part)
    return left
