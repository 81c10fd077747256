"""Detection figures survive being written, goals are judged by their numbers, and the published cells are the paper's."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from noisec.benchmarks.detection import published, report
from noisec.benchmarks.detection.cells import Cell
from noisec.benchmarks.detection.goals import goals
from noisec.benchmarks.detection.plots import PLOTS
from noisec.benchmarks.detection.rows import OPTIONAL, over_seeds, paired, read_summary
from noisec.errors import NoisecError

KEYS = ["dataset", "guard", "detector", "protocol", "access", "attack", "eps", "success", "auroc", "tpr_at_1pct", "tpr_at_5pct", "fpr"]
KEYS += ["n_benign", "n_malicious", "seed"]
STRONG = Cell("cifar10", "cifar10", "default", "honest", "white-box", "pgd (successful)", 0.01, 0.9, 0.99, 0.9, 0.95, 0.01, 1000, 900, 0)
FACTS = {
    "command": "noisec bench detection",
    "seed": 0,
    "versions": {"numpy": "2"},
    "machine": "2 cores",
    "seconds": 5400.0,
    "sizes": {"clean": 1000},
}


def successful(detector: str = "default", **figures: float | None) -> list[Cell]:
    """The paper's five attacks at its eps."""
    names = published.ATTACKS
    cells = [replace(STRONG, detector=detector, attack=f"{name} (successful)", eps=published.EPS["cifar10"][name]) for name in names]
    return [replace(cell, **figures) for cell in cells]


def ladder(access: str, joint: float, attack: str = "pgd", eps: float = 0.01, note: str = "") -> Cell:
    return replace(STRONG, access=access, attack=attack, eps=eps, joint_success=joint, note=note)  # type: ignore[arg-type]


def backdoors(**figures: float) -> list[Cell]:
    return [replace(STRONG, guard=f"cifar10-{name}", access="backdoor", attack=name, eps=0.0, **figures) for name in published.BACKDOORS]


def verdicts(cells: list[Cell], about: str) -> list[str]:
    return [goal.verdict for goal in goals(cells) if about in goal.text]


def scores() -> dict[tuple[str, str], dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    means = {"clean": 0.0, "natural noise": 0.1, "fgsm-0.1": 2.0, "pgd-0.1": 4.0, "pgd-0.05": 1.0, "badnets": 6.0}
    return {("cifar10", name): {"default": random.normal(mean, 1, 300).astype(np.float32)} for name, mean in means.items()}


def test_a_page_leads_to_notes_and_leaves_them_alone(tmp_path):
    report.write_results([STRONG], {}, FACTS, tmp_path)
    assert "notes.md" not in (tmp_path / "README.md").read_text()
    (tmp_path / "notes.md").write_text("as it was")
    report.write_results([STRONG], {}, FACTS, tmp_path)
    assert "[notes](notes.md)" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "notes.md").read_text() == "as it was"


