"""The detection benchmark measures what it says: disjoint sets, two protocols, every detector on the same inputs, nothing done twice."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import GUARD, REPOSITORY

from noisec import contract
from noisec.benchmarks.detection import run
from noisec.benchmarks.detection.panel import ALONE, LEAKED, PUBLISHED
from noisec.benchmarks.detection.run import Benchmark, Plan, Sizes, right_ones, run_benchmark, shuffled_noise
from noisec.benchmarks.detection.subject import Subject
from noisec.builders.images import Splits, cut
from noisec.builders.sources import fashion_mnist
from noisec.builders.spec import ClassifierSpec
from noisec.errors import NoisecError
from noisec.manifest import read_manifest

PLAN = Plan(attacks=("fgsm-0.1",), sizes=Sizes(images=150, laddered=16, queries=10))


@pytest.fixture(scope="module")
def subject(spec, report):
    """The reference guard with the 10,000 images that ship."""
    fit, calibrate = cut(fashion_mnist.load("t10k"), (2000, 500), [7])
    content = read_manifest(REPOSITORY, GUARD)
    splits = Splits(fit[:0], fit, calibrate, report[:1000], tuple(map(str, range(10))))
    return Subject(REPOSITORY, GUARD, content["release"], spec, splits)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module", autouse=True)
def _few_images_for_the_baselines():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "BASELINE_FIT", 600)
        yield


@pytest.fixture(scope="module")
def cells(subject, work):
    return run_benchmark(subject, PLAN, work / "work", work / "out", 0, "noisec bench detection")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(("pgd-x",)), r"attack 'pgd-x': expected pgd-EPS with EPS in \(0, 1\]"),
        (Plan(("cw-0.1",)), "attack 'cw-0.1': expected cw"),
        (Plan((), ("jsma-0.1",)), "no method 'jsma'; there are fgsm, bim"),
        (Plan((), triggers=("badnet",)), "--triggers badnet: no such backdoor; there are badnets"),
        (Plan((), ladder=(0.1, 2.0)), r"--ladder 2.0: an epsilon lies in \(0, 1\]"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(subject, tmp_path, plan, message):
    with pytest.raises(NoisecError, match=message):
        run_benchmark(subject, plan, tmp_path, tmp_path, 0, "")
    assert not list(tmp_path.iterdir())


def test_an_onnx_classifier_is_attacked_without_gradients(spec):
    onnx = ClassifierSpec(onnx="mine.onnx")
    Plan(("square-0.1", "hopskipjump"), ("fgsm-0.1",)).check(onnx)
    with pytest.raises(NoisecError, match="badnets, pgd-0.1 need the classifier's gradients"):
        Plan(("square-0.1", "pgd-0.1"), triggers=("badnets",)).check(onnx)


def test_benign_and_attacked_images_are_disjoint_and_only_right_ones_are_attacked(subject, work):
    benchmark = Benchmark(subject, PLAN, work / "work", 0)
    benign, attacked = ({image.tobytes() for image in images.pixels} for images in (benchmark.benign, benchmark.targets))
    assert len(benign) == len(attacked) == 150
    assert not benign & attacked
    assert (subject.predict(benchmark.targets.floats()).argmax(axis=1) == benchmark.targets.labels).all()
    assert len(right_ones(subject, subject.splits.report)) < len(subject.splits.report)


def test_every_detector_is_measured_under_the_honest_protocol_and_three_under_the_published(cells):
    honest = {cell.detector for cell in cells if cell.protocol == "honest" and cell.attack == "fgsm"}
    assert honest >= {"default", PUBLISHED, "MagNet", *ALONE}
    assert {cell.detector for cell in cells if cell.protocol == "published"} == {"default", PUBLISHED, LEAKED}
    assert {cell.attack for cell in cells} == {"fgsm", "fgsm (successful)"}


def test_the_guards_own_figures_are_as_its_stages_and_scorer_give_them(cells, subject):
    (cell,) = [one for one in cells if (one.detector, one.protocol, one.attack) == ("default", "honest", "fgsm")]
    (won,) = [one for one in cells if (one.detector, one.protocol, one.attack) == ("default", "honest", "fgsm (successful)")]
    assert cell.auroc > 0.98
    assert cell.n_malicious == 150
    assert cell.n_benign == 300, "clean images, and the same with natural noise"
    assert won.n_malicious == round(cell.success * 150)
    assert won.success == 1
    assert cell.joint_success <= 1 - cell.tpr_at_1pct + 0.05
    assert cell.fpr < 0.06


def test_a_mixture_fitted_on_the_tested_images_calls_most_others_unnatural(cells):
    (cell,) = [one for one in cells if one.detector == LEAKED]
    assert cell.n_benign == cell.n_malicious == 100, "whole groups alone"
    assert cell.fpr > 0.3


@pytest.fixture
def without_baselines(monkeypatch):
    """Other papers' detectors take longest; that they repeat themselves is tested on their own."""
    monkeypatch.setattr(run, "baselines", lambda *given, backdoors: {})


