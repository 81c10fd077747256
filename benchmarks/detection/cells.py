"""One cell of the tables: one detector, one attack, one protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from noisec.builders.figures import Floats, auroc, tpr_at

Protocol = Literal["honest", "published"]
Access = Literal["white-box", "black-box", "gray-box", "query", "adaptive", "backdoor"]


@dataclass(frozen=True)
class Cell:
    """A row of ``summary.json``."""

    dataset: str
    guard: str
    detector: str
    """``default`` is the guard's own verdict"""
    protocol: Protocol
    access: Access
    attack: str
    """the method; ``pgd (successful)`` where only attacks that reached their goal count"""
    eps: float
    """largest change of a pixel in [0, 1]; 0 where the attack has no such bound"""
    success: float
    """share of the attacked images that get the label that the attacker wants"""
    auroc: float | None
    tpr_at_1pct: float | None
    tpr_at_5pct: float | None
    fpr: float | None
    """realised on clean images, at a nominal 1 % calibrated on other clean images"""
    n_benign: int
    n_malicious: int
    seed: int
    joint_success: float | None = None
    """share of the attacked images that get the label and no alarm"""
    fpr_natural_noise: float | None = None
    """the same as ``fpr`` on clean images with natural noise"""
    note: str = ""


def ranked(scores: Floats) -> Floats:
    """Scores that can be compared: what is no number ranks highest."""
    return np.where(np.isnan(scores), np.float32(np.inf), scores).astype(np.float32)


def detection(benign: Floats, malicious: Floats) -> dict[str, float | None]:
    """AUROC and TPR of scores float32 [n] and [m]; None where there is no malicious input."""
    if len(malicious) == 0:
        return {"auroc": None, "tpr_at_1pct": None, "tpr_at_5pct": None}
    benign, malicious = ranked(benign), ranked(malicious)
    return {
        "auroc": auroc(benign, malicious),
        "tpr_at_1pct": tpr_at(benign, malicious, 0.01),
        "tpr_at_5pct": tpr_at(benign, malicious, 0.05),
    }


def share(chosen: npt.NDArray[np.bool_]) -> float:
    return float(np.mean(chosen))
