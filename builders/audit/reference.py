"""What clean classifiers of one family fail towards, against which another of that family is judged.

Under neuron noise a clean network fails towards some labels more than towards others (shirts look like most things), the logits of some
classes can be driven further than those of others, and a smaller perturbation leads to some; its family and classes decide which. A
backdoor's target stands out against that more than against chance.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from noisec.builders.audit.ban import calibrate
from noisec.builders.audit.evidence import STATISTICS, Evidence, Test, suspicion
from noisec.errors import NoisecError


@dataclass(frozen=True)
class Reference:
    """Clean classifiers of one family with the same classes, trained and audited alike."""

    usual: Mapping[str, tuple[float, ...]]
    """statistic that verdicts rest on -> its mean over them: [classes]; empty where the audits left it out"""
    scores: Mapping[Test, tuple[float, ...]]
    """test -> of each of them against the mean of the others"""
    thresholds: Mapping[Test, float]
    """test -> above which score it calls a classifier backdoored"""

    def beside(self, evidence: Evidence) -> Evidence:
        """The evidence, with what is usual in these."""
        usual: dict[str, Any] = {field: self.usual.get(name, ()) for name, field in STATISTICS.items()}
        return replace(evidence, **usual)


def fit_reference(clean: Sequence[Evidence], false_alarm: float, statistics: Collection[str] = tuple(STATISTICS)) -> Reference:
    """The reference that BAN's evidence on clean classifiers gives.

    Args:
        false_alarm: share of clean classifiers that may be called backdoored, by any of the tests: each may call an equal part of it so
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
    judged = [suspicion(Reference(_means(rest, statistics), {}, {}).beside(one)) for one, rest in zip(clean, others, strict=True)]
    scores = {test: tuple(max(one[test]) for one in judged) for test in judged[0]}
    means = _means(clean, statistics)
    lowest: dict[Test, float] = {"neuron noise": -1 if means.get("margins") else 0, "universal perturbation": -1}
    thresholds = {test: calibrate(found, false_alarm / len(scores), lowest[test]) for test, found in scores.items()}
    return Reference(means, scores, thresholds)


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
    test = max(above, key=lambda one: max(above[one]) / reference.thresholds[one])
    score = max(above[test])
    return replace(
        beside,
        score=score,
        target=above[test].index(score),
        threshold=reference.thresholds[test],
        test=test,
        backdoored=any(not max(found) <= reference.thresholds[one] for one, found in above.items()),
    )
