"""The audit of a guard's own classifier, before it ships, and its repair."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import matplotlib as mpl
import numpy as np
from torch import nn

mpl.use("Agg")
import matplotlib.pyplot as plt

from noisec.builders.audit.ban import AuditSettings, audit
from noisec.builders.audit.evidence import LEAST, UNKNOWN, Evidence, suspicion
from noisec.builders.audit.measure import accuracy
from noisec.builders.audit.repair import RepairSettings, repair
from noisec.builders.audit.restored import Restored
from noisec.builders.images import Splits
from noisec.builders.protect import STAGE, Protected, fingerprint
from noisec.builders.spec import GuardSpec
from noisec.builders.workbench import Workbench
from noisec.errors import NoisecError

REPAIR_SHARE = 0.05
"""of the training images: what the paper repairs with"""


def audit_protected(spec: GuardSpec, splits: Splits, protected: Protected, bench: Workbench) -> Evidence:
    """BAN's verdict on a guard's classifier, on its fit images, with which the classifier was not trained. How common each class was in its
    training is taken from the guard's training images.

    Raises:
        NoisecError: the classifier cannot be audited (`noisec.builders.audit.checks`, `noisec.builders.audit.restored`).
    """
    network = protected.network or Restored(protected.stage / STAGE, splits.fit)
    settings = AuditSettings(seed=spec.seed)
    counts = np.bincount(splits.train.labels, minlength=protected.classes)
    known = counts if counts.all() else None
    told = {"settings": asdict(settings), "counts": counts.tolist()}
    inputs = {"classifier": protected.stage.name, "weights": fingerprint(network), **told, "data": str(spec.data), "files": splits.digest}

    def make(folder: Path) -> None:
        found = audit(network, splits.fit, protected.classes, settings, known)
        (folder / "evidence.json").write_text(json.dumps(asdict(found)))

    return Evidence.of(json.loads((bench.step("audit", inputs, make) / "evidence.json").read_text()))


def read_evidence(path: Path) -> Evidence:
    """What an earlier audit wrote as JSON.

    Raises:
        NoisecError: the file is not there or holds something else.
    """
    try:
        return Evidence.of(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise NoisecError(f"{path} holds no evidence of an audit (noisec audit GUARD.toml --json FILE): {error}") from error


def audit_problems(evidence: Evidence, class_names: tuple[str, ...]) -> list[str]:
    """Why a classifier should not ship; empty where no backdoor was found."""
    return [said(evidence, class_names)] if evidence.backdoored else []


def said(evidence: Evidence, class_names: tuple[str, ...]) -> str:
    """The verdict in one sentence."""
    names = _names(evidence, class_names)
    figures = f"{_found(evidence)} (score {evidence.score:.2f}, threshold {evidence.threshold:.2f})"
    if not evidence.backdoored or evidence.target == UNKNOWN:
        return f"audit: {'a backdoor is likely' if evidence.backdoored else 'no backdoor found'}: {figures}"
    return f"audit: the classifier is probably backdoored towards class {evidence.target} ({names[evidence.target]}): {figures}"


def _names(evidence: Evidence, class_names: tuple[str, ...]) -> tuple[str, ...]:
    """A name for each class; a number where the classifier knows more classes than the images have."""
    return (*class_names, *map(str, range(len(class_names), len(evidence.histogram))))[: len(evidence.histogram)]


def _found(evidence: Evidence) -> str:
    """What the verdict rests on."""
    target = evidence.target
    if evidence.test == "universal perturbation":
        part = evidence.sizes[target] / max(evidence.reference_sizes[target], LEAST)
        return f"one perturbation makes class {target} the likeliest on average with {part:.1f} times the size that it takes in clean ones"
    suspected = evidence.top_class_share if target == UNKNOWN else evidence.histogram[target]
    share = f"{100 * suspected:.0f} % of the images get one label under neuron noise, {100 * evidence.share_without_noise:.0f} % without"
    if target == UNKNOWN or not evidence.reference_margins:
        return share
    usual = max(evidence.reference_margins[target], LEAST)
    return f"{share}, and its logit can be driven {evidence.margins[target] / usual:.1f} times as far above the others as in clean ones"


def draw_audit(evidence: Evidence, class_names: tuple[str, ...], path: Path) -> None:
    """What the audit saw of each class beside what is usual, and each class's score with the threshold."""
    classes = len(evidence.histogram)
    panels = {"share of labels under neuron noise": (evidence.histogram, evidence.reference or (1 / classes,) * classes)}
    if evidence.margins:
        panels["largest margin of the logit"] = (evidence.margins, evidence.reference_margins)
    if evidence.sizes:
        panels["size of a universal perturbation"] = (evidence.sizes, evidence.reference_sizes)
    panels[f"score by {evidence.test}"] = (tuple(suspicion(evidence)[evidence.test]), ())
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), layout="constrained", squeeze=False)
    colours = ["#b3261e" if evidence.backdoored and label == evidence.target else "#1f77b4" for label in range(classes)]
    for panel, (title, (values, usual)) in zip(axes[0], panels.items(), strict=True):
        panel.bar(range(classes), values, color=colours)
        if usual:
            panel.stairs(usual, np.arange(classes + 1) - 0.5, baseline=None, color="black", linewidth=1, label="usual")
            panel.legend(frameon=False)
        panel.set_xticks(range(classes), _names(evidence, class_names), rotation=45, ha="right")
        panel.set_title(title)
    axes[0, -1].axhline(evidence.threshold, color="black", linestyle="--", linewidth=1, label="threshold")
    axes[0, -1].legend(frameon=False)
    figure.suptitle("backdoored" if evidence.backdoored else "no backdoor found")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def repair_protected(
    spec: GuardSpec, splits: Splits, protected: Protected, settings: RepairSettings, target: int | None
) -> tuple[nn.Module, dict[str, float]]:
    """A repaired copy of a guard's classifier, and its accuracy on the report images before and after.

    Args:
        target: the class that an audit suspects; None repairs under neuron noise

    Returns:
        the module as the guard's specification builds it, without what the build wraps around it

    Raises:
        NoisecError: there is only an ONNX file, or target, images or network cannot be used.
    """
    if protected.network is None:
        raise NoisecError(f"{protected.description}: a repair writes the weights of a PyTorch module; give it with classifier.factory")
    network = protected.network
    images = splits.train[: max(1, round(REPAIR_SHARE * len(splits.train)))]
    repaired = repair(network, images, protected.classes, settings, target)
    figures = {"accuracy_before": accuracy(network, splits.report), "accuracy_after": accuracy(repaired, splits.report)}
    return inner(repaired), figures


def inner(network: nn.Module) -> nn.Module:
    """The user's own module inside what the build has put around it: preprocessing, or the choice of the logits."""
    if isinstance(network, nn.Sequential) and len(network) == 2:
        return network[1]
    return getattr(network, "network", network)
