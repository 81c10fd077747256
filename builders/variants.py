"""The guard in one precision or several: lowered stages, a scorer fitted on what they answer, and figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from noisec import contract
from noisec.builders import attacks, figures
from noisec.builders.calibrate import NO_HEAD, fit_scorer
from noisec.builders.compiling import compile_stage
from noisec.builders.engine import compute_capability, find_tensorrt
from noisec.builders.figures import PrecisionTable
from noisec.builders.head import read_head
from noisec.builders.images import BATCH, Floats, Splits, in_batches, natural
from noisec.builders.layout import arrange, changed_stages
from noisec.builders.passes import fused_passes
from noisec.builders.precision import lower
from noisec.builders.protect import Protected, training_inputs
from noisec.builders.spec import INT8_IMAGES, NETWORK_STAGES, GuardSpec, Precision, Stage
from noisec.builders.stages import Infer, StageRunner, ask_guard, in_process, on_gpu
from noisec.builders.workbench import Workbench, seconds_of
from noisec.python_backend.scorer.scoring import Scorer
from noisec.python_backend.scorer.session import open_session


def to_build(spec: GuardSpec) -> dict[str, dict[Stage, Precision]]:
    """Name -> precision of each stage: fp32, what is to be compared with it, and what serves, last."""
    chosen = {stage: spec.precision_of(stage) for stage in NETWORK_STAGES}
    found: dict[str, dict[Stage, Precision]] = {name: dict.fromkeys(NETWORK_STAGES, name) for name in ("fp32", *spec.compare)}
    found.pop(name_of(chosen), None)
    return {**found, name_of(chosen): chosen}


def name_of(precisions: dict[Stage, Precision]) -> str:
    """The precision, or ``autoencoder+classifier`` where they differ."""
    return "+".join(dict.fromkeys(precisions.values()))


def make_variants(
    spec: GuardSpec, exact: dict[Stage, Path], splits: Splits, attacked: Path | None, bench: Workbench
) -> tuple[Variant, PrecisionTable]:
    """The variant that serves, and what each one costs against fp32; the table is empty where nothing is measured.

    Args:
        exact: stage -> folder with its graph in fp32
        attacked: folder of :func:`attack_report`; None measures nothing
    """
    variants = {name: make_variant(spec, exact, precisions, splits, attacked, bench) for name, precisions in to_build(spec).items()}
    served = list(variants.values())[-1]
    if attacked is None:
        return served, {}
    exact_one = variants["fp32"]
    return served, {
        name: {spec.runtime: one.summary(exact_one)} for name, one in sorted(variants.items(), key=lambda item: item[0] != "fp32")
    }


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
        return name_of(self.precisions)

    def summary(self, exact: Variant) -> dict[str, float]:
        """What this precision costs, against the guard in fp32."""
        return summary(self.figures, float(np.mean(self.labels == exact.labels)), megabytes(self.stages.values()), self.build_seconds)


def make_variant(
    spec: GuardSpec, exact: dict[Stage, Path], precisions: dict[Stage, Precision], splits: Splits, attacked: Path | None, bench: Workbench
) -> Variant:
    """Lower the stages, fit the scorer on what the lowered stages answer, and measure."""
    folders = {stage: lowered(spec, exact, stage, precision, splits, bench) for stage, precision in precisions.items()}
    folders = {**folders, **{stage: laid_out(spec, folders, stage, bench) for stage in changed_stages(spec)}}
    if spec.runtime == "tensorrt":
        folders = {stage: compiled(spec, folder, bench) for stage, folder in folders.items()}
    stages: dict[str, Path] = {str(stage): folder for stage, folder in folders.items()}
    inputs = scorer_inputs(spec, splits, stages)
    fitted = bench.step("scorer", inputs, lambda folder: fit(spec, stages, exact["classifier"], splits, folder))
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
    inputs = {"from": exact[stage].name, "precision": precision}
    if precision == "int8":  # its ranges are those of images that the stage is fed
        fields = {"int8_calibration", "seed", "natural_noise_sd", "data"}
        inputs |= {**json.loads(spec.model_dump_json(include=fields)), "noise": spec.noise_source, "files": splits.digest}
        inputs["autoencoder"] = exact["autoencoder"].name

    def make(folder: Path) -> None:
        images = natural(splits.fit[:INT8_IMAGES], spec.natural_noise_sd, spec.seed)
        feeds = images if stage == "autoencoder" else classifier_feeds(exact["autoencoder"], images, spec.noise_source)
        lower(exact[stage], precision, feeds, spec.int8_calibration, folder)

    return bench.step(f"{stage}-{precision}", inputs, make)


def laid_out(spec: GuardSpec, plain: dict[Stage, Path], stage: Stage, bench: Workbench) -> Path:
    """Folder of one stage in the layout, and with the input, that serve."""
    layout = "fused" if fused_passes(spec) else "staged"  # a guard that is one model is made of the same graphs
    serving = {"layout": layout, "input": spec.serving.input, "passes": fused_passes(spec), "noise": spec.noise_source}
    inputs = {**{str(one): folder.name for one, folder in plain.items()}, **serving}
    return bench.step(f"{stage}-{layout}", inputs, lambda folder: arrange(spec, plain, stage, folder))


def compiled(spec: GuardSpec, source: Path, bench: Workbench) -> Path:
    """Folder of one stage with its plan for this machine's GPU."""
    trt, capability = find_tensorrt(), compute_capability()
    inputs = {"from": source.name, "options": spec.tensorrt.model_dump(), "tensorrt": trt.__version__, "capability": capability}
    inputs["largest"] = spec.serving.max_batch_size
    return bench.step("plan", inputs, lambda folder: compile_stage(trt, capability, source, spec, folder))


