"""Refit a guard's scorer on what its serving stages answer, and publish that as a new release."""

from __future__ import annotations

import json
from pathlib import Path

from noisec import contract, manifest
from noisec.builders import datasets, figures
from noisec.builders.calibrate import fit_scorer
from noisec.builders.images import natural
from noisec.builders.progress import console
from noisec.builders.repository import Widths, passes_needed, write_repository
from noisec.builders.spec import GuardSpec
from noisec.builders.stages import StageRunner, ask_guard, in_process, served
from noisec.contract import stage_model


def recalibrate(repository: Path, guard: str, work: Path, url: str | None) -> int:
    """Run the fit, calibration and report images through the guard's network stages, refit the scorer, and write the next release.

    The stages are copied as they are. Earlier releases stay; the ensemble answers with the new one when the server loads it.

    Args:
        work: folder for decoded images
        url: gRPC address of a server that serves the repository's latest release; None runs its ONNX stages in this process

    Returns:
        the new release's number

    Raises:
        NoisecError: the guard is not there, its data is not, or the server serves another release.
    """
    old = manifest.read_manifest(repository, guard)
    spec = GuardSpec.model_validate(old["spec"])
    new = spec.model_copy(update={"release": old["release"] + 1})
    splits = datasets.load_splits(spec.data, spec.seed, cache=work / "images")
    stages = {stage: repository / stage_model(guard, stage) / str(old["release"]) for stage in ("autoencoder", "classifier")}
    run = StageRunner(served(url, guard, old["release"]) if url else in_process(stages), passes_needed(spec), spec.noise_source)
    scorer = fit_scorer(new, run, splits)
    clean = ask_guard(run, scorer, (batch.floats() for batch in splits.report.batches()), len(splits.report), "clean images")
    noisy = ask_guard(run, scorer, natural(splits.report, spec.natural_noise_sd, spec.seed + 2), len(splits.report), "noisy images")
    measured = figures.clean_figures(clean, noisy, splits.report.labels, spec.target_fpr)
    sample = run(iter([splits.report[:1].floats()]), 1)
    widths = Widths(splits.shape, sample[contract.LOGITS].shape[1], sample[contract.PASSES["image"]].shape[1])
    write_repository(repository, new, widths, splits.class_names, stages, scorer)
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
            "recalibrated": {"from": old["release"], "on": url or "stages in process", "attacks_measured_on_release": old["release"]},
        },
    )
    shown = ", ".join(f"{key} {measured[key]:.4f}" for key in ("accuracy", "fpr", "fpr_natural_noise"))
    console.print(f"{guard}: release {new.release} from release {old['release']}; {shown}")
    return new.release
