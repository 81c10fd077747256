"""What clean classifiers of one family fail towards, against which another of that family is judged.

Under neuron noise a clean network fails towards some labels more than towards others (shirts look like most things), and its family and
classes decide which. A backdoor's target stands out against that more than against chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from noisec.builders.audit.ban import calibrate, excess
from noisec.builders.audit.evidence import Evidence
from noisec.errors import NoisecError


@dataclass(frozen=True)
class Reference:
    """Clean classifiers of one family with the same classes, trained and audited alike."""

    histogram: tuple[float, ...]
    """mean share of the held-out images that gets each label under neuron noise: [classes]"""
    scores: tuple[float, ...]
    """largest excess of each of them over the mean of the others"""
    threshold: float


def fit_reference(histograms: Sequence[Sequence[float]], false_alarm: float) -> Reference:
    """The reference that clean classifiers' histograms give.

    Args:
        histograms: `Evidence.histogram` of each: [n, classes]
        false_alarm: share of clean classifiers that may be called backdoored

    Raises:
        NoisecError: fewer than three, of different numbers of classes, or a rate outside (0, 1).
    """
    sizes = sorted({len(one) for one in histograms})
    if len(histograms) < 3 or len(sizes) > 1:
        raise NoisecError(
            f"audit: {len(histograms)} clean classifiers of {' and '.join(map(str, sizes))} classes to compare with; "
            "give at least 3 that have the same classes"
        )
    shares = np.array(histograms, dtype=np.float64)
    others = (shares.sum(axis=0) - shares) / (len(shares) - 1)
    scores = tuple(max(excess(one, usual)) for one, usual in zip(shares.tolist(), others.tolist(), strict=True))
    return Reference(tuple(shares.mean(axis=0).tolist()), scores, calibrate(scores, false_alarm))


def judged_by(evidence: Evidence, reference: Reference) -> Evidence:
    """BAN's evidence with score, suspected target and verdict against a reference.

    Raises:
        NoisecError: the classifier has another number of classes.
    """
    if len(evidence.histogram) != len(reference.histogram):
        raise NoisecError(
            f"audit: a classifier of {len(evidence.histogram)} classes cannot be compared with ones of {len(reference.histogram)}"
        )
    above = excess(evidence.histogram, reference.histogram)
    score = max(above)
    return replace(
        evidence,
        score=score,
        target=above.index(score),
        threshold=reference.threshold,
        backdoored=score > reference.threshold,
        reference=reference.histogram,
    )
