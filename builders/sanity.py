"""Reasons not to ship a guard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from noisec import contract
from noisec.builders.figures import PrecisionTable
from noisec.builders.images import Splits
from noisec.builders.progress import console
from noisec.builders.protect import Protected
from noisec.builders.spec import GuardSpec
from noisec.errors import NoisecError
from noisec.python_backend.scorer.detectors import ClassGaussian, Floats, GaussianMixture, Statistic
from noisec.python_backend.scorer.scoring import Scorer
from noisec.python_backend.scorer.session import open_session

MAX_DISAGREEMENT = 0.001
"""share of labels in which the stage may differ from the original classifier"""
ROWS_A_FEATURE = 2
"""fewest fit images of each noise level for each penultimate activation"""
MAX_AUROC_LOSS, MAX_PRECISION_DISAGREEMENT = 0.01, 0.005
"""what a lower precision may lose of mean AUROC and of equal labels"""
MAX_CONDITION = 1e10
"""largest condition number of a mixture's covariance"""


def refuse(problems: Sequence[str], *, force: bool) -> None:
    """Stop the build, or with ``force`` only say why it should have stopped.

    Raises:
        NoisecError: there is a problem and no ``force``.
    """
    if problems and not force:
        raise NoisecError("\n".join([*problems, "Nothing was written; --force goes on all the same."]))
    for problem in problems:
        console.print(f"  forced past: {problem}", style="yellow")


def data_problems(spec: GuardSpec, splits: Splits, protected: Protected) -> list[str]:
    """Too few images, or classes without any."""
    problems = []
    levels = spec.noise_levels
    needed = -(-ROWS_A_FEATURE * protected.features * levels * 4 // 3)  # a quarter sets the scales
    if len(splits.fit) < needed:
        problems.append(
            f"data.fit is {len(splits.fit)}: {protected.features} penultimate activations at {levels} noise levels "
            f"need at least {needed} images; "
            "give more, or ask for fewer noise_levels"
        )
    unseen = sorted(set(range(protected.classes)) - set(splits.fit.labels.tolist()))
    if unseen:
        names = [splits.class_names[label] if label < len(splits.class_names) else str(label) for label in unseen]
        problems.append(
            f"{len(unseen)} of {protected.classes} classes have no image in the fit set ({', '.join(names[:10])}): they would be flagged"
        )
    return problems


def stage_problems(spec: GuardSpec, splits: Splits, protected: Protected) -> tuple[list[str], float]:
    """Disagreement of the exported stage with the original classifier on the report images, and the share of equal labels."""
    session = open_session(protected.stage / "model.onnx")
    equal = []
    for batch in splits.report.batches():
        images = batch.floats()
        staged = session.run([contract.LOGITS], {contract.IMAGE: images})[0]
        equal.append(staged.argmax(axis=1) == protected.original(images).argmax(axis=1))
    agreement = float(np.concatenate(equal).mean())
    if 1 - agreement > MAX_DISAGREEMENT:
        message = (
            f"the exported classifier labels {100 * (1 - agreement):.2f} % of {len(splits.report)} images otherwise than the original; "
            f"at most {100 * MAX_DISAGREEMENT:g} % is rounding: check classifier.preprocessing"
        )
        return [message], agreement
    return [], agreement


def scorer_problems(scorer: Scorer) -> list[str]:
    """Mixtures that rest on directions in which clean images hardly vary."""
    worst = {
        detector.name: max(
            float(np.linalg.cond(factor.astype(np.float64)) ** 2) for statistic in detector.statistics for factor in factors_of(statistic)
        )
        for detector in scorer.detectors
        if any(factors_of(statistic) for statistic in detector.statistics)
    }
    return [
        f"detector {name}: its mixture's covariance has condition {condition:.1e}, at most {MAX_CONDITION:.0e} will do: "
        "give more fit images"
        for name, condition in worst.items()
        if not condition <= MAX_CONDITION
    ]


def factors_of(statistic: Statistic) -> list[Floats]:
    """The covariance factors of a statistic: those of a mixture, one around class means, or none."""
    if isinstance(statistic, GaussianMixture):
        return list(statistic.factors)
    return [statistic.factor] if isinstance(statistic, ClassGaussian) else []


def precision_problems(name: str, table: PrecisionTable, runtime: str) -> list[str]:
    """A precision that loses too much against fp32."""
    exactly = table.get("fp32", {})
    exact = (None if name == "fp32" else exactly.get(runtime)) or exactly.get("onnxruntime")
    if exact is None:  # nothing was measured, or fp32 on this runtime alone
        return []
    own = table[name][runtime]
    lost = exact["auroc"] - own["auroc"]
    problems = []
    if lost > MAX_AUROC_LOSS:
        problems.append(
            f"precision {name} loses {lost:.3f} of mean AUROC against fp32; at most {MAX_AUROC_LOSS} will do: "
            "try fp16, or one stage in fp32"
        )
    if 1 - own["label_agreement"] > MAX_PRECISION_DISAGREEMENT:
        problems.append(
            f"precision {name} labels {100 * (1 - own['label_agreement']):.2f} % of clean images otherwise than fp32; at most "
            f"{100 * MAX_PRECISION_DISAGREEMENT:g} % will do: set stage_precision.classifier"
        )
    return problems
