"""What an audit found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UNKNOWN = -1
"""no class is suspected"""


@dataclass(frozen=True)
class Evidence:
    """One method's verdict on one classifier, and the figures that it rests on."""

    method: str
    """``ban``, ``neural-cleanse`` or ``bti-dbf``"""
    backdoored: bool
    """the verdict: ``score > threshold``"""
    score: float
    """what the verdict rests on: for BAN the largest excess of the histogram over the reference, for BTI-DBF `top_class_share`, for Neural
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

    @property
    def suspect(self) -> int | None:
        """What a repair should aim at: the suspected target class where the verdict is a backdoor, else None."""
        return self.target if self.backdoored and self.target != UNKNOWN else None

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Evidence:
        """The same as ``dataclasses.asdict`` gave it, or JSON made of that."""
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
        return cls(**values)
