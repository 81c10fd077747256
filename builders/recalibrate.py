"""Refit a guard's scorer on what its serving stages answer, and publish that as a new release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from noisec import manifest
from noisec.builders import datasets, sanity
from noisec.builders.audit.evidence import Evidence
from noisec.builders.audit.guard import said
from noisec.builders.calibrate import fit_scorer
from noisec.builders.card import write_card
from noisec.builders.engine import gpus
from noisec.builders.figures import PrecisionTable
from noisec.builders.images import Floats, Splits
from noisec.builders.progress import console
from noisec.builders.release import Release
from noisec.builders.repository import read_plans, read_widths, write_repository
from noisec.builders.stages import Infer, StageRunner, in_process, served
from noisec.builders.variants import measured, megabytes, name_of, open_stages, summary
from noisec.contract import CLASSIFIER_OUTPUTS, LOGITS, NOISE
from noisec.errors import NoisecError

COMPARED = 64
"""images on which the stages that are asked are compared with the repository's"""
MAX_DIFFERENCE = 0.25
"""how far the same stage's answer in another runtime may lie from its own, as root mean square, relative to the answer's: the noises of two
trainings of one denoiser differ by half of it"""


def recalibrate(repository: Path, guard: str, work: Path, url: str | None, *, force: bool = False, new_images: bool = False) -> int:
    """Run the fit, calibration and report images through the guard's network stages, refit the scorer, and write the next release.

    The stages are copied as they are. Earlier releases stay; the ensemble answers with the new one when the server loads it.

    Args:
        work: the guard's folder of `noisec build`: decoded images, and the attacked images that the new figures are measured on; where
            these are not there, the release has no attack figures
        url: gRPC address of a server that serves the repository's latest release; None runs its stages in this process, TensorRT plans on
            this machine's GPU
        force: write the release in spite of what it loses against fp32
        new_images: all images are new to the guard's networks

    Returns:
        the new release's number

    Raises:
        NoisecError: the guard is not there, its data is not, the server serves another release, or the release holds TensorRT plans,
            there is no ``url`` and this machine cannot run them; or the data are other images than it was built with, and not
            ``new_images``.
    """
    found = Release.newest(repository, guard)
    if url is None and found.spec.runtime == "tensorrt" and not gpus():
        raise NoisecError(
            f"{guard} release {found.release} holds TensorRT plans and this machine has no NVIDIA GPU: serve it and give --url, "
            "so that the plans themselves are asked"
        )
    infer = served(url, guard, found.release) if url else open_stages(found.spec, found.stages)
    return recalibrate_with(infer, repository, guard, work, url or "stages in process", force=force, new_images=new_images)


def recalibrate_with(
    infer: Infer, repository: Path, guard: str, work: Path, asked: str, *, force: bool = False, new_images: bool = False
) -> int:
    """The same with given stages; ``asked`` says in the manifest which. Stages that are TensorRT plans stay TensorRT plans."""
    former, old = Release.newest(repository, guard), manifest.read_manifest(repository, guard)
    spec, stages = former.spec, former.stages
    new = spec.model_copy(update={"release": old["release"] + 1})
    splits = datasets.load_splits(spec.data, spec.seed, cache=work / "images")
    if not new_images:
        check_images(old.get("trained_on"), splits)
    refuse_other_stages(infer, stages, splits.report[:COMPARED].floats())
    run = StageRunner.of(spec, infer)
    scorer = fit_scorer(new, run, splits, former.scorer.head)
    sanity.refuse(sanity.scorer_problems(scorer), force=force)
    attacked = work / str(old["attacked"])
    figures, labels = measured(new, run, scorer, splits, attacked if attacked.is_dir() else None)
    table: PrecisionTable = old["precisions"]
    if figures["attacks"]:
        precision = name_of({stage: spec.precision_of(stage) for stage in ("autoencoder", "classifier")})
        seconds = sum(old["compiled"]["seconds"].values()) if "compiled" in old else 0.0
        row = summary(figures, agreement_with_graph(stages, splits, labels), megabytes(stages.values()), seconds)
        table = {**table, precision: {**table.get(precision, {}), spec.runtime: row}}
        sanity.refuse(sanity.precision_problems(precision, table, spec.runtime), force=force)
    widths, names = read_widths(repository, guard)
    audited = said(Evidence.of(old["audit"]), names) if old.get("audit") else ""
    write_repository(repository, new, widths, names, stages, scorer, read_plans(repository, guard))
    write_card(repository, new, old["classifier"], widths, figures, table, audited)
    described = ("versions", "trained_on", "export_difference", "amplified", "hardened", "classifier", "attacked", "audit", "compiled")
    kept: dict[str, Any] = {key: old[key] for key in described if key in old}
    content: dict[str, Any] = {
        **kept,
        "spec": json.loads(new.model_dump_json()),
        "threshold": float(scorer.threshold),
        "figures": figures,
        "precisions": table,
        "recalibrated": {"from": old["release"], "on": asked},
    }
    manifest.write_manifest(repository, guard, new.release, content)
    shown = ", ".join(f"{key} {figures[key]:.4f}" for key in ("accuracy", "fpr", "fpr_natural_noise"))
    console.print(f"{guard}: release {new.release} from release {old['release']}; {shown}")
    if not figures["attacks"]:
        console.print(f"  no attacked images in {work}: the card has no attack figures; --work names the folder of `noisec build`")
    return new.release


def check_images(trained_on: str | None, splits: Splits) -> None:
    """Refuse images that the guard's networks may have been trained on: other ones than it was built with are divided anew.

    Args:
        trained_on: digest of the images that they were trained on; None in a release that does not say

    Raises:
        NoisecError: the training images are others now.
    """
    if trained_on is None:
        console.print(
            "  this release does not say what its networks were trained on: make sure that none of it calibrates it", style="yellow"
        )
    elif trained_on != splits.train.digest:
        raise NoisecError(
            "the data are not the images that this guard was built with, so that they were divided anew: some that its networks were "
            "trained on may now calibrate it, and its false-positive rate would not hold; --new-images says that all of them are new to it"
        )


def refuse_other_stages(infer: Infer, stages: dict[str, Path], images: Floats) -> None:
    """Refuse stages that are not the repository's, as a server has that was started before the guard was built again.

    Args:
        infer: the stages that are asked
        stages: network stage -> folder with the graph that it should have
        images: float32 [n, C, H, W]

    Raises:
        NoisecError: they answer something else than these graphs in ONNX Runtime.
    """
    ask = in_process(stages)
    for stage, names in (("autoencoder", [NOISE]), ("classifier", list(CLASSIFIER_OUTPUTS))):
        own, found = ask(stage, images, names), infer(stage, images, names)
        for name in names:
            difference = float(np.linalg.norm(found[name] - own[name]) / np.linalg.norm(own[name]))
            if not difference <= MAX_DIFFERENCE:
                raise NoisecError(
                    f"{stage}: {name} differs by {100 * difference:.0f} % from what the repository's own graph answers, at most "
                    f"{100 * MAX_DIFFERENCE:.0f} % is rounding: the server has another build loaded; restart it"
                )


def agreement_with_graph(stages: dict[str, Path], splits: Splits, labels: Any) -> float:
    """Share of the report images that the serving stages label as the release's own graph does in ONNX Runtime.

    Args:
        labels: int64 [n], what the serving stages said
    """
    ask = in_process(stages)
    own = [ask("classifier", batch.floats(), [LOGITS])[LOGITS].argmax(axis=1) for batch in splits.report.batches()]
    return float(np.mean(np.concatenate(own) == labels))
