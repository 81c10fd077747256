"""A small guard from the user's own images, in one command."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorrt_rtx_bindings as rtx
import torch
import tritonclient.grpc as triton_grpc

from noisec import contract
from noisec.builders import build as building
from noisec.builders import datasets, protect, sanity, train
from noisec.builders.compiling import compile_with
from noisec.builders.export import AutoencoderStage, export_difference, export_stage
from noisec.builders.networks import CLASSIFIERS, DENOISERS
from noisec.builders.recalibrate import check_images, recalibrate, recalibrate_with
from noisec.builders.release import Release
from noisec.builders.repository import read_config, read_plans
from noisec.builders.sources import fashion_mnist
from noisec.builders.spec import DetectorSpec, EngineOptions, read_spec
from noisec.builders.stages import in_process
from noisec.clients import GuardClient
from noisec.contract import STAGES, stage_model
from noisec.errors import NoisecError
from noisec.manifest import read_manifest, releases, verify
from noisec.python_backend.scorer.scoring import Scorer
from noisec.python_backend.server import EmbeddedServer

GUARD = """
name = "mine"
release = 2
target_fpr = 0.05
natural_noise_sd = 0.02

[data]
source = "npz"
path = "images.npz"
class_names = ["a", "b", "c"]
train = 600
fit = 400
calibrate = 200
report = 100

[classifier]
network = "conv3"
epochs = 1

[autoencoder]
network = "unet-small"
epochs = 1

[[detectors]]
view = "noise"
components = 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mine")
    images = fashion_mnist.load("t10k")
    few = images[np.flatnonzero(images.labels < 3)[:1300]]
    np.savez(folder / "images.npz", images=few.pixels[:, 0], labels=few.labels)
    (folder / "guard.toml").write_text(GUARD)
    return folder


@pytest.fixture(scope="module")
def guard(folder):
    return building.build(read_spec(folder / "guard.toml"), folder / "repository", folder / "work")


def test_a_guard_is_built_from_ones_own_images_and_served(guard):
    assert verify(guard.repository, "mine") == []
    with EmbeddedServer(guard.repository) as server, GuardClient(server.grpc_url, "mine") as client:
        verdicts = client.classify(guard.splits.report.pixels)
        assert client.interface.class_names == ("a", "b", "c")
    assert (verdicts.releases == 2).all()
    figures = read_manifest(guard.repository, "mine")["figures"]
    assert np.mean(verdicts.labels == guard.splits.report.labels) == pytest.approx(figures["accuracy"])
    assert verdicts.is_malicious.mean() == pytest.approx(figures["fpr"])


def test_the_published_view_costs_two_classifier_passes(guard):
    config = (guard.repository / "mine" / "config.pbtxt").read_text()
    assert config.count('model_name: "mine_classifier"') == 1
    assert "RECONSTRUCTION" not in config
    made = {output.name for output in onnx.load(Release.newest(guard.repository, "mine").folder("autoencoder") / "model.onnx").graph.output}
    assert made & {*contract.PASSES.values()} == {contract.PASSES["noise"]}


def test_exported_stages_equal_their_networks(guard):
    content = read_manifest(guard.repository, "mine")
    assert content["export_difference"]["autoencoder"] < 1e-4
    assert content["figures"]["label_agreement"] == 1


