"""The audit benchmark measures what it says: thresholds from classifiers that are not reported, failed backdoors named and left out."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from noisec.benchmarks.audit import run, zoo
from noisec.benchmarks.audit.families import FAMILIES
from noisec.benchmarks.audit.report import BEFORE, KEYS, goals, ratio
from noisec.benchmarks.audit.run import Methods, Plan, check_plan, judged_at, run_benchmark
from noisec.benchmarks.audit.zoo import CALIBRATION_SEED, CLEAN, FEW, UNBALANCED, Data, Recipe, Zoo, augmented
from noisec.builders.audit.ban import AuditSettings
from noisec.builders.audit.baselines import DecouplingSettings
from noisec.builders.audit.masks import SplitNetwork
from noisec.builders.audit.repair import RepairSettings
from noisec.builders.images import cut
from noisec.builders.networks import conv_block
from noisec.builders.sources import fashion_mnist
from noisec.builders.workbench import Workbench
from noisec.cli import app
from noisec.errors import NoisecError

QUICK = AuditSettings(samples=80, steps=2, mask_epochs=1, repeats=1, shared=4)
METHODS = Methods(
    QUICK, replace(QUICK, features="complement"), DecouplingSettings(samples=80, mask_epochs=1, epochs=1), repair=RepairSettings(epochs=1)
)
PLAN = Plan(
    families=("tiny",),
    attacks=("badnets", "bpp"),
    hard=(FEW, UNBALANCED),
    clean=1,
    backdoored=1,
    calibration=3,
    epochs=4,
    cleansed=(),
    methods=METHODS,
)


def tiny(shape, classes):
    return torch.nn.Sequential(
        conv_block(shape[0], 8, 1), torch.nn.MaxPool2d(4), conv_block(8, 16, 1),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, classes),
    )  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Data:
    return Data("shipped", *cut(fashion_mnist.load("t10k"), (2000, 300, 300), [0]))


@pytest.fixture(scope="module", autouse=True)
def _tiny_family():
    """One small family; the rounding trigger poisons next to nothing, so that it does not take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "tiny", tiny)
        patch.setitem(zoo.SHARES, "bpp", 0.001)
        patch.setitem(zoo.SHARES, "badnets", 0.5)
        patch.setattr(run, "RATES", (0.01, 0.02))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("audit")


@pytest.fixture(scope="module")
def found(data, folder):
    return run_benchmark(PLAN, folder / "work", folder / "out", "noisec bench audit", data)


@pytest.fixture(scope="module")
def rows(found, folder):
    return json.loads((folder / "out" / "summary.json").read_text())


def test_rows_have_exactly_the_keys_that_were_agreed(found, rows):
    for row in rows:
        assert tuple(row) == (*KEYS, *(BEFORE if row["method"].startswith("repair") else ()))
    assert {row["method"] for row in rows} == {*run.COMPARED, "ban-chance", "ban-published", "bti-dbf", "repair", "repair-published"}
    repaired = [row for row in rows if row["method"] == "repair"]
    assert [row["attack"] for row in repaired] == ["badnets"]
    assert repaired[0]["attack_success_before"] >= zoo.TOOK
    assert repaired[0]["learning_rate"] in run.RATES
    audited = next(evidence["ban"] for model, evidence in found[0].judged if run.is_repaired(model.recipe))
    assert repaired[0]["called_target"] == audited.suspect
    assert next(row for row in rows if row["method"] == "repair-published")["called_target"] is None


def test_classifiers_that_calibrate_or_tune_are_not_reported(found, rows, folder):
    assert {row["seed"] for row in rows} == {zoo.FIRST_SEED}
    for case, standard in found[0].standards.items():
        calibration = {model.recipe for model, _ in standard.calibration}
        assert {recipe.seed for recipe in calibration} == {CALIBRATION_SEED + number for number in range(3)}
        assert {recipe.case for recipe in calibration} == {case}
        assert not calibration & {model.recipe for model, _ in found[0].judged}
    with (folder / "out" / "models.csv").open() as file:
        roles = [row["role"] for row in csv.DictReader(file)]
    assert roles.count("calibration") == 6
    assert roles.count("reported") == 6


