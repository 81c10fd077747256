"""A guard's specification -> a guard in a model repository: the steps, in order, resumable."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from noisec.builders import attacks, datasets, figures
from noisec.builders.calibrate import StageRunner, fit_scorer
from noisec.builders.card import write_card
from noisec.builders.datasets import Splits
from noisec.builders.export import AutoencoderStage, export_difference, export_stage
from noisec.builders.networks import CLASSIFIERS, DENOISERS
from noisec.builders.progress import console
from noisec.builders.repository import Widths, passes_needed, write_repository
from noisec.builders.spec import GuardSpec
from noisec.builders.train import train_autoencoder, train_classifier
from noisec.builders.workbench import Workbench
from noisec.python_backend.scorer.scoring import Scorer
from torch import nn

import noisec
from noisec import contract, manifest

WEIGHTS = "weights.pt"
ONNX_STAGES = {
    "autoencoder": (contract.NOISE, contract.RECONSTRUCTION, contract.NOISE_LEVEL, contract.IN_RANGE),
    "classifier": (contract.LOGITS, contract.PENULTIMATE),
}
COMPARED = 256
"""images on which an exported stage is compared with its network"""


@dataclass(frozen=True)
class Guard:
    """A finished build."""

    spec: GuardSpec
    repository: Path
    splits: Splits
    classifier: nn.Module
    threshold: float
    """score above which an input is malicious"""


def build(spec: GuardSpec, repository: Path, work: Path, *, report: bool = True) -> Guard:
    """Build a guard and put it into a model repository.

    Args:
        repository: model repository; made where it is missing; other guards and releases in it stay
        work: folder for finished steps, so that a re-run reuses them
        report: attack the report images and write figures and card; the demo measures over gRPC instead

    Raises:
        NoisecError: data, specification or an exported stage is not as it must be.
    """
    console.print(f"building [bold]{spec.name}[/] release {spec.release} into {repository}")
    splits = datasets.load_splits(spec.data, spec.seed)
    bench = Workbench(work)
    classifier_folder, autoencoder_folder = train_networks(spec, splits, bench)
    classifier = load_network(CLASSIFIERS[spec.classifier.network](splits.shape, len(splits.class_names)), classifier_folder)
    autoencoder = load_network(DENOISERS[spec.autoencoder.network](splits.shape), autoencoder_folder)
    stages = {"autoencoder": AutoencoderStage(autoencoder), "classifier": classifier}
    exported = bench.step(
        "export",
        {"classifier": classifier_folder.name, "autoencoder": autoencoder_folder.name},
        lambda folder: export(stages, splits, folder),
    )
    onnx = {stage: exported / f"{stage}.onnx" for stage in stages}
    fitted = bench.step("scorer", scorer_inputs(spec, exported), lambda folder: fit(spec, onnx, splits, folder))
    scorer = Scorer.load(fitted / "scorer.npz")
    measured: dict[str, Any] = {}
    if report:
        reported = bench.step(
            "report",
            {"scorer": fitted.name, "backdoor": spec.classifier.backdoor},
            lambda folder: measure(spec, onnx, scorer, classifier, splits, folder),
        )
        measured = json.loads((reported / "figures.json").read_text())
    write_repository(repository, spec, widths(classifier, splits), splits.class_names, onnx, scorer)
    if report:
        write_card(repository, spec, measured, len(splits.class_names))
    content = {
        "versions": versions(),
        "spec": spec.model_dump(mode="json"),
        "export_difference": json.loads((exported / "differences.json").read_text()),
        "threshold": float(scorer.threshold),
        "figures": measured,
    }
    manifest.write_manifest(repository, spec.name, spec.release, content)
    return Guard(spec, repository, splits, classifier, float(scorer.threshold))


def train_networks(spec: GuardSpec, splits: Splits, bench: Workbench) -> tuple[Path, Path]:
    """Folders with the trained weights of classifier and autoencoder."""
    data = {"data": spec.data.model_dump(mode="json"), "seed": spec.seed, "torch": torch.__version__}

    def classifier(folder: Path) -> None:
        network = train_classifier(spec.classifier, splits.train, len(splits.class_names), spec.seed)
        torch.save(network.state_dict(), folder / WEIGHTS)

    def autoencoder(folder: Path) -> None:
        torch.save(train_autoencoder(spec.autoencoder, splits.train, spec.seed).state_dict(), folder / WEIGHTS)

    return (
        bench.step("classifier", {**data, "classifier": spec.classifier.model_dump(mode="json")}, classifier),
        bench.step("autoencoder", {**data, "autoencoder": spec.autoencoder.model_dump(mode="json")}, autoencoder),
    )


def load_network(network: nn.Module, folder: Path) -> nn.Module:
    """The network with its trained weights, in evaluation mode."""
    network.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True))
    return network.eval()


def export(stages: dict[str, nn.Module], splits: Splits, folder: Path) -> None:
    """Export each network stage and compare it with its network."""
    images = splits.fit[:COMPARED].floats()
    differences = {}
    for stage, network in stages.items():
        path = folder / f"{stage}.onnx"
        export_stage(network, splits.shape, ONNX_STAGES[stage], path)
        differences[stage] = export_difference(network, path, images)
    (folder / "differences.json").write_text(json.dumps(differences))


def scorer_inputs(spec: GuardSpec, exported: Path) -> dict[str, Any]:
    fields = {"release", "target_fpr", "seed", "natural_noise_sd", "noise_levels", "data", "detectors"}
    return {"export": exported.name, **spec.model_dump(mode="json", include=fields)}


def fit(spec: GuardSpec, onnx: dict[str, Path], splits: Splits, folder: Path) -> None:
    fit_scorer(spec, StageRunner(onnx, passes_needed(spec)), splits).save(folder / "scorer.npz")


def measure(spec: GuardSpec, onnx: dict[str, Path], scorer: Scorer, classifier: nn.Module, splits: Splits, folder: Path) -> None:
    """Attack the report images and write ``figures.json``."""
    run = StageRunner(onnx, passes_needed(spec))

    def ask(images: figures.Floats, title: str) -> figures.Answers:
        tensors = run(images, title)
        verdict = scorer.verdict(tensors)
        return figures.Answers(tensors[contract.LOGITS].argmax(axis=1), verdict.score, verdict.is_malicious)

    clean = ask(splits.report.floats(), "clean images")
    noisy = ask(attacks.noisy_clean(splits.report, spec.natural_noise_sd, spec.seed + 2), "noisy images")
    result = figures.clean_figures(clean, noisy, splits.report.labels, spec.target_fpr)
    result["attacks"] = {}
    for name, attacked in attacks.attack_all(
        classifier, splits.report, attacks.DEFAULT_ATTACKS, spec.classifier.backdoor, spec.seed
    ).items():
        answers = ask(attacked.pixels, name)
        result["attacks"][name] = figures.attack_figures(clean, answers, attacked.succeeded(answers.labels))
    (folder / "figures.json").write_text(json.dumps(result, indent=2))


def widths(classifier: nn.Module, splits: Splits) -> Widths:
    with torch.no_grad():
        logits, penultimate = classifier(torch.zeros(1, *splits.shape))
    return Widths(splits.shape, logits.shape[1], penultimate.shape[1])


def versions() -> dict[str, str]:
    """Versions of everything that shapes a build."""
    packages = ("torch", "onnx", "onnxruntime", "numpy", "scikit-learn")
    return {"noisec-triton": noisec.__version__, "python": platform.python_version(), **{name: version(name) for name in packages}}
