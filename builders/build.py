"""A guard's specification -> a guard in a model repository: the steps, in order, resumable."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import noisec
from noisec import contract, manifest
from noisec.builders import attacks, datasets, figures, sanity
from noisec.builders.calibrate import fit_scorer
from noisec.builders.card import write_card
from noisec.builders.export import AutoencoderStage, export_difference, export_stage, noise_offset
from noisec.builders.images import Floats, Splits, in_batches, natural
from noisec.builders.networks import DENOISERS
from noisec.builders.precision import lower
from noisec.builders.progress import console
from noisec.builders.protect import Protected, protect, training_inputs
from noisec.builders.repository import Widths, passes_needed, write_repository
from noisec.builders.spec import INT8_IMAGES, GuardSpec, Precision
from noisec.builders.stages import StageRunner, ask_guard, in_process
from noisec.builders.train import load_network, train_autoencoder
from noisec.builders.workbench import Workbench, seconds_of
from noisec.python_backend.runtimes.onnxruntime.session import open_session
from noisec.python_backend.scorer.scoring import Scorer

Stage = Literal["autoencoder", "classifier"]
NETWORK_STAGES: tuple[Stage, ...] = ("autoencoder", "classifier")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
COMPARED = 256
"""images on which an exported stage is compared with its network"""


@dataclass(frozen=True)
class Guard:
    """A finished build."""

    spec: GuardSpec
    repository: Path
    splits: Splits
    protected: Protected
    threshold: float
    """score above which an input is malicious"""


def build(spec: GuardSpec, repository: Path, work: Path, *, report: bool = True, strict: bool = False, force: bool = False) -> Guard:
    """Build a guard and put it into a model repository.

    Args:
        repository: model repository; made where it is missing; other guards and releases in it stay
        work: folder for finished steps, so that a re-run reuses them
        report: attack the report images and write figures and card; the demo measures over gRPC instead
        strict: refuse data with broken or wrongly labelled files instead of leaving those out
        force: build in spite of what `noisec.builders.sanity` finds

    Raises:
        NoisecError: data, classifier or specification is not as it must be.
    """
    console.print(f"building [bold]{spec.name}[/] release {spec.release} into {repository}")
    bench = Workbench(work)
    splits = datasets.load_splits(spec.data, spec.seed, cache=work / "images", strict=strict)
    protected = protect(spec, splits, bench)
    sanity.refuse(sanity.data_problems(spec, splits, protected), force=force)
    problems, agreement = sanity.stage_problems(spec, splits, protected)
    sanity.refuse(problems, force=force)
    autoencoder = build_autoencoder(spec, splits, bench)
    exact: dict[Stage, Path] = {"autoencoder": autoencoder, "classifier": protected.stage}
    attacked = attack_report(spec, protected, splits, bench) if report else None
    chosen = {stage: spec.precision_of(stage) for stage in NETWORK_STAGES}
    variants: dict[str, Variant] = {
        name: make_variant(spec, exact, dict.fromkeys(NETWORK_STAGES, name), splits, attacked, bench) for name in compared(spec)
    }
    served = next((one for one in variants.values() if one.precisions == chosen), None) or make_variant(
        spec, exact, chosen, splits, attacked, bench
    )
    sanity.refuse(sanity.scorer_problems(served.scorer), force=force)
    variants.setdefault(served.name, served)
    table: figures.PrecisionTable = (
        {name: {spec.runtime: one.summary(variants["fp32"])} for name, one in variants.items()} if report else {}
    )
    sanity.refuse(sanity.precision_problems(served.name, table, spec.runtime), force=force)
    measured = {**served.figures, "label_agreement": agreement} if report else {}
    widths = Widths(splits.shape, protected.classes, protected.features)
    write_repository(repository, spec, widths, splits.class_names, served.stages, served.scorer)
    if report:
        write_card(repository, spec, protected, measured, table)
    content = {
        "versions": versions(),
        "spec": json.loads(spec.model_dump_json()),
        "export_difference": json.loads((autoencoder / "difference.json").read_text()),
        "threshold": float(served.scorer.threshold),
        "figures": measured,
        "precisions": table,
    }
    manifest.write_manifest(repository, spec.name, spec.release, content)
    return Guard(spec, repository, splits, protected, float(served.scorer.threshold))


def compared(spec: GuardSpec) -> tuple[Precision, ...]:
    """Precisions to build throughout: those asked for, and fp32 wherever another one is measured against it."""
    others = {spec.precision, *spec.stage_precision.values(), *spec.compare} - {"fp32"}
    return tuple(name for name in PRECISIONS if name in {"fp32", *spec.compare} or (name in others and not spec.stage_precision))


@dataclass(frozen=True)
class Variant:
    """The guard in one precision."""

    precisions: dict[Stage, Precision]
    stages: dict[str, Path]
    scorer: Scorer
    figures: dict[str, Any]
    labels: npt.NDArray[np.int64]
    """of the clean report images"""
    build_seconds: float

    @property
    def name(self) -> str:
        """The precision, or ``autoencoder+classifier`` where they differ."""
        return "+".join(dict.fromkeys(self.precisions.values()))

    def summary(self, exact: Variant) -> dict[str, float]:
        """What this precision costs, against the guard in fp32."""
        attacks = self.figures["attacks"].values()
        size = sum(path.stat().st_size for folder in self.stages.values() for path in folder.glob("model.onnx*"))
        return {
            "label_agreement": float(np.mean(self.labels == exact.labels)),
            "auroc": float(np.mean([attack["auroc"] for attack in attacks])),
            "tpr_at_1pct": float(np.mean([attack["tpr_at_1pct"] for attack in attacks])),
            "megabytes": size / 1e6,
            "build_seconds": self.build_seconds,
        }


def make_variant(
    spec: GuardSpec, exact: dict[Stage, Path], precisions: dict[Stage, Precision], splits: Splits, attacked: Path | None, bench: Workbench
) -> Variant:
    """Lower the stages, fit the scorer on what the lowered stages answer, and measure."""
    folders = {stage: lowered(spec, exact, stage, precision, splits, bench) for stage, precision in precisions.items()}
    stages: dict[str, Path] = {str(stage): folder for stage, folder in folders.items()}
    fitted = bench.step("scorer", scorer_inputs(spec, splits, stages), lambda folder: fit(spec, stages, splits, folder))
    scorer = Scorer.load(fitted / "scorer.npz")
    seconds = sum(seconds_of(folder) for folder in folders.values())
    if attacked is None:
        return Variant(precisions, stages, scorer, {}, np.empty(0, np.int64), seconds)
    inputs = {"scorer": fitted.name, "attacks": attacked.name}
    reported = bench.step("report", inputs, lambda folder: measure(spec, stages, scorer, splits, attacked, folder))
    measured = json.loads((reported / "figures.json").read_text())
    return Variant(precisions, stages, scorer, measured, np.load(reported / "labels.npy"), seconds)


def lowered(spec: GuardSpec, exact: dict[Stage, Path], stage: Stage, precision: Precision, splits: Splits, bench: Workbench) -> Path:
    """Folder of one stage in one precision."""
    if precision == "fp32":
        return exact[stage]
    inputs = {"from": exact[stage].name, "precision": precision, "calibration": spec.int8_calibration if precision == "int8" else None}

    def make(folder: Path) -> None:
        images = natural(splits.fit[:INT8_IMAGES], spec.natural_noise_sd, spec.seed)
        feeds = images if stage == "autoencoder" else classifier_feeds(exact["autoencoder"], images, spec.noise_source)
        lower(exact[stage], precision, feeds, spec.int8_calibration, folder)

    return bench.step(f"{stage}-{precision}", inputs, make)


def classifier_feeds(autoencoder: Path, images: Iterable[Floats], noise_source: str) -> Iterator[Floats]:
    """What the classifier stage is fed: images, their reconstructions and their noise."""
    session = open_session(autoencoder / "model.onnx")
    for batch in images:
        yield from (batch, *session.run([contract.RECONSTRUCTION, noise_source], {contract.IMAGE: batch}))


def build_autoencoder(spec: GuardSpec, splits: Splits, bench: Workbench) -> Path:
    """Folder with the autoencoder stage, trained, exported and compared with its network."""
    weights = bench.step(
        "autoencoder",
        {**training_inputs(spec, splits), "autoencoder": spec.autoencoder.model_dump(mode="json")},
        lambda folder: train_autoencoder(spec.autoencoder, splits.train, spec.seed, folder),
    )
    offset = noise_offset(spec.classifier.preprocessing) if spec.noise_source == contract.NOISE_INPUT else ()
    stage = AutoencoderStage(load_network(DENOISERS[spec.autoencoder.network](splits.shape), weights), offset)

    def export(folder: Path) -> None:
        export_stage(stage, splits.shape, spec.autoencoder_outputs, folder / "model.onnx")
        difference = export_difference(stage, folder / "model.onnx", splits.fit[:COMPARED].floats())
        (folder / "difference.json").write_text(json.dumps({"autoencoder": difference}))

    return bench.step("autoencoder-stage", {"from": weights.name, "offset": offset}, export)


def scorer_inputs(spec: GuardSpec, splits: Splits, stages: dict[str, Path]) -> dict[str, Any]:
    fields = {"release", "target_fpr", "seed", "natural_noise_sd", "noise_levels", "data", "detectors"}
    chosen = json.loads(spec.model_dump_json(include=fields))
    return {**chosen, "files": splits.digest, **{stage: folder.name for stage, folder in stages.items()}}


def fit(spec: GuardSpec, stages: dict[str, Path], splits: Splits, folder: Path) -> None:
    fit_scorer(spec, StageRunner(in_process(stages), passes_needed(spec), spec.noise_source), splits).save(folder / "scorer.npz")


def attack_report(spec: GuardSpec, protected: Protected, splits: Splits, bench: Workbench) -> Path:
    """Folder with the attacked report images, ``<attack>.npz``: pixels, true labels and the attacker's target."""
    inputs = {
        **training_inputs(spec, splits),
        "classifier": protected.stage.name,
        "attacks": spec.attacks,
        "backdoor": spec.classifier.backdoor,
        "gradients": protected.network is not None,
    }

    def make(folder: Path) -> None:
        for name, attacked in attacks.attack_all(spec, protected, splits.report):
            attacked.save(folder / f"{name}.npz")
        (folder / "names.json").write_text(json.dumps(attacks.names(spec, protected)))

    return bench.step("attacks", inputs, make)