def test_rows_survive_a_round_trip_with_exactly_the_keys_that_readers_expect(tmp_path):
    cells = [
        STRONG,
        replace(STRONG, auroc=None, tpr_at_1pct=None, tpr_at_5pct=None, n_malicious=0),
        replace(STRONG, joint_success=0.0, fpr_natural_noise=0.02, note="1000 queries, label only"),
    ]
    report.write_results(cells, {}, FACTS, tmp_path)
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [list(row) for row in rows] == [KEYS, KEYS, [*KEYS, *OPTIONAL]]
    assert read_summary(tmp_path / "summary.json") == cells
    with (tmp_path / "cells.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["auroc"] for row in table] == ["0.99", "", "0.99"]
    assert list(table[0]) == [*KEYS, *OPTIONAL]


def test_what_is_no_number_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        report.write_results([replace(STRONG, auroc=float("nan"))], {}, FACTS, tmp_path)


def test_a_figure_that_is_not_there_is_a_dash():
    page = report.as_markdown([replace(STRONG, auroc=None, tpr_at_1pct=None, tpr_at_5pct=None, fpr=None, n_malicious=0)], FACTS)
    assert "| white-box | pgd (successful) | 0.01 | 90.0 % | - | - | - | - | 1000 + 0 |" in page
    assert "None" not in page
    assert "nan" not in page


def test_seeds_are_one_row_with_their_spread():
    page = report.as_markdown([STRONG, replace(STRONG, seed=1, auroc=0.97, tpr_at_1pct=0.8)], FACTS)
    assert "| 90.0 ± 0.0 % | 0.980 ± 0.014 | 85.0 ± 7.1 % |" in page


@pytest.mark.parametrize(
    ("cells", "about", "verdict"),
    [
        (successful(), "eps: mean AUROC", "met"),
        (successful(auroc=0.96), "eps: mean AUROC", "not met"),
        (successful(tpr_at_1pct=0.80), "eps: mean TPR", "met"),
        (successful(tpr_at_1pct=0.79), "eps: mean TPR", "not met"),
        (successful()[:4], "eps: mean AUROC", "not measured"),
        ([*successful()[:4], replace(successful()[4], auroc=None, tpr_at_1pct=None)], "eps: mean AUROC", "met"),
        ([replace(cell, eps=0.05) for cell in successful()], "eps: mean AUROC", "not measured"),
        ([*successful(), *successful("MagNet", auroc=0.98)], "never below", "met"),
        ([*successful(), *successful("MagNet", auroc=0.995)], "never below", "not met"),
        ([*successful(), *successful("MagNet", auroc=0.5, tpr_at_1pct=0.95)], "never below", "not met"),
        (successful(), "never below", "not measured"),
        (successful(fpr=0.015), "clean images", "met"),
        (successful(fpr=0.016), "clean images", "not met"),
        (successful(fpr=0.004), "clean images", "not met"),
        (successful(fpr_natural_noise=0.009), "natural-noise images", "met"),
        (successful(fpr_natural_noise=0.12), "natural-noise images", "not met"),
        (successful(), "natural-noise images", "not measured"),
        ([*successful(), *(replace(cell, guard="cifar10", fpr=0.5) for cell in backdoors())], "clean images", "met"),
        ([ladder("gray-box", 0.15)], "gray-box", "met"),
        ([ladder("gray-box", 0.05), ladder("gray-box", 0.2, "bim")], "gray-box", "not met"),
        ([ladder("gray-box", 0.9, eps=0.03)], "gray-box", "not measured"),
        ([ladder("query", 0.5, "square", 0.1, "1000 queries, label and verdict")], "query", "met"),
        ([ladder("query", 0.51, "square", 0.1, "1,000 queries, label and verdict without score")], "query", "not met"),
        ([ladder("query", 0.9, "square", 0.1, "1000 queries with score")], "query", "not measured"),
        ([ladder("query", 0.9, "random search", 0.01, "label, verdict and score")], "query", "not measured"),
        ([ladder("query", 0.4, "random search", 0.01, "label and verdict")], "query", "met"),
        ([ladder("query", 0.9, "square", 0.1, "5000 verdict queries")], "query", "not measured"),
        ([ladder("adaptive", 1.0)], "adaptive", "met"),
        (successful(), "adaptive", "not measured"),
        (backdoors(), "backdoors: mean AUROC", "met"),
        (backdoors(auroc=0.9), "backdoors: mean AUROC", "not met"),
        (backdoors(tpr_at_1pct=0.5), "backdoors: mean TPR", "not met"),
        (backdoors()[:3], "backdoors: mean AUROC", "not measured"),
        ([*backdoors()[:3], replace(backdoors()[3], success=0.05, auroc=0.1)], "backdoors: mean AUROC", "not measured"),
        ([*backdoors(auroc=0.9)[:3], replace(backdoors()[3], success=0.05)], "backdoors: mean AUROC", "not met"),
        ([*backdoors()[:3], replace(backdoors()[3], success=0.3, auroc=0.1)], "backdoors: mean AUROC", "not met"),
    ],
)
def test_goals_are_judged_by_their_numbers(cells, about, verdict):
    assert set(verdicts(cells, about)) == {verdict}


@pytest.mark.parametrize(
    ("aurocs", "verdict"),
    [
        ([0.98, 1.0, 0.995, 0.90, 0.91], "met"),
        ([0.98, 1.0, 0.98, 0.90, 0.91], "not met"),
        ([0.99, 1.0, 1.0, 0.99, 0.99], "met"),
        ([0.98, 1.0], "not measured"),
    ],
)
def test_published_cells_are_compared_with_two_standard_errors(aurocs, verdict):
    cells = [
        replace(STRONG, protocol="published", attack=name, eps=published.EPS["cifar10"][name], auroc=value)
        for name, value in zip(published.ATTACKS, aurocs, strict=False)
    ]
    assert verdicts(cells, "published protocol") == [verdict]
    assert verdicts([replace(cell, guard="cifar10_resnet20") for cell in cells], "published protocol") == []


def test_a_detector_that_is_ahead_is_named():
    page = report.as_markdown([*successful(), *successful("MagNet", auroc=0.995)], FACTS)
    assert (
        "**Ahead of the guard's own verdict**, over the attacks that both were measured on: MagNet (mean AUROC 0.995 against 0.990)."
        in page
    )
    assert "| MagNet | 5 of 5 | **0.995** | **90.0 %** |" in page
    assert "| default | 5 of 5 | 0.990 | **90.0 %** |" in page


def test_a_detector_is_compared_over_the_attacks_that_both_have():
    own = paired(over_seeds([*successful(), *successful("LID", auroc=0.7)[:2]]), "LID")
    assert own is not None
    assert own.attacks == 2
    assert own.own == pytest.approx((0.7, 0.9))
    assert own.default == pytest.approx((0.99, 0.9))


@pytest.mark.parametrize(
    ("cell", "auroc"),
    [
        (("cifar10", "default", "white-box", "pgd", 0.01), 1.00),
        (("cifar10", "NoiSec (noise)", "black-box", "square", 0.1), 0.92),
        (("fashion-mnist", "MagNet", "white-box", "uap", 0.1), 0.62),
        (("fashion-mnist", "MANDA (supervised)", "black-box", "pgd", 0.1), 0.74),
        (("gtsrb", "default", "black-box", "uap", 0.1), 0.70),
        (("pneumoniamnist", "default", "white-box", "bim", 0.05), 0.98),
        (("cifar10", "default", "backdoor", "label-consistent", 0.0), 0.88),
        (("cifar10", "default", "white-box", "pgd", 0.03), None),
        (("gtsrb", "MagNet", "white-box", "pgd", 0.1), None),
    ],
)
def test_published_cells_are_the_papers(cell, auroc):
    assert published.paper_auroc(*cell) == auroc


def test_published_tables_are_whole():
    assert len(published.AUROC) == 20 * len(published.ATTACKS)
    assert published.TPR_AT_1PCT["badnets"] == 0.014
    assert published.paper_eps("gtsrb", "fgsm (successful)") == 0.2


def test_standard_errors_are_hanley_and_mcneils():
    assert published.standard_error(0.8, 100, 100) == pytest.approx(0.03137, abs=1e-5)
    assert published.standard_error(0.5, 100, 100) == pytest.approx(0.041, abs=1e-3)
    assert published.standard_error(1.0) == 0
    assert published.band(1.0) == (pytest.approx(0.990, abs=1e-3), 1.0)


def test_plots_are_written_and_shown(tmp_path):
    cells = [
        *successful(),
        *successful(tpr_at_1pct=0.5),
        *(ladder("adaptive", joint, eps=eps) for eps, joint in ((0.005, 0.5), (0.01, 0.9))),
    ]
    cells = [replace(cell, eps=cell.eps / 2) if cell.tpr_at_1pct == 0.5 else cell for cell in cells]
    report.write_results(cells, scores(), FACTS, tmp_path)
    page = (tmp_path / "README.md").read_text()
    for name in PLOTS:
        assert (tmp_path / name).stat().st_size > 10_000
        assert f"]({name})" in page


def test_a_picture_of_an_earlier_run_does_not_stay(tmp_path):
    (tmp_path / "roc.png").write_bytes(b"old")
    report.write_results([STRONG], {}, FACTS, tmp_path)
    assert not list(tmp_path.glob("*.png"))
    assert ".png" not in (tmp_path / "README.md").read_text()


def test_scores_that_are_no_numbers_can_be_drawn(tmp_path):
    found = scores()
    found["cifar10", "pgd-0.1"]["default"][:100] = np.nan
    found["cifar10", "clean"]["default"][0] = np.inf
    report.write_results([STRONG], found, FACTS, tmp_path)
    assert (tmp_path / "histograms.png").stat().st_size > 10_000


def test_guards_are_joined(tmp_path):
    other = [replace(cell, guard="cifar10_resnet20") for cell in successful(auroc=0.9)]
    for name, cells in (("cifar10", successful()), ("cifar10_resnet20", other)):
        report.write_results(cells, {}, FACTS, tmp_path / name)
    report.merge([tmp_path / "cifar10", tmp_path / "cifar10_resnet20"])
    assert read_summary(tmp_path / "summary.json") == [*successful(), *other]
    page = (tmp_path / "README.md").read_text()
    assert "| CIFAR-10 | cifar10 | [tables and plots](cifar10/README.md) | 5 of 5 | 0.990 | 90.0 % | 1.00 % |" in page
    assert "| CIFAR-10 | cifar10_resnet20 | [tables and plots](cifar10_resnet20/README.md) | 5 of 5 | 0.900 | 90.0 % | 1.00 % |" in page


@pytest.mark.parametrize("text", ["{", '[{"dataset": "cifar10"}]', "[1]"])
def test_a_summary_that_is_none_is_refused(tmp_path: Path, text: str):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(NoisecError, match="holds no detection figures"):
        report.merge([tmp_path])
