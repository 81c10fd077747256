"""Refit a guard's scorer on what its serving stages answer, and publish that as a new release."""

from __future__ import annotations

import json
from pathlib import Path

from noisec import manifest
from noisec.builders import datasets, figures
from noisec.builders.calibrate import fit_scorer
from noisec.builders.images import natural
from noisec.builders.progress import console
from noisec.builders.repository import passes_needed, read_plans, read_widths, write_repository
from noisec.builders.spec import GuardSpec
from noisec.builders.stages import Infer, StageRunner, ask_guard, in_process, served
from noisec.contract import stage_model
from noisec.errors import NoisecError


def recalibrate(repository: Path, guard: str, work: Path, url: str | None) -> int:
    """Run the fit, calibration and report images through the guard's network stages, refit the scorer, and write the next release.

    The stages are copied as they are. Earlier releases stay; the ensemble answers with the new one when the server loads it.

    Args:
        work: folder for decoded images
        url: gRPC address of a server that serves the repository's latest release; None runs its ONNX stages in this process

    Returns:
        the new release's number

    Raises:
        NoisecError: the guard is not there, its data is not, the server serves another release, or the release holds TensorRT plans,
            which only a server can run, and there is no ``url``.
    """
    release = manifest.releases(repository, guard)[-1]
    if url is None and read_plans(repository, guard):
        raise NoisecError(
            f"{guard} release {release} holds TensorRT plans: serve it and give --url, so that the plans themselves are asked"
        )
    stages = {stage: repository / stage_model(guard, stage) / str(release) for stage in ("autoencoder", "classifier")}
    return recalibrate_with(served(url, guard, release) if url else in_process(stages), repository, guard, work, url or "stages in process")


def recalibrate_with(infer: Infer, repository: Path, guard: str, work: Path, asked: str) -> int:
    """The same with given stages; ``asked`` says in the manifest which. Stages that are TensorRT plans stay TensorRT plans."""
    old = manifest.read_manifest(repository, guard)
    spec = GuardSpec.model_validate(old["spec"])
    new = spec.model_copy(update={"release": old["release"] + 1})
    splits = datasets.load_splits(spec.data, spec.seed, cache=work / "images")
    stages = {stage: repository / stage_model(guard, stage) / str(old["release"]) for stage in ("autoencoder", "classifier")}
    run = StageRunner(infer, passes_needed(spec), spec.noise_source)
    scorer = fit_scorer(new, run, splits)
    clean = ask_guard(run, scorer, (batch.floats() for batch in splits.report.batches()), len(splits.report), "clean images")
    noisy = ask_guard(run, scorer, natural(splits.report, spec.natural_noise_sd, spec.seed + 2), len(splits.report), "noisy images")
    measured = figures.clean_figures(clean, noisy, splits.report.labels, spec.target_fpr)
    widths, names = read_widths(repository, guard)
    write_repository(repository, new, widths, names, stages, scorer, read_plans(repository, guard))
    content = {key: old[key] for key in ("versions", "export_difference", "precisions")}
    manifest.write_manifest(
        repository,
        guard,
        new.release,
        {
            **content,
            "spec": json.loads(new.model_dump_json()),
            "threshold": float(scorer.threshold),
            "figures": measured,
            "recalibrated": {"from": old["release"], "on": asked, "attacks_measured_on_release": old["release"]},
        },
    )
    shown = ", ".join(f"{key} {measured[key]:.4f}" for key in ("accuracy", "fpr", "fpr_natural_noise"))
    console.print(f"{guard}: release {new.release} from release {old['release']}; {shown}")
    return new.release