def test_verdicts_rest_on_the_calibrated_thresholds(found):
    for model, methods in found[0].judged:
        for name, one in methods.items():
            compared = name in run.COMPARED and model.recipe.case != FEW
            by_chance = name in run.COMPARED and not compared
            standard = found[0].standards[UNBALANCED if model.recipe.case == UNBALANCED else ""]
            fitted = (
                standard.references[name].thresholds[one.test] if compared else standard.thresholds["ban-chance" if by_chance else name]
            )
            assert one.threshold == fitted
            assert one.backdoored == (one.score > one.threshold)
            assert bool(one.reference) == compared
            assert bool(one.reference_margins) == (name in ("ban", "ban-noise") and compared)
            assert bool(one.reference_sizes) == (name == "ban" and compared)
    evidence = found[0].judged[0][1]["ban"]
    assert judged_at(evidence, None) == evidence


def test_a_backdoor_that_did_not_take_is_named_and_left_out(found, rows, folder):
    assert [model.recipe.attack for model in found[0].not_taken] == ["bpp"]
    unbalanced = "one class 10 times the others"
    assert {row["attack"] for row in rows} == {"none", "none (3 classes)", f"none ({unbalanced})", "badnets", f"badnets ({unbalanced})"}
    page = (folder / "out" / "README.md").read_text()
    assert f"- tiny-bpp-{zoo.FIRST_SEED}: attack success" in page
    assert "| FeatureRE | not implemented |" in page
    assert (folder / "out" / "scores.png").is_file()


def test_every_goal_is_judged_and_a_small_zoo_does_not_meet_its_own(found, rows):
    verdicts = {goal: verdict for goal, _, verdict in goals(found, rows)}
    assert len(verdicts) == 7
    assert next(verdict for goal, verdict in verdicts.items() if "zoo of at least" in goal) == "not met"
    assert next(verdict for goal, verdict in verdicts.items() if "detection accuracy" in goal) != "met"
    assert next(verdict for goal, verdict in verdicts.items() if "few classes" in goal) != "met"  # one of the three cases is missing
    assert {verdict for _, _, verdict in goals([], [])} == {"not measured", "not met"}


def test_seconds_are_compared_on_the_same_classifiers():
    base = {"architecture": "vgg", "attack": "none"}
    rows = [
        {**base, "method": method, "seed": seed, "seconds": seconds}
        for method, seed, seconds in (("ban", 0, 2.0), ("ban", 1, 2.0), ("bti-dbf", 0, 6.0), ("bti-dbf", 2, 90.0))
    ]
    assert ratio(rows, "ban") == 3
    assert ratio(rows, "neural-cleanse") is None


def test_a_second_run_trains_nothing_and_says_the_same(found, data, folder, rows, monkeypatch):
    for name in ("audit", "bti_dbf", "repair"):
        monkeypatch.setattr(run, name, lambda *given: pytest.fail("done twice"))
    monkeypatch.setattr(zoo, "optimise", lambda *given: pytest.fail("trained twice"))
    run_benchmark(PLAN, folder / "work", folder / "again", "noisec bench audit", data)
    assert json.loads((folder / "again" / "summary.json").read_text()) == rows
    with pytest.raises(pytest.fail.Exception, match="trained twice"):
        Zoo(Workbench(folder / "work" / "audit"), data, 3).model(Recipe("tiny", CLEAN, 0))


def test_hard_cases_are_what_they_are_called(data):
    few = data.of(FEW)
    assert few.classes == 3
    assert set(few.test.labels) == {0, 1, 2}
    counts = np.bincount(data.of(UNBALANCED).train.labels)
    assert counts[0] >= 8 * counts[1:].max()
    pixels = torch.from_numpy(data.train[:50].floats())
    changed = augmented(pixels)
    assert changed.shape == pixels.shape
    assert 0 <= changed.min() <= changed.max() <= 1
    assert (changed != pixels).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("name", ["resnet", "vgg", "densenet"])
def test_families_have_batch_norm_and_a_feature_map_that_splits_them(name):
    network = FAMILIES[name]((1, 28, 28), 10).eval().requires_grad_(False)
    images = torch.rand(3, 1, 28, 28)
    assert network(images).shape == (3, 10)
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    height, width = SplitNetwork(network, images).place.shape[1:]
    assert height == width > 1


def test_a_plan_that_cannot_be_measured_is_refused():
    with pytest.raises(NoisecError, match="no family alexnet"):
        check_plan(Plan(families=("alexnet",)))
    with pytest.raises(NoisecError, match="3 calibration models"):
        check_plan(replace(PLAN, calibration=2))


def test_the_command_says_how_it_is_used():
    shown = CliRunner().invoke(app, ["bench", "audit", "--help"])
    assert shown.exit_code == 0
    assert "Example" in shown.output
