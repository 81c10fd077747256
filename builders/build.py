"""A guard's specification -> a guard in a model repository: the steps, in order, resumable."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import noisec
from noisec import contract, manifest
from noisec.builders import attacks, datasets, figures, sanity
from noisec.builders.calibrate import StageRunner, fit_scorer
from noisec.builders.card import write_card
from noisec.builders.export import AutoencoderStage, export_difference, export_stage
from noisec.builders.images import Floats, Splits, in_batches, natural
from noisec.builders.networks import DENOISERS
from noisec.builders.progress import console
from noisec.builders.protect import Protected, protect, training_inputs
from noisec.builders.repository import Widths, passes_needed, write_repository
from noisec.builders.spec import GuardSpec
from noisec.builders.train import load_network, train_autoencoder
from noisec.builders.workbench import Workbench
from noisec.python_backend.scorer.scoring import Scorer

AUTOENCODER_OUTPUTS = (contract.NOISE, contract.RECONSTRUCTION, contract.NOISE_LEVEL, contract.IN_RANGE)
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
    stages = {"autoencoder": autoencoder, "classifier": protected.stage}
    fitted = bench.step("scorer", scorer_inputs(spec, splits, stages), lambda folder: fit(spec, stages, splits, folder))
    scorer = Scorer.load(fitted / "scorer.npz")
    sanity.refuse(sanity.scorer_problems(scorer), force=force)
    measured: dict[str, Any] = {}
    if report:
        reported = bench.step(
            "report",
            {"scorer": fitted.name, "attacks": spec.attacks, "backdoor": spec.classifier.backdoor},
            lambda folder: measure(spec, stages, scorer, protected, splits, folder),
        )
        measured = {**json.loads((reported / "figures.json").read_text()), "label_agreement": agreement}
    write_repository(repository, spec, Widths(splits.shape, protected.classes, protected.features), splits.class_names, stages, scorer)
    if report:
        write_card(repository, spec, protected, measured)
    content = {
        "versions": versions(),
        "spec": json.loads(spec.model_dump_json()),
        "export_difference": json.loads((autoencoder / "difference.json").read_text()),
        "threshold": float(scorer.threshold),
        "figures": measured,
    }
    manifest.write_manifest(repository, spec.name, spec.release, content)
    return Guard(spec, repository, splits, protected, float(scorer.threshold))


def build_autoencoder(spec: GuardSpec, splits: Splits, bench: Workbench) -> Path:
    """Folder with the autoencoder stage, trained, exported and compared with its network."""
    weights = bench.step(
        "autoencoder",
        {**training_inputs(spec, splits), "autoencoder": spec.autoencoder.model_dump(mode="json", exclude_defaults=True)},
        lambda folder: train_autoencoder(spec.autoencoder, splits.train, spec.seed, folder),
    )
    stage = AutoencoderStage(load_network(DENOISERS[spec.autoencoder.network](splits.shape), weights))

    def export(folder: Path) -> None:
        export_stage(stage, splits.shape, AUTOENCODER_OUTPUTS, folder / "model.onnx")
        difference = export_difference(stage, folder / "model.onnx", splits.fit[:COMPARED].floats())
        (folder / "difference.json").write_text(json.dumps({"autoencoder": difference}))

    return bench.step("autoencoder-stage", {"from": weights.name}, export)


def scorer_inputs(spec: GuardSpec, splits: Splits, stages: dict[str, Path]) -> dict[str, Any]:
    fields = {"release", "target_fpr", "seed", "natural_noise_sd", "noise_levels", "data", "detectors"}
    chosen = json.loads(spec.model_dump_json(include=fields, exclude_defaults=True))
    return {**chosen, "files": splits.digest, **{stage: folder.name for stage, folder in stages.items()}}


def fit(spec: GuardSpec, stages: dict[str, Path], splits: Splits, folder: Path) -> None:
    fit_scorer(spec, StageRunner(stages, passes_needed(spec)), splits).save(folder / "scorer.npz")


def measure(spec: GuardSpec, stages: dict[str, Path], scorer: Scorer, protected: Protected, splits: Splits, folder: Path) -> None:
    """Attack the report images and write ``figures.json``."""
    run = StageRunner(stages, passes_needed(spec))

    def ask(batches: Iterable[Floats], count: int, title: str) -> figures.Answers:
        tensors = run(batches, count, title)
        verdict = scorer.verdict(tensors)
        return figures.Answers(tensors[contract.LOGITS].argmax(axis=1), verdict.score, verdict.is_malicious)

    report = splits.report
    clean = ask((batch.floats() for batch in report.batches()), len(report), "clean images")
    noisy = ask(natural(report, spec.natural_noise_sd, spec.seed + 2), len(report), "noisy images")
    result = figures.clean_figures(clean, noisy, report.labels, spec.target_fpr)
    result["attacks"] = {}
    for name, attacked in attacks.attack_all(spec, protected, report):
        answers = ask(in_batches(attacked.pixels), len(attacked.pixels), name)
        result["attacks"][name] = figures.attack_figures(clean, answers, attacked.succeeded(answers.labels))
    (folder / "figures.json").write_text(json.dumps(result, indent=2))


def versions() -> dict[str, str]:
    """Versions of everything that shapes a build."""
    packages = ("torch", "onnx", "onnxruntime", "numpy", "scikit-learn")
    return {"noisec-triton": noisec.__version__, "python": platform.python_version(), **{name: version(name) for name in packages}}
