"""What is published: only what was built, whole or not at all, and only what a server will load."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import GUARD, REPOSITORY

from noisec import contract
from noisec.builders.calibrate import fit_tensors
from noisec.builders.images import natural
from noisec.builders.layout import rearrange
from noisec.builders.recalibrate import refuse_other_stages
from noisec.builders.release import Release
from noisec.builders.repository import network_config, read_widths, served_versions
from noisec.builders.spec import EngineOptions, ServingSpec, changed
from noisec.builders.stages import StageRunner, in_process
from noisec.contract import stage_model
from noisec.errors import NoisecError
from noisec.manifest import verify, verify_repository
from noisec.python_backend.scorer.scoring import Scorer


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(REPOSITORY, tmp_path / "repository"))


@pytest.fixture(scope="module")
def release():
    return Release.newest(REPOSITORY, GUARD)


def test_nothing_is_made_of_files_that_were_changed_since_the_build(copy):
    path = copy / stage_model(GUARD, "scorer") / "1" / "scorer.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **{**arrays, "calibration": np.full_like(arrays["calibration"], 1e30)})  # nothing would be malicious any more
    with pytest.raises(NoisecError, match=r"not as it was built; build it again\n.*scorer.npz: changed since the build"):
        Release.newest(copy, GUARD)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(NoisecError, match="scorer.npz: changed since the build"):
        rearrange(copy, GUARD, ServingSpec(layout="single"), copy)


def test_a_disk_that_is_full_leaves_the_release_as_it_was(copy, release, monkeypatch, tmp_path):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}

    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Scorer, "save", full)
    for target in (copy, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            rearrange(copy, GUARD, release.spec.serving, target)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert verify_repository(copy) == []
    assert not (tmp_path / "new").exists()


def test_what_a_killed_build_left_goes_with_the_next(copy, release):
    left = copy / GUARD / ".noisec-killed" / "new"
    left.mkdir(parents=True)
    (left / "model.onnx").touch()
    assert verify(copy, GUARD) == [], "no server looks there"
    rearrange(copy, GUARD, release.spec.serving, copy)
    assert verify(copy, GUARD) == []
    assert not list((copy / GUARD).glob(".noisec-*"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("of", ["fit", "calibration"])
def test_clean_images_without_a_finite_answer_set_no_threshold(release, report, of, value):
    run = StageRunner.of(release.spec, in_process(release.stages))
    tensors = {name: run(natural(report[rows], 0.02, 0), 300) for name, rows in (("fit", slice(0, 300)), ("calibration", slice(300, 600)))}
    tensors[of][contract.PASSES["image"]][7] = value
    with pytest.raises(NoisecError, match=f"1 of 300 {of} images have .* not finite, the first is image 7: .* stage_precision to 'fp32'"):
        fit_tensors(release.spec, tensors["fit"], tensors["calibration"], release.scorer.head)


def test_releases_with_other_plans_or_for_other_batches_are_not_served_together(copy, release):
    widths, _ = read_widths(copy, GUARD)
    model = copy / stage_model(GUARD, "classifier")
    spec = changed(release.spec, runtime="tensorrt", tensorrt=EngineOptions())
    plans = {"9.0": "model_sm90.plan"}
    (model / "config.pbtxt").write_text(str(network_config(spec, "classifier", widths, plans)))

    def served(plans, **serving):
        other = changed(spec, serving=ServingSpec(**serving))
        return served_versions(model, network_config(other, "classifier", widths, plans), 2)

    assert served(plans).WhichOneof("policy_choice") == "all"
    assert list(served({"8.9": "model_sm89.plan"}).specific.versions) == [2]
    assert list(served(plans, max_batch_size=128).specific.versions) == [2]


def test_a_server_with_another_build_is_not_calibrated_on(release, report):
    pixels = report[:32].floats()
    own = in_process(release.stages)
    refuse_other_stages(own, release.stages, pixels)

    for stage, output in (("autoencoder", contract.NOISE), ("classifier", contract.PENULTIMATE)):

        def other(stage, images, names, spoiled=output):
            return {name: rows * (1.3 if name == spoiled else 1) for name, rows in own(stage, images, names).items()}

        with pytest.raises(NoisecError, match=f"{stage}: {output} differs by 30 % .* the server has another build loaded; restart it"):
            refuse_other_stages(other, release.stages, pixels)
