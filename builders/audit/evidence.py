"""What an audit found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

UNKNOWN = -1
"""no class is suspected"""
LEAST = 1e-3
"""margins in logits, norms in pixels, and what clean classifiers leave of a share are taken for at least this"""
STATISTICS = {"histogram": "reference", "margins": "reference_margins", "sizes": "reference_sizes"}
"""what `Evidence` has of each class -> the same of clean classifiers beside it"""
Test = Literal["neuron noise", "universal perturbation"]


@dataclass(frozen=True)
class Evidence:
    """One method's verdict on one classifier, and the figures that it rests on."""

    method: str
    """``ban``, ``neural-cleanse`` or ``bti-dbf``"""
    backdoored: bool
    """the verdict: ``score > threshold``"""
    score: float
    """what the verdict rests on: for BAN the largest of `suspicion` by `test`, for BTI-DBF `top_class_share`, for Neural
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
    sizes: tuple[float, ...] = ()
    """BAN: L2 norm, pixels in [0, 1], of a perturbation, the same for all images, with which each class is on average the likeliest
    (`noisec.builders.audit.universal`)"""
    reference_sizes: tuple[float, ...] = ()
    """BAN: the same of the clean classifiers; empty where no verdict rests on sizes"""
    test: Test = "neuron noise"
    """BAN: of its tests the one whose score lies furthest above its threshold, by their ratio; `score` and `threshold` are this one's"""

    @property
    def suspect(self) -> int | None:
        """What a repair should aim at: the suspected target class where the verdict is a backdoor, else None."""
        return self.target if self.backdoored and self.target != UNKNOWN else None

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Evidence:
        """The same as ``dataclasses.asdict`` gave it, or JSON made of that; what another version's has besides is left out."""
        known = {field.name for field in fields(cls)} & set(content)
        values: dict[str, Any] = {name: tuple(content[name]) if isinstance(content[name], list) else content[name] for name in known}
        return cls(**values)


def excess(shares: Sequence[float], expected: Sequence[float] | None = None) -> list[float]:
    """How far each label's share lies above what clean classifiers give it: 0 where it does not, 1 where all images get the label.

    Args:
        shares: of the held-out images, of each label: [classes]
        expected: the same of clean classifiers; chance if left out
    """
    chance = [1 / len(shares)] * len(shares)
    return [(share - usual) / max(1 - usual, LEAST) for share, usual in zip(shares, expected or chance, strict=True)]


def suspicion(evidence: Evidence) -> dict[Test, list[float]]:
    """What speaks for a backdoor towards each class, by each of BAN's tests: [classes], at most 1, about 0 for a clean classifier.

    Neuron noise: the excess of the histogram over the reference, or over chance; where there are largest margins to compare with, the mean
    of that and of the share of each margin that lies above what clean classifiers have. Universal perturbation, where there are sizes to
    compare with: the share of the size in clean classifiers that it does without. Margins and sizes are first scaled so that the middle
    class has as much as in the clean ones, as a classifier has a scale of its own.
    """
    found = np.array(excess(evidence.histogram, evidence.reference))
    if evidence.reference_margins:
        found = (found + _above(evidence.reference_margins, evidence.margins)) / 2
    tests: dict[Test, list[float]] = {"neuron noise": found.tolist()}
    if evidence.reference_sizes:
        tests["universal perturbation"] = _above(evidence.sizes, evidence.reference_sizes).tolist()
    return tests


def _above(smaller: Sequence[float], larger: Sequence[float]) -> npt.NDArray[np.float64]:
    """Share of each larger one that the smaller one leaves, where both have the same scale in the middle: [classes], at most 1."""
    part = np.maximum(smaller, LEAST) / np.maximum(larger, LEAST)
    left: npt.NDArray[np.float64] = 1 - part / np.median(part)
    return left
