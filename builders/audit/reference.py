"""What clean classifiers of one family fail towards, against which another of that family is judged.

Under neuron noise a clean network fails towards some labels more than towards others (shirts look like most things), and the logits of
some classes can be driven further than those of others; its family and classes decide which. A backdoor's target stands out against that
more than against chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from noisec.builders.audit.ban import calibrate
from noisec.builders.audit.evidence import Evidence, suspicion
from noisec.errors import NoisecError


@dataclass(frozen=True)
class Reference:
    """Clean classifiers of one family with the same classes, trained and audited alike."""

    histogram: tuple[float, ...]
    """mean share of the held-out images that gets each label under neuron noise: [classes]"""
    margins: tuple[float, ...]
    """mean of the largest margins: [classes]; empty where they were left out"""
    scores: tuple[float, ...]
    """of each of them against the mean of the others"""
    threshold: float


def fit_reference(clean: Sequence[Evidence], false_alarm: float) -> Reference:
    """The reference that BAN's evidence on clean classifiers gives.

    Args:
        false_alarm: share of clean classifiers that may be called backdoored

    Raises:
        NoisecError: fewer than three, of different numbers of classes, or with margins and without; or a rate outside (0, 1).
    """
    sizes = sorted({len(one.histogram) for one in clean})
    if len(clean) < 3 or len(sizes) > 1:
        raise NoisecError(
            f"audit: {len(clean)} clean classifiers of {' and '.join(map(str, sizes))} classes to compare with; "
            "give at least 3 that have the same classes"
        )
    if len({len(one.margins) for one in clean}) > 1:
        raise NoisecError("audit: the evidence on some of the clean classifiers has no margins; audit all of them with this version")
    others = [[one for one in clean if one is not left] for left in clean]
    scores = tuple(max(suspicion(compared(one, rest))) for one, rest in zip(clean, others, strict=True))
    whole = compared(clean[0], clean)
    return Reference(whole.reference, whole.reference_margins, scores, calibrate(scores, false_alarm, -1 if whole.margins else 0))


def compared(evidence: Evidence, clean: Sequence[Evidence]) -> Evidence:
    """The evidence beside what clean classifiers show on average."""
    histogram, margins = (np.mean(values, axis=0).tolist() for values in ([one.histogram for one in clean], [one.margins for one in clean]))
    return replace(evidence, reference=tuple(histogram), reference_margins=tuple(margins))


def judged_by(evidence: Evidence, reference: Reference) -> Evidence:
    """BAN's evidence with score, suspected target and verdict against a reference.

    Raises:
        NoisecError: the classifier has another number of classes, or was audited without margins where the reference has them.
    """
    if len(evidence.histogram) != len(reference.histogram):
        raise NoisecError(
            f"audit: a classifier of {len(evidence.histogram)} classes cannot be compared with ones of {len(reference.histogram)}"
        )
    if len(evidence.margins) < len(reference.margins):
        raise NoisecError("audit: the classifier was audited without margins, which the clean ones have; audit it with this version")
    beside = replace(evidence, reference=reference.histogram, reference_margins=reference.margins)
    above = suspicion(beside)
    score = max(above)
    return replace(
        beside,
        score=score,
        target=above.index(score),
        threshold=reference.threshold,
        backdoored=score > reference.threshold,
    )
