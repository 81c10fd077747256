"""What clean classifiers of one family fail towards, against which another of that family is judged.

Under neuron noise a clean network fails towards some labels more than towards others (shirts look like most things), and the logits of
some classes can be driven further than those of others; its family and classes decide which. A backdoor's target stands out against that
more than against chance.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from noisec.builders.audit.ban import calibrate
from noisec.builders.audit.evidence import STATISTICS, Evidence, suspicion
from noisec.errors import NoisecError

VERDICT = ("histogram", "margins")
"""what verdicts rest on. Universal perturbations find more Blends, and clean classifiers whose logits one of them happens to move"""


@dataclass(frozen=True)
class Reference:
    """Clean classifiers of one family with the same classes, trained and audited alike."""

    usual: Mapping[str, tuple[float, ...]]
    """statistic that verdicts rest on -> its mean over them: [classes]; empty where the audits left it out"""
    scores: tuple[float, ...]
    """of each of them against the mean of the others"""
    threshold: float

    def beside(self, evidence: Evidence) -> Evidence:
        """The evidence, with what is usual in these."""
        usual: dict[str, Any] = {field: self.usual.get(name, ()) for name, field in STATISTICS.items()}
        return replace(evidence, **usual)


def fit_reference(clean: Sequence[Evidence], false_alarm: float, statistics: Collection[str] = VERDICT) -> Reference:
    """The reference that BAN's evidence on clean classifiers gives.

    Args:
        false_alarm: share of clean classifiers that may be called backdoored
        statistics: of `STATISTICS`, those that verdicts rest on

    Raises:
        NoisecError: fewer than three, of different numbers of classes, or audited with other statistics; or a rate outside (0, 1).
    """
    sizes = sorted({len(one.histogram) for one in clean})
    if len(clean) < 3 or len(sizes) > 1:
        raise NoisecError(
            f"audit: {len(clean)} clean classifiers of {' and '.join(map(str, sizes))} classes to compare with; "
            "give at least 3 that have the same classes"
        )
    for name in statistics:
        if len({len(getattr(one, name)) for one in clean}) > 1:
            raise NoisecError(f"audit: the evidence on some of the clean classifiers has no {name}; audit all of them with this version")
    others = [[one for one in clean if one is not left] for left in clean]
    usual = [Reference(_means(rest, statistics), (), np.inf) for rest in others]
    scores = tuple(max(suspicion(rest.beside(one))) for one, rest in zip(clean, usual, strict=True))
    means = _means(clean, statistics)
    compared = sum(map(bool, means.values()))
    return Reference(means, scores, calibrate(scores, false_alarm, 0 if compared == 1 else -1))


def _means(clean: Sequence[Evidence], statistics: Collection[str]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(np.mean([getattr(one, name) for one in clean], axis=0).tolist()) for name in statistics}


def judged_by(evidence: Evidence, reference: Reference) -> Evidence:
    """BAN's evidence with score, suspected target and verdict against a reference.

    Raises:
        NoisecError: the classifier has another number of classes, or was audited without a statistic that the reference has.
    """
    if len(evidence.histogram) != len(reference.usual["histogram"]):
        raise NoisecError(
            f"audit: a classifier of {len(evidence.histogram)} classes cannot be compared with ones of {len(reference.usual['histogram'])}"
        )
    for name, values in reference.usual.items():
        if len(getattr(evidence, name)) < len(values):
            raise NoisecError(f"audit: the classifier was audited without {name}, which the clean ones have; audit it with this version")
    beside = reference.beside(evidence)
    above = suspicion(beside)
    score = max(above)
    return replace(
        beside,
        score=score,
        target=above.index(score),
        threshold=reference.threshold,
        backdoored=not score <= reference.threshold,
    )
