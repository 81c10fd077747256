"""Figures of a guard, from scores and verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

PrecisionTable = dict[str, dict[str, dict[str, float]]]
"""precision -> runtime -> figure -> value"""
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Answers:
    """What a guard said of ``n`` inputs, however it was asked."""

    labels: npt.NDArray[np.int64]
    scores: Floats
    is_malicious: npt.NDArray[np.bool_]

    def ordered(self) -> Floats:
        """Scores that can be ranked: a score that is not a number ranks highest."""
        return np.where(np.isnan(self.scores), np.float32(np.inf), self.scores)


def auroc(benign: Floats, malicious: Floats) -> float:
    """Probability that a malicious input scores higher than a benign one."""
    truth = np.repeat([0, 1], [len(benign), len(malicious)])
    limit = np.finfo(np.float32).max
    return float(roc_auc_score(truth, np.concatenate([benign, malicious]).clip(-limit, limit)))


def tpr_at(benign: Floats, malicious: Floats, fpr: float) -> float:
    """Share of the malicious inputs above the ``1 - fpr`` quantile of the benign ones."""
    return float(np.mean(malicious > np.quantile(benign, 1 - fpr, method="higher")))


def attack_figures(clean: Answers, attacked: Answers, succeeded: npt.NDArray[np.bool_]) -> dict[str, float | None]:
    """Figures of one attack against clean images.

    Args:
        succeeded: bool [n], whether the classifier gave the attacker the label; its own errors count too
    """
    benign, malicious = clean.ordered(), attacked.ordered()
    return {
        "success": float(succeeded.mean()),
        "flagged": float(attacked.is_malicious.mean()),
        "auroc": auroc(benign, malicious),
        "tpr_at_1pct": tpr_at(benign, malicious, 0.01),
        "tpr_at_5pct": tpr_at(benign, malicious, 0.05),
        "tpr_at_1pct_successful": tpr_at(benign, malicious[succeeded], 0.01) if succeeded.any() else None,
        "joint_success": float((succeeded & ~attacked.is_malicious).mean()),
        "n": len(malicious),
    }


def clean_figures(clean: Answers, noisy: Answers, truth: npt.NDArray[np.int64], alpha: float) -> dict[str, Any]:
    """Accuracy and realised false-positive rates."""
    return {
        "accuracy": float(np.mean(clean.labels == truth)),
        "alpha": alpha,
        "fpr": float(clean.is_malicious.mean()),
        "fpr_natural_noise": float(noisy.is_malicious.mean()),
        "n_clean": len(clean.labels),
    }


def figure_rows(figures: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows of the table that cards and the demo show."""
    heads = ["input", "accuracy", "attack success", "flagged", "AUROC", "TPR at 1 % FPR", "missed"]
    rows = [
        ["clean", percent(figures["accuracy"]), "", percent(figures["fpr"], 2), "", "", ""],
        ["clean + sensor noise", "", "", percent(figures["fpr_natural_noise"], 2), "", "", ""],
    ]
    for name, attack in figures["attacks"].items():
        kept = percent(1 - attack["success"]) if name != "badnets" else ""
        shown = [percent(attack[key]) for key in ("success", "flagged")]
        rows.append([name, kept, *shown, f"{attack['auroc']:.3f}", percent(attack["tpr_at_1pct"]), percent(attack["joint_success"])])
    return heads, rows


def precision_rows(table: PrecisionTable) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows of a manifest's ``precisions``."""
    heads = ["precision", "runtime", "labels as fp32", "mean AUROC", "mean TPR at 1 % FPR", "MB", "build seconds"]
    rows = [
        [
            precision,
            runtime,
            percent(one["label_agreement"], 2),
            f"{one['auroc']:.4f}",
            percent(one["tpr_at_1pct"]),
            f"{one['megabytes']:.2f}",
            f"{one['build_seconds']:.0f}",
        ]
        for precision, runtimes in table.items()
        for runtime, one in runtimes.items()
    ]
    return heads, rows


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