def open_stages(spec: GuardSpec, stages: dict[str, Path]) -> Infer:
    """The stages, run in this process by the guard's own runtime."""
    if spec.runtime != "tensorrt":
        return in_process(stages)
    return on_gpu(stages, spec.serving.max_batch_size, host_code=spec.tensorrt.version_compatible)


def classifier_feeds(autoencoder: Path, images: Iterable[Floats], noise_source: str) -> Iterator[Floats]:
    """What the classifier stage is fed: images, their reconstructions and their noise."""
    session = open_session(autoencoder / "model.onnx")
    for batch in images:
        yield from (batch, *session.run([contract.RECONSTRUCTION, noise_source], {contract.IMAGE: batch}))


def scorer_inputs(spec: GuardSpec, splits: Splits, stages: dict[str, Path]) -> dict[str, Any]:
    fields = {"release", "target_fpr", "seed", "natural_noise_sd", "noise_levels", "fusion", "data", "detectors", "memory"}
    chosen = json.loads(spec.model_dump_json(include=fields))
    return {**chosen, "files": splits.digest, **{stage: folder.name for stage, folder in stages.items()}}


def fit(spec: GuardSpec, stages: dict[str, Path], exact: Path, splits: Splits, folder: Path) -> None:
    """Fit the scorer on what the stages answer; the head is that of the ``exact`` classifier stage, in fp32."""
    run = StageRunner.of(spec, open_stages(spec, stages))
    head = read_head(exact / "model.onnx", splits.fit[:BATCH].floats()) if spec.needs_head else NO_HEAD
    fit_scorer(spec, run, splits, head).save(folder / "scorer.npz")


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
    """Write ``figures.json`` and the clean report images' labels."""
    run = StageRunner.of(spec, open_stages(spec, stages))
    result, labels = measured(spec, run, scorer, splits, attacked)
    np.save(folder / "labels.npy", labels)
    (folder / "figures.json").write_text(json.dumps(result, indent=2))


def measured(
    spec: GuardSpec, run: StageRunner, scorer: Scorer, splits: Splits, attacked: Path | None
) -> tuple[dict[str, Any], npt.NDArray[np.int64]]:
    """Ask the stages about clean, noisy and attacked report images.

    Args:
        attacked: folder of :func:`attack_report`; None where there is none

    Returns:
        figures, and the clean images' labels int64 [n]
    """
    report = splits.report
    clean = ask_guard(run, scorer, (batch.floats() for batch in report.batches()), len(report), "clean images")
    noisy = ask_guard(run, scorer, natural(report, spec.natural_noise_sd, spec.seed + 2), len(report), "noisy images")
    result = figures.clean_figures(clean, noisy, report.labels, spec.target_fpr)
    result["attacks"] = {}
    for name in json.loads((attacked / "names.json").read_text()) if attacked else ():
        sent = attacks.AttackedImages.load(Path(str(attacked), f"{name}.npz"))
        answers = ask_guard(run, scorer, in_batches(sent.pixels), len(sent.pixels), name)
        result["attacks"][name] = figures.attack_figures(clean, answers, sent.succeeded(answers.labels))
    return result, clean.labels


def summary(measured: dict[str, Any], agreement: float, size: float, seconds: float) -> dict[str, float]:
    """A row of the manifest's ``precisions``.

    Args:
        agreement: share of clean images labelled as in fp32
        size: of the stages, in megabytes
        seconds: that building them took
    """
    attacks = measured["attacks"].values()
    means = {key: float(np.mean([attack[key] for attack in attacks])) for key in ("auroc", "tpr_at_1pct")}
    return {"label_agreement": agreement, **means, "megabytes": size, "build_seconds": seconds}


def megabytes(folders: Iterable[Path]) -> float:
    """Size of what the runtime loads: the plans where there are any, else the graphs with their external data."""
    loaded = [list(folder.glob("*.plan")) or list(folder.glob("model.onnx*")) for folder in folders]
    return sum(path.stat().st_size for paths in loaded for path in paths) / 1e6
