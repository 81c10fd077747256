"""A guard's specification -> a guard in a model repository: the steps, in order, resumable."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import noisec
from noisec import contract, manifest
from noisec.builders import datasets, sanity
from noisec.builders.amplified import DEPTHS, amplify, with_amplified_passes
from noisec.builders.audit.guard import audit_problems, audit_protected, said
from noisec.builders.card import write_card
from noisec.builders.copies import with_copies
from noisec.builders.engine import compute_capability, find_tensorrt
from noisec.builders.export import AutoencoderStage, export_difference, export_stage, noise_offset
from noisec.builders.hardened import HARDENED, export_copy, train_copy
from noisec.builders.images import Splits
from noisec.builders.networks import DENOISERS
from noisec.builders.progress import console
from noisec.builders.protect import Protected, protect, training_inputs
from noisec.builders.repository import Widths, write_repository
from noisec.builders.spec import GuardSpec, Stage, depended_on
from noisec.builders.torchgraph import TorchGraph
from noisec.builders.train import DEVICE, load_network, train_autoencoder
from noisec.builders.variants import attack_report, make_variants
from noisec.builders.workbench import Workbench
from noisec.errors import NoisecError
from noisec.python_backend.runtimes.tensorrt.names import plan_name

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
        NoisecError: data, classifier or specification is not as it must be, or the repository holds a newer release.
    """
    newest = manifest.releases(repository, spec.name)[-1] if spec.name in manifest.guards(repository) else 0
    if newest > spec.release:
        raise NoisecError(
            f"release is {spec.release}; {repository} holds release {newest} of {spec.name}, whose configuration all of them share: "
            f"set release = {newest + 1}, or give another repository"
        )
    plans = {compute_capability(): plan_name(compute_capability())} if spec.runtime == "tensorrt" and find_tensorrt() else {}
    console.print(f"building {spec.name} release {spec.release} into {repository}")
    bench = Workbench(work)
    splits = datasets.load_splits(spec.data, spec.seed, cache=work / "images", strict=strict)
    protected = protect(spec, splits, bench)
    sanity.refuse(sanity.data_problems(spec, splits, protected), force=force)
    problems, agreement = sanity.stage_problems(spec, splits, protected)
    sanity.refuse(problems, force=force)
    evidence = audit_protected(spec, splits, protected, bench) if spec.audit != "off" else None
    if evidence:
        console.print(f"  {said(evidence, splits.class_names)}")
        sanity.refuse(audit_problems(evidence, splits.class_names), force=force or spec.audit == "warn")
    autoencoder = build_autoencoder(spec, splits, bench, protected.stage)
    exact: dict[Stage, Path] = {"autoencoder": autoencoder, "classifier": protected.stage}
    attacked = attack_report(spec, protected, splits, bench) if report else None
    served, table = make_variants(spec, exact, splits, attacked, bench)
    sanity.refuse(sanity.scorer_problems(served.scorer), force=force)
    sanity.refuse(sanity.precision_problems(served.name, table, spec.runtime), force=force)
    measured = {**served.figures, "label_agreement": agreement} if report else {}
    widths = Widths(splits.shape, protected.classes, protected.features)
    write_repository(repository, spec, widths, splits.class_names, served.stages, served.scorer, plans)
    if report:
        write_card(repository, spec, protected.description, widths, measured, table, said(evidence, splits.class_names) if evidence else "")
    content = {
        "versions": versions(),
        "spec": json.loads(spec.model_dump_json()),
        "trained_on": splits.train.digest,
        "export_difference": json.loads((autoencoder / "difference.json").read_text()),
        **{path.stem: json.loads(path.read_text()) for path in (autoencoder / DEPTHS, autoencoder / HARDENED) if path.is_file()},
        "threshold": float(served.scorer.threshold),
        "classifier": protected.description,
        "attacked": attacked.name if attacked else None,
        "audit": asdict(evidence) if evidence else None,
        "figures": measured,
        "precisions": table,
    }
    manifest.write_manifest(repository, spec.name, spec.release, content)
    return Guard(spec, repository, splits, protected, float(served.scorer.threshold))


