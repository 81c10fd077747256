"""What the denoiser decides: one guard with denoisers of several kinds, training noises and guidances, under the same attacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from noisec import contract
from noisec.benchmarks.detection.cells import detection
from noisec.benchmarks.detection.panel import PUBLISHED, Calibrated, panel
from noisec.benchmarks.detection.run import Benchmark, Plan, Sizes
from noisec.benchmarks.detection.subject import Subject
from noisec.builders.attacks import AttackSpec
from noisec.builders.build import build
from noisec.builders.figures import markdown_table, percent
from noisec.builders.progress import console
from noisec.builders.spec import GuardSpec
from noisec.errors import NoisecError

DENOISERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "bottleneck, noise as published": {"network": "bottleneck", "noise": "published"},
        "bottleneck": {"network": "bottleneck"},
        "U-Net, a third of the noise": {"network": "unet", "noise": 1 / 3},
        "U-Net": {"network": "unet"},
        "U-Net, twice the noise": {"network": "unet", "noise": 2.0},
        "guided U-Net": {"network": "unet", "guidance": 0.005},
    }
)
"""name -> network, noise relative to the guard's own training noise, and guidance"""
PUBLISHED_NOISE = MappingProxyType({"fashion-mnist": 0.5, "cifar10": 0.1, "gtsrb": 0.1, "pneumoniamnist": 0.2})
"""data set -> standard deviation of the training noise (NoiSec table 2)"""
COMPARED = ("default", PUBLISHED, "dF class Gaussian", "noise level")


@dataclass(frozen=True)
class Row:
    """One detector behind one denoiser under one attack; only attacks that succeeded count."""

    denoiser: str
    noise_sd: float
    guidance: float
    epochs: int
    residual: float
    """root mean square of x - A(x) over clean images, in [0, 1]; the mean over images"""
    detector: str
    attack: str
    auroc: float | None
    tpr_at_1pct: float | None
    fpr: float
    fpr_natural_noise: float
    n_benign: int
    n_malicious: int


def variants(spec: GuardSpec, epochs: int) -> dict[str, GuardSpec]:
    """The guard with every denoiser of `DENOISERS`, each trained for as many epochs."""
    found = {}
    for name, wanted in DENOISERS.items():
        noise = wanted.get("noise", 1.0)
        deviation = PUBLISHED_NOISE[spec.data.source] if noise == "published" else spec.autoencoder.noise_sd * noise
        changed = {"network": wanted["network"], "noise_sd": deviation, "guidance": wanted.get("guidance", 0.0), "epochs": epochs}
        found[name] = spec.model_copy(update={"autoencoder": spec.autoencoder.model_copy(update=changed), "compare": ()})
    return found


def measure(name: str, spec: GuardSpec, plan: Plan, work: Path, seed: int) -> list[Row]:
    """Build the guard with one denoiser and look at clean and attacked images through it."""
    repository = work / "denoisers" / name.replace(", ", "-").replace(" ", "-").lower()
    build(spec, repository, work, report=False, force=True)
    subject = Subject.open(repository, spec.name, work)
    benchmark = Benchmark(subject, plan, work, seed)
    detectors = panel(subject, benchmark.fit, benchmark.calibration)
    residual = float(benchmark.clean.tensors[contract.NOISE_LEVEL].mean())
    told = {"denoiser": name, **{key: getattr(spec.autoencoder, key) for key in ("noise_sd", "guidance", "epochs")}, "residual": residual}
    rows = []
    for attack in plan.attacks:
        made = benchmark.attacked(AttackSpec.parse(attack), benchmark.targets, "report")
        won = made.succeeded(benchmark.subject.predict(made.pixels).argmax(axis=1))
        sent = benchmark.send(made.pixels[won], attack)
        for detector in COMPARED:
            chosen = detectors[detector]
            clean, noisy, hit = (chosen.score(one) for one in (benchmark.clean, benchmark.noisy, sent))
            figures = detection(np.concatenate([clean, noisy]), hit)
            rows.append(
                Row(
                    **told,
                    detector=detector,
                    attack=attack,
                    auroc=figures["auroc"],
                    tpr_at_1pct=figures["tpr_at_1pct"],
                    fpr=flagged(chosen, clean),
                    fpr_natural_noise=flagged(chosen, noisy),
                    n_benign=len(clean) + len(noisy),
                    n_malicious=len(hit),
                )
            )
    return rows


def flagged(detector: Calibrated, scores: np.ndarray[Any, np.dtype[np.float32]]) -> float:
    """Share of the scores above the detector's threshold, or not a number."""
    return float(np.mean(~(scores <= detector.threshold)))


def run_study(spec: GuardSpec, attacks: Sequence[str], epochs: int, images: int, work: Path, seed: int) -> list[Row]:
    """Every denoiser of `DENOISERS` around the same classifier. Trainings and attacks are kept in ``work``."""
    plan = Plan(tuple(attacks), sizes=Sizes(images=images))
    plan.check(spec.classifier)
    if spec.data.source not in PUBLISHED_NOISE:
        raise NoisecError(
            f"the published denoiser's training noise is known for {', '.join(PUBLISHED_NOISE)}; data.source is {spec.data.source!r}"
        )
    rows: list[Row] = []
    for number, (name, variant) in enumerate(variants(spec, epochs).items(), 1):
        console.print(f"denoiser {number} of {len(DENOISERS)}: {name}")
        rows += measure(name, variant, plan, work, seed)
    return rows


def as_markdown(rows: Sequence[Row], guard: str, command: str) -> str:
    """The study's tables: what each denoiser leaves of clean images, and AUROC / TPR at 1 % FPR of each detector behind it."""
    attacks = list(dict.fromkeys(row.attack for row in rows))
    parts = [
        f"# Denoisers of the guard `{guard}`",
        f"`{command}`",
        "The same classifier, detectors and attacked images behind every denoiser; only attacks that succeeded count; honest protocol. "
        "Residual: root mean square of what the denoiser takes from a clean image, in [0, 1]. FPR at a nominal 1 %: clean images / "
        "the same with natural noise.",
    ]
    for detector in dict.fromkeys(row.detector for row in rows):
        heads = ["denoiser", "training noise", "guidance", "residual", "FPR", *(f"{attack}: AUROC / TPR" for attack in attacks)]
        body = []
        for name in dict.fromkeys(row.denoiser for row in rows):
            mine = {row.attack: row for row in rows if (row.denoiser, row.detector) == (name, detector)}
            first = mine[attacks[0]]
            told = [f"{first.noise_sd:.3g}", f"{first.guidance:g}", f"{first.residual:.4f}"]
            alarms = f"{percent(first.fpr)} / {percent(first.fpr_natural_noise)}"
            body.append([name, *told, alarms, *(_cell(mine[attack]) for attack in attacks)])
        parts += [f"## {detector}", markdown_table(heads, body)]
    return "\n\n".join(parts) + "\n"


def _cell(row: Row) -> str:
    return "-" if row.auroc is None or row.tpr_at_1pct is None else f"{row.auroc:.3f} / {percent(row.tpr_at_1pct)}"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