def test_a_second_run_takes_finished_parts_from_the_first(cells, subject, work, monkeypatch):
    monkeypatch.setattr(Benchmark, "detectors", lambda self: pytest.fail("fitted again"))
    again = run_benchmark(subject, PLAN, work / "work", work / "again", 0, "")
    assert again == cells
    for name in ("summary.json", "cells.csv", "roc.png"):
        assert (work / "again" / name).read_bytes() == (work / "out" / name).read_bytes()


def test_parts_run_by_themselves_are_put_together(cells, subject, work, monkeypatch):
    for slow in ("gray_box", "query"):
        monkeypatch.setattr(Benchmark, slow, lambda *given: None)
    alone = run_benchmark(subject, replace(PLAN, ladder=(0.05,), attacks=()), work / "work", work / "alone", 0, "")
    monkeypatch.setattr(Benchmark, "adaptive", lambda self, eps: pytest.fail("attacked again"))
    whole = run_benchmark(subject, replace(PLAN, ladder=(0.05,)), work / "work", work / "whole", 0, "")
    assert [cell.access for cell in alone] == ["adaptive"]
    assert whole == [*cells, *alone]


@pytest.mark.usefixtures("without_baselines")
def test_a_part_that_was_interrupted_takes_its_attacks_from_before(cells, subject, work, monkeypatch):
    for folder in (work / "work" / "detection").glob("part-*"):
        shutil.rmtree(folder)
    monkeypatch.setattr(run, "attack", lambda *given: pytest.fail("attacked again"))
    again = run_benchmark(subject, PLAN, work / "work", work / "again", 0, "")
    detectors = {cell.detector for cell in again}
    assert PUBLISHED in detectors
    assert again == [cell for cell in cells if cell.detector in detectors]


@pytest.mark.usefixtures("without_baselines")
def test_further_seeds_repeat_the_white_box_attacks_on_other_images(cells, subject, work):
    both = run_benchmark(subject, PLAN, work / "work", work / "seeds", 0, "", 2)
    known = [cell for cell in cells if cell.detector in {one.detector for one in both}]
    first, second = both[: len(known)], both[len(known) :]
    assert first == known
    assert {cell.seed for cell in second} == {1}
    assert {(cell.detector, cell.attack) for cell in second} == {(cell.detector, cell.attack) for cell in first}
    assert any(one.auroc != other.auroc for one, other in zip(first, second, strict=True))
    assert "±" in (work / "seeds" / "README.md").read_text()


def test_further_seeds_leave_out_what_is_slow_or_no_white_box_attack(subject, work, monkeypatch):
    plan = Plan(attacks=("fgsm-0.1", "cw", "pgd-0.1"), black_box=("fgsm-0.1",), ladder=(0.1,), triggers=("badnets",), sizes=PLAN.sizes)
    attacked = []
    monkeypatch.setattr(Benchmark, "white_box", lambda self, spec, images: attacked.append(spec.name))
    for other in ("replayed", "adaptive", "gray_box", "query", "backdoor"):
        monkeypatch.setattr(Benchmark, other, lambda self, *given: pytest.fail("repeated"))
    Benchmark(subject, plan, work / "none", 1).repeat()
    assert attacked == ["fgsm-0.1", "pgd-0.1"]


def test_without_attacks_on_the_classifier_no_detector_is_fitted_but_the_guards_own(subject, work, monkeypatch):
    monkeypatch.setattr(Benchmark, "detectors", lambda self: pytest.fail("fitted"))
    for slow in ("gray_box", "query"):
        monkeypatch.setattr(Benchmark, slow, lambda *given: None)
    found = run_benchmark(subject, Plan(attacks=(), ladder=(0.1,), sizes=PLAN.sizes), work / "work", work / "ladder", 0, "")
    assert [(cell.detector, cell.access) for cell in found] == [("default", "adaptive")]
    assert "Attackers who know more" in (work / "ladder" / "README.md").read_text()


def test_the_published_protocols_benign_inputs_carry_the_attacks_own_noise(pixels):
    noise = np.sign(pixels - 0.5) * np.float32(0.03)
    attacked = np.clip(pixels * 0.8 + 0.1, 0, 1) + noise
    clean = np.clip(pixels * 0.8 + 0.1, 0, 1)
    mixed = shuffled_noise(clean, attacked, 0) - clean
    assert np.allclose(np.sort(mixed.reshape(len(pixels), -1)), np.sort(noise.reshape(len(pixels), -1)), atol=1e-6)
    assert np.mean(np.abs(mixed - noise) > 1e-6) > 0.2


def test_a_ladder_of_attackers_is_part_of_it(subject, work):
    benchmark = Benchmark(subject, PLAN, work / "work", 0)
    benchmark.adaptive(0.05)
    benchmark.query(0.1, with_score=True)
    adaptive, query = benchmark.cells
    assert (adaptive.access, query.access) == ("adaptive", "query")
    assert query.note == "10 queries, label, verdict and score"
    assert 0 < adaptive.joint_success <= adaptive.success
    assert adaptive.n_malicious == query.n_malicious == 16


def test_every_pass_is_run_whatever_the_guards_own_detectors_need(subject, pixels):
    tensors = subject.tensors(pixels, len(pixels))
    assert {name for one, name in contract.PASSES.items() if one not in contract.COPIES} <= set(tensors)