def test_a_second_run_reuses_every_finished_step_and_says_so(guard, folder, capfd, monkeypatch):
    def never(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(protect, "train_classifier", never)
    monkeypatch.setattr(building, "train_autoencoder", never)
    before = read_manifest(guard.repository, "mine")["files"]
    building.build(guard.spec, guard.repository, folder / "work")
    assert read_manifest(guard.repository, "mine")["files"] == before
    said = capfd.readouterr().err
    for step in ("classifier", "classifier-stage", "autoencoder", "autoencoder-stage", "scorer", "report"):
        assert f"{step}: unchanged, reused" in said


def test_a_changed_rate_repeats_only_the_calibration(guard, folder, capfd):
    building.build(guard.spec.model_copy(update={"target_fpr": 0.1, "release": 3}), guard.repository, folder / "work")
    said = capfd.readouterr().err
    assert "classifier: unchanged" in said
    assert "autoencoder-stage: unchanged" in said
    assert "scorer: done" in said
    content = read_manifest(guard.repository, "mine")
    assert content["release"] == 3
    assert content["threshold"] < read_manifest(guard.repository, "mine", 2)["threshold"]


def test_recalibration_on_the_server_is_a_new_release_beside_the_old(guard, folder, tmp_path):
    copy = Path(shutil.copytree(guard.repository, tmp_path / "repository"))
    last = releases(copy, "mine")[-1]
    with EmbeddedServer(copy, model_control="explicit") as server:
        served = recalibrate(copy, "mine", folder / "work", server.grpc_url)
        server.refresh()
        with triton_grpc.InferenceServerClient(server.grpc_url) as raw:
            for stage in STAGES:
                raw.load_model(stage_model("mine", stage))
            raw.load_model("mine")
        with GuardClient(server.grpc_url, "mine") as client:
            verdicts = client.classify(guard.splits.report.pixels)
    assert served == last + 1
    assert (verdicts.releases == served).all()
    assert verify(copy, "mine") == []
    again = recalibrate(copy, "mine", folder / "work", None)
    assert read_manifest(copy, "mine", again)["threshold"] == pytest.approx(read_manifest(copy, "mine", served)["threshold"], abs=1e-3)
    figures = read_manifest(copy, "mine", served)["figures"]
    assert verdicts.is_malicious.mean() == pytest.approx(figures["fpr"])
    assert (copy / "mine_scorer" / str(last) / "scorer.npz").is_file()
    old = read_manifest(copy, "mine", last)
    assert figures["attacks"].keys() == old["figures"]["attacks"].keys()
    for name, attack in figures["attacks"].items():
        assert attack["auroc"] == pytest.approx(old["figures"]["attacks"][name]["auroc"], abs=0.02)
    assert f"# mine, release {again}" in (copy / "mine" / "README.md").read_text()


def test_a_recalibrated_release_without_the_attacked_images_has_no_attack_figures(guard, tmp_path, capfd):
    copy = Path(shutil.copytree(guard.repository, tmp_path / "repository"))
    release = recalibrate(copy, "mine", tmp_path / "elsewhere", None)
    content = read_manifest(copy, "mine", release)
    assert content["figures"]["attacks"] == {}
    assert content["precisions"] == read_manifest(copy, "mine", release - 1)["precisions"]
    assert "no attacked images in" in capfd.readouterr().err


def test_a_guard_is_not_calibrated_on_images_that_may_have_trained_it(guard, folder, tmp_path, capfd):
    copy = Path(shutil.copytree(guard.repository, tmp_path / "repository"))
    before = folder / "before.npz"
    (folder / "images.npz").rename(before)
    try:
        with np.load(before) as all_of_them:
            np.savez(folder / "images.npz", **{name: np.concatenate([rows, rows[:10]]) for name, rows in all_of_them.items()})
        with pytest.raises(NoisecError, match="were divided anew: some that its networks were trained on may"):
            recalibrate(copy, "mine", tmp_path / "elsewhere", None)
        assert releases(copy, "mine") == releases(guard.repository, "mine")
        assert recalibrate(copy, "mine", tmp_path / "elsewhere", None, new_images=True) == releases(copy, "mine")[-1]
        check_images(None, guard.splits)
        assert "does not say what its networks were trained on" in capfd.readouterr().err
    finally:
        before.rename(folder / "images.npz")
    assert recalibrate(copy, "mine", tmp_path / "elsewhere", None) == releases(copy, "mine")[-1], "on its own images again"


def test_a_compiled_release_stays_compiled_when_it_is_recalibrated(guard, folder, tmp_path):
    copy = Path(shutil.copytree(guard.repository, tmp_path / "repository"))
    release = compile_with(rtx, "9.0", copy, "mine", EngineOptions(optimum=8))
    with pytest.raises(NoisecError, match=f"mine release {release} holds TensorRT plans and this machine has no NVIDIA GPU: .* --url"):
        recalibrate(copy, "mine", folder / "work", None)
    stages = {stage: copy / stage_model("mine", stage) / str(release) for stage in ("autoencoder", "classifier")}
    assert recalibrate_with(in_process(stages), copy, "mine", folder / "work", "the same graphs") == release + 1
    assert read_plans(copy, "mine") == {"9.0": "model_sm90.plan"}
    assert read_config(copy / "mine_classifier").backend == "tensorrt"
    assert (copy / "mine_classifier" / str(release + 1) / "model_sm90.plan").is_file()
    assert verify(copy, "mine") == []


def test_a_release_with_other_tensors_takes_over_from_the_older_ones(guard, folder, tmp_path):
    copy = Path(shutil.copytree(guard.repository, tmp_path / "repository"))
    spec = guard.spec.model_copy(update={"release": 9, "detectors": (DetectorSpec(view="delta"),)})
    building.build(spec, copy, folder / "work", report=False)
    assert verify(copy, "mine") == []
    with EmbeddedServer(copy) as server, GuardClient(server.grpc_url, "mine") as client:
        assert (client.classify(guard.splits.report.pixels[:3]).releases == 9).all()
    with pytest.raises(NoisecError, match="holds release 9 of mine, whose configuration all of them share: set release = 10"):
        building.build(guard.spec, copy, folder / "work", report=False)
    assert verify(copy, "mine") == []


def test_a_size_that_cannot_be_halved_twice_is_padded(tmp_path):
    for name in ("unet", "unet-small", "bottleneck"):
        for shape in ((1, 30, 30), (3, 33, 50)):
            network = DENOISERS[name](shape).eval()
            export_stage(AutoencoderStage(network), shape, contract.AUTOENCODER_OUTPUTS, tmp_path / "model.onnx")
            images = np.random.default_rng(0).random((3, *shape), dtype=np.float32)
            assert export_difference(AutoencoderStage(network), tmp_path / "model.onnx", images) < 1e-4
    with pytest.raises(NoisecError, match="images of 6 x 6 are too small for this network; at least 8 pixels a side"):
        CLASSIFIERS["conv3"]((1, 6, 6), 10)


def test_recalibration_needs_the_release_to_be_served(guard, folder, server):
    with pytest.raises(NoisecError, match=r"release \d of 'mine' is not served there"):
        recalibrate(guard.repository, "mine", folder / "work", server.grpc_url)


def test_interrupted_training_goes_on_from_its_last_epoch(guard, tmp_path, monkeypatch, capfd):
    spec = guard.spec.autoencoder.model_copy(update={"epochs": 3})
    few = guard.splits.train[:128]
    train.train_autoencoder(spec, few, 0, tmp_path)
    uninterrupted = torch.load(tmp_path / train.WEIGHTS, weights_only=True)
    seen = []
    whole = train._batches

    def interrupted(*arguments):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(train, "_batches", interrupted)
    again = tmp_path / "again"
    again.mkdir()
    with pytest.raises(KeyboardInterrupt):
        train.train_autoencoder(spec, few, 0, again)
    train.train_autoencoder(spec, few, 0, again)
    assert len(seen) == 4
    assert "going on after epoch 2" in capfd.readouterr().err
    weights = torch.load(again / train.WEIGHTS, weights_only=True)
    assert all(torch.allclose(weights[name], tensor, atol=1e-6) for name, tensor in uninterrupted.items())
    assert [path.name for path in again.iterdir()] == [train.WEIGHTS]


REFUSED = {
    "too few images": ({"fit": 300}, r"data.fit is 300: 128 penultimate activations at 1 noise levels need at least 342 images"),
    "a missing class": ({}, "1 of 4 classes have no image in the fit set \\(3\\): they would be flagged"),
}


@pytest.mark.parametrize(("sizes", "message"), REFUSED.values(), ids=REFUSED)
def test_a_guard_that_cannot_keep_its_promise_is_refused_unless_forced(guard, folder, capfd, sizes, message):
    spec = guard.spec.model_copy(update={"data": guard.spec.data.model_copy(update=sizes)})
    splits = datasets.load_splits(spec.data, spec.seed, cache=folder / "images")
    protected = dataclasses.replace(guard.protected, classes=3 if sizes else 4)
    problems = sanity.data_problems(spec, splits, protected)
    with pytest.raises(NoisecError, match=message):
        sanity.refuse(problems, force=False)
    sanity.refuse(problems, force=True)
    assert "forced past: " in capfd.readouterr().err


def test_an_export_that_answers_otherwise_is_refused(guard):
    other = dataclasses.replace(guard.protected, original=lambda images: guard.protected.original(1 - images))
    problems, agreement = sanity.stage_problems(guard.spec, guard.splits, other)
    assert agreement < 0.999
    with pytest.raises(NoisecError, match=r"labels [\d.]+ % of 100 images otherwise than the original; at most 0.1 % is rounding"):
        sanity.refuse(problems, force=False)


def test_an_ill_conditioned_mixture_is_refused(guard):
    scorer = Scorer.load(guard.repository / "mine_scorer" / "2" / "scorer.npz")
    assert sanity.scorer_problems(scorer) == []
    scorer.detectors[0].statistics[0].factors[0, 0, 0] *= 1e8
    with pytest.raises(NoisecError, match=r"detector noise-mixture-2: its mixture's covariance has condition .*, at most 1e\+10 will do"):
        sanity.refuse(sanity.scorer_problems(scorer), force=False)


def test_an_interrupted_step_is_not_taken_for_a_finished_one(tmp_path):
    from noisec.builders.workbench import Workbench

    bench, runs = Workbench(tmp_path), []

    def make(folder: Path) -> None:
        runs.append(folder)
        (folder / "half").write_text("")
        if len(runs) == 1:
            raise KeyboardInterrupt
        (folder / "whole").write_text("")

    with pytest.raises(KeyboardInterrupt):
        bench.step("train", {"epochs": 1}, make)
    done = bench.step("train", {"epochs": 1}, make)
    assert sorted(path.name for path in done.iterdir()) == ["half", "step.json", "whole"]
    assert bench.step("train", {"epochs": 1}, make) == done
    assert bench.step("train", {"epochs": 2}, make) != done
    assert len(runs) == 3


def test_a_step_that_two_ask_for_at_once_is_made_once(tmp_path):
    from noisec.builders.workbench import Workbench

    runs, begun = [], threading.Event()

    def make(folder: Path) -> None:
        runs.append(folder)
        begun.set()
        time.sleep(0.5)
        (folder / "whole").touch()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(Workbench(tmp_path).step, "train", {"epochs": 1}, make)
        assert begun.wait(10)
        second = pool.submit(Workbench(tmp_path).step, "train", {"epochs": 1}, make)
        assert first.result() == second.result()
    assert len(runs) == 1
    assert (first.result() / "whole").is_file()


def test_an_interrupted_step_leaves_nothing_to_another_one_of_its_kind(tmp_path):
    from noisec.builders.workbench import Workbench

    bench = Workbench(tmp_path)

    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.step("pgd-0.1", {"eps": 0.1}, interrupted)
    done = bench.step("pgd-0.05", {"eps": 0.05}, lambda folder: (folder / "whole").touch())
    assert sorted(path.name for path in done.iterdir()) == ["step.json", "whole"]


def test_the_manifest_tells_what_the_guard_is_made_of(guard):
    content = read_manifest(guard.repository, "mine", 2)
    assert content["spec"]["detectors"] == [{"kind": "mixture", "view": "noise", "components": 2, "temperature": 1.0}]
    assert {"torch", "onnxruntime", "numpy", "noisec-triton"} <= set(content["versions"])
    assert content["figures"]["attacks"]["pgd-0.1"].keys() >= {"success", "flagged", "auroc", "tpr_at_1pct"}
    json.dumps(content, allow_nan=False)