def build_autoencoder(spec: GuardSpec, splits: Splits, bench: Workbench, classifier: Path) -> Path:
    """Folder with the autoencoder stage: the denoiser, and the copies of the classifier that detectors ask for.

    Args:
        classifier: folder of the classifier stage, by which a guided denoiser is trained, and which is copied
    """
    loud = amplified_classifiers(spec, splits, bench, classifier) if "amplified" in spec.copies else None
    hardened = hardened_classifier(spec, splits, bench, classifier) if "hardened" in spec.copies else None
    stage = build_denoiser(spec, splits, bench, classifier)
    if loud:
        join = partial(with_amplified_passes, stage, loud)
        stage = bench.step("autoencoder-amplified", {"from": stage.name, "amplified": loud.name}, join)
    if hardened:
        passes: dict[contract.Pass, str] = {"hardened": contract.PENULTIMATE}
        join = partial(with_copies, stage, hardened, passes)
        stage = bench.step("autoencoder-hardened", {"from": stage.name, "hardened": hardened.name}, join)
    return stage


def build_denoiser(spec: GuardSpec, splits: Splits, bench: Workbench, classifier: Path) -> Path:
    """Folder with the autoencoder stage without copies, trained, exported and compared with its network."""
    described = depended_on(spec.autoencoder)
    guided = described.pop("guidance") > 0
    inputs = {**training_inputs(spec, splits), "autoencoder": described}

    def train(folder: Path) -> None:
        classify = TorchGraph(classifier / "model.onnx", DEVICE.type).named if guided else None
        train_autoencoder(spec.autoencoder, splits.train, spec.seed, folder, classify)

    if guided:
        inputs |= {"guidance": spec.autoencoder.guidance, "classifier": classifier.name}
    weights = bench.step("autoencoder", inputs, train)
    offset = noise_offset(spec.classifier.preprocessing) if spec.noise_source == contract.NOISE_INPUT else ()
    stage = AutoencoderStage(load_network(DENOISERS[spec.autoencoder.network](splits.shape), weights), offset)

    def export(folder: Path) -> None:
        export_stage(stage, splits.shape, spec.autoencoder_outputs, folder / "model.onnx")
        difference = export_difference(stage, folder / "model.onnx", splits.fit[:COMPARED].floats())
        (folder / "difference.json").write_text(json.dumps({"autoencoder": difference}))

    return bench.step("autoencoder-stage", {"from": weights.name, "offset": offset}, export)


def amplified_classifiers(spec: GuardSpec, splits: Splits, bench: Workbench, classifier: Path) -> Path:
    """Folder with the classifier stage's amplified copies; nothing has been trained for them."""
    drawn = {"data": str(spec.data), "files": splits.digest, "seed": spec.seed}
    inputs = {"classifier": classifier.name, "passes": contract.AMPLIFIED, **drawn}
    return bench.step("amplified", inputs, lambda folder: amplify(classifier, splits.fit, folder))


def hardened_classifier(spec: GuardSpec, splits: Splits, bench: Workbench, classifier: Path) -> Path:
    """Folder with the classifier stage's hardened copy."""
    settings = spec.hardened
    assert settings is not None
    inputs = {**training_inputs(spec, splits), "classifier": classifier.name, "hardened": depended_on(settings)}
    weights = bench.step("hardened", inputs, lambda folder: train_copy(settings, classifier, splits.train, spec.seed, folder))
    export = partial(export_copy, settings, classifier, weights, splits.fit)
    return bench.step("hardened-stage", {"from": weights.name}, export)


def versions() -> dict[str, str]:
    """Versions of everything that shapes a build."""
    packages = ("torch", "onnx", "onnxruntime", "numpy", "scikit-learn")
    return {"noisec-triton": noisec.__version__, "python": platform.python_version(), **{name: version(name) for name in packages}}