def measure(spec: GuardSpec, stages: dict[str, Path], scorer: Scorer, splits: Splits, attacked: Path, folder: Path) -> None:
    """Ask the stages about clean, noisy and attacked report images; write ``figures.json`` and the clean images' labels."""
    run = StageRunner(in_process(stages), passes_needed(spec), spec.noise_source)

    report = splits.report
    clean = ask_guard(run, scorer, (batch.floats() for batch in report.batches()), len(report), "clean images")
    noisy = ask_guard(run, scorer, natural(report, spec.natural_noise_sd, spec.seed + 2), len(report), "noisy images")
    result = figures.clean_figures(clean, noisy, report.labels, spec.target_fpr)
    result["attacks"] = {}
    for name in json.loads((attacked / "names.json").read_text()):
        sent = attacks.AttackedImages.load(attacked / f"{name}.npz")
        answers = ask_guard(run, scorer, in_batches(sent.pixels), len(sent.pixels), name)
        result["attacks"][name] = figures.attack_figures(clean, answers, sent.succeeded(answers.labels))
    np.save(folder / "labels.npy", clean.labels)
    (folder / "figures.json").write_text(json.dumps(result, indent=2))


def versions() -> dict[str, str]:
    """Versions of everything that shapes a build."""
    packages = ("torch", "onnx", "onnxruntime", "numpy", "scikit-learn")
    return {"noisec-triton": noisec.__version__, "python": platform.python_version(), **{name: version(name) for name in packages}}
