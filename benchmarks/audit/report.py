"""The pages of an audit benchmark: rows, tables, goals, plot."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from noisec.benchmarks.audit.zoo import ATTACKS, AUGMENTED, CLEAN, DEVIATION, FEW, FEW_CLASSES, HARD, IMBALANCE, TOOK, UNBALANCED, Model
from noisec.builders.audit.evidence import Evidence
from noisec.builders.audit.reference import Reference
from noisec.builders.figures import markdown_table, percent

KEYS = (
    "dataset", "architecture", "attack", "seed", "method", "backdoored", "called_backdoored", "top_class_share", "target", "called_target",
    "seconds", "clean_accuracy", "attack_success",
)  # fmt: skip
"""of every row of ``summary.json``"""
BEFORE = ("clean_accuracy_before", "attack_success_before", "learning_rate")
"""further ones of a repair's row, whose ``clean_accuracy`` and ``attack_success`` are those after it"""
DATASET = "fashion-mnist"
CASES = {FEW: f"{FEW_CLASSES} classes", UNBALANCED: f"one class {IMBALANCE} times the others", AUGMENTED: "heavy augmentation"}
METHODS = {
    "ban": "BAN, this project's settings",
    "ban-noise": "without universal perturbations",
    "ban-shares": "and without the largest margins",
    "ban-chance": "and against chance",
    "ban-published": "BAN as published",
    "bti-dbf": "BTI-DBF",
    "neural-cleanse": "Neural Cleanse",
}
READINGS = ("ban-noise", "ban-shares", "ban-chance")
"""of the same audit as ``ban``, so that they have no time of their own"""
UNDONE = ("FeatureRE", "Unicorn", "TABOR")
OURS, FASTER_THAN = "ban", "bti-dbf"
DASH = "-"
PLOT = "scores.png"
CLEAN_COLOUR, HARD_COLOUR, BAD_COLOUR = "#2a7f3f", "#1f77b4", "#b3261e"

ACCURACY, FALSE_ALARMS, SPEED, SUCCESS, LOSS = 0.95, 0.05, 1.37, 0.05, 0.02
"""the goals"""
LEAST, LEAST_CLEAN, LEAST_FAMILIES = 36, 1 / 3, 3
Verdict = Literal["met", "not met", "not measured"]
Row = dict[str, Any]

INTRODUCTION = f"""A classifier is called backdoored where a method's score lies above a threshold. Thresholds are fitted for each family
and method to further clean classifiers, which are in no table (`calibrate`; the rate is nominal, from a distribution fitted to few
scores). BAN with this project's settings has two tests, of which each may raise half of the false alarms. One compares each label's
share under neuron noise, and the largest margin of its logit (MM-BD), with what they are among these classifiers; the other the size of
one perturbation with which it is on average the likeliest class of all other images (USB). Classifiers of unbalanced data, clean or
backdoored, have clean ones of the same imbalance to be compared with, for all methods; those of few classes are compared with chance, by
their shares alone. The search for universal perturbations takes the place of one of six repeats. Neural Cleanse has no such score, is
slow, and judges a part of the zoo at its paper's anomaly index. BTI-DBF is written anew from its paper. A backdoor whose attack success
is below {percent(TOOK, 0)} did not take: it is named and counts nowhere. The classifiers of the hard clean cases are
trained on what they are named after; a defender audits them with images like all others'."""


@dataclass(frozen=True)
class Repaired:
    """A repair and what it did."""

    model: Model
    learning_rate: float
    target: int | None
    """that the repair was aimed at; None under neuron noise"""
    seconds: float
    accuracy_before: float
    accuracy_after: float
    success_before: float
    success_after: float


@dataclass(frozen=True)
class Standard:
    """Clean classifiers that are in no table, and what was fitted to them."""

    calibration: tuple[tuple[Model, Mapping[str, Evidence]], ...]
    references: Mapping[str, Reference]
    """of each method that is compared with them"""
    thresholds: Mapping[str, float]
    """of each other calibrated method"""

    @property
    def fitted(self) -> Iterator[tuple[str, Sequence[float], float]]:
        """A method's title, with its test where it has several; the scores of the calibration classifiers; the threshold."""
        for method, one in self.references.items():
            for test, scores in one.scores.items():
                yield f"{METHODS[method]}{f': {test}' if len(one.scores) > 1 else ''}", scores, one.thresholds[test]
        for method, threshold in self.thresholds.items():
            yield METHODS[method], [methods[method].score for _, methods in self.calibration], threshold


@dataclass(frozen=True)
class Found:
    """One family."""

    family: str
    standards: Mapping[str, Standard]
    """hard case, or empty for classifiers of all the training images -> what such a classifier is compared with"""
    judged: tuple[tuple[Model, Mapping[str, Evidence]], ...]
    """what is reported"""
    not_taken: tuple[Model, ...]
    rate: float
    """the repair's learning rate, chosen on a classifier that is not reported"""
    tried: Mapping[str, Mapping[str, float]]
    """learning rate -> clean accuracy lost, attack success left"""
    repaired: tuple[Repaired, ...]
    repaired_as_published: tuple[Repaired, ...]


def write_results(found: Sequence[Found], facts: Mapping[str, Any], folder: Path) -> None:
    """Write ``summary.json``, ``summary.csv``, ``models.csv``, ``README.md`` and the plot.

    Args:
        facts: ``command``, seeds, machine, durations and whatever else a reader should know
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows_of(found)
    (folder / "summary.json").write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    _write_csv(rows, (*KEYS, *BEFORE), folder / "summary.csv")
    models = _model_rows(found)
    _write_csv(models, tuple(models[0]) if models else (), folder / "models.csv")
    (folder / "README.md").write_text(as_markdown(found, rows, facts))
    draw(found, folder / PLOT)


def _write_csv(rows: Sequence[Row], keys: Sequence[str], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)


def attack_name(model: Model) -> str:
    """A trigger, or ``none``, with the hard case where its training images are one."""
    attack = model.recipe.attack if model.recipe.backdoored else CLEAN
    case = model.recipe.on or model.recipe.attack
    return f"{attack} ({CASES[case]})" if case in CASES else attack


def rows_of(found: Sequence[Found]) -> list[Row]:
    """One row for each method and classifier, and one for each repair."""
    rows = [_judged_row(model, name, one) for family in found for model, methods in family.judged for name, one in methods.items()]
    for family in found:
        rows += [_repair_row(one, "repair") for one in family.repaired]
        rows += [_repair_row(one, "repair-published") for one in family.repaired_as_published]
    return rows


def _row(model: Model, method: str, **rest: Any) -> Row:
    known = {
        "dataset": DATASET, "architecture": model.recipe.family, "attack": attack_name(model), "seed": model.recipe.seed, "method": method,
        "backdoored": model.recipe.backdoored, "called_backdoored": None, "top_class_share": None, "target": model.target,
        "called_target": None, "clean_accuracy": model.clean_accuracy, "attack_success": model.attack_success, **rest,
    }  # fmt: skip
    return {key: known[key] for key in (*KEYS, *(BEFORE if set(BEFORE) <= set(known) else ()))}


def _judged_row(model: Model, method: str, one: Evidence) -> Row:
    called = {"called_backdoored": one.backdoored, "called_target": one.target if one.backdoored else None}
    return _row(model, method, **called, top_class_share=one.top_class_share, seconds=one.seconds)


def _repair_row(one: Repaired, method: str) -> Row:
    after = {"clean_accuracy": one.accuracy_after, "attack_success": one.success_after}
    before = {"clean_accuracy_before": one.accuracy_before, "attack_success_before": one.success_before}
    return _row(one.model, method, called_target=one.target, **after, **before, seconds=one.seconds, learning_rate=one.learning_rate)


def _model_rows(found: Sequence[Found]) -> list[Row]:
    """Every classifier, those that only calibrated among them, with its recipe."""
    rows = []
    for family in found:
        for model in [*(one for one, _ in family.judged), *family.not_taken, *calibrating(family)]:
            recipe = model.recipe
            rows.append(
                {
                    "architecture": recipe.family, "attack": attack_name(model), "seed": recipe.seed, "role": recipe.role,
                    "target": model.target, "poisoned_share": recipe.share, "classes": model.classes, "images": model.images,
                    "epochs": model.epochs, "clean_accuracy": model.clean_accuracy, "attack_success": model.attack_success,
                    "took": model.took,
                }
            )  # fmt: skip
    return rows


def calibrating(family: Found) -> list[Model]:
    """Those that are compared with."""
    return [model for standard in family.standards.values() for model, _ in standard.calibration]


# --- tables --------------------------------------------------------------------------------------------------------------------------


def as_markdown(found: Sequence[Found], rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """Every table."""
    parts = [
        "# Audit: is the classifier itself backdoored?",
        INTRODUCTION,
        "## Goals\n\n" + markdown_table(["goal", "measured", "verdict"], [list(one) for one in goals(found, rows)]),
        "## Called backdoored\n\n" + _detection(found),
        f"![Score over threshold of each classifier]({PLOT})",
        "## Seconds for each classifier\n\n" + _seconds(found, rows),
        "## Repair\n\n" + _repairs(found),
        "## Classifiers\n\n" + _models(found),
        "## How it was measured\n\n" + _facts(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _detection(found: Sequence[Found]) -> str:
    bad = [model for one in found for model, _ in one.judged if model.recipe.backdoored]
    attacks = dict.fromkeys(map(attack_name, sorted(bad, key=lambda model: (model.recipe.on, ATTACKS.index(model.recipe.attack)))))
    columns = {"clean": (CLEAN,), "hard clean": HARD, **{name: (name,) for name in attacks}}
    table = []
    for method, title in METHODS.items():
        for family in found:
            rows = [row for row in rows_of([family]) if row["method"] == method]
            counts = [_called(row for row in rows if _attack(row) in chosen) for chosen in columns.values()]
            figures = [_right_targets(rows), percent(accuracy(rows)) if rows else DASH, _false_alarms(rows)]
            table.append([title, family.family, *counts, *figures])
    table += [[name, "not implemented", *[DASH] * (len(columns) + 3)] for name in UNDONE]
    heads = ["method", "architecture", *columns, "right target", "detection accuracy", "false alarms"]
    text = "How many were called backdoored, of how many that were judged:\n\n"
    return text + markdown_table(heads, table) + "\n\n" + _thresholds(found) + "\n\n" + _left_out(found)


def _attack(row: Row) -> str:
    """The recipe's own name for what a row calls ``none (...)``."""
    return next((case for case, text in CASES.items() if row["attack"] == f"{CLEAN} ({text})"), str(row["attack"]))


def _called(rows: Iterable[Row]) -> str:
    calls = [bool(row["called_backdoored"]) for row in rows]
    return f"{sum(calls)} / {len(calls)}" if calls else DASH


def _right_targets(rows: Sequence[Row]) -> str:
    caught = [row for row in rows if row["backdoored"] and row["called_backdoored"]]
    return f"{sum(row['target'] == row['called_target'] for row in caught)} / {len(caught)}" if caught else DASH


def accuracy(rows: Sequence[Row]) -> float:
    """Share of the verdicts that are right."""
    return float(np.mean([row["backdoored"] == row["called_backdoored"] for row in rows]))


def _false_alarms(rows: Sequence[Row]) -> str:
    clean = [row for row in rows if not row["backdoored"]]
    return percent(float(np.mean([row["called_backdoored"] for row in clean]))) if clean else DASH


def _thresholds(found: Sequence[Found]) -> str:
    table = []
    for one in found:
        for case, standard in one.standards.items():
            for title, scores, threshold in standard.fitted:
                shown = [str(len(scores)), f"{min(scores):.3f} to {max(scores):.3f}", f"{threshold:.3f}"]
                table.append([one.family, CASES.get(case, "all"), title, *shown])
    heads = ["architecture", "training images", "method", "calibration classifiers", "their scores", "threshold"]
    return "Thresholds:\n\n" + markdown_table(heads, table)


def _left_out(found: Sequence[Found]) -> str:
    lines = [f"- {model.recipe.text}: attack success {_percent(model.attack_success)}" for one in found for model in one.not_taken]
    return "Left out, because the backdoor did not take:\n\n" + "\n".join(lines) if lines else "Every backdoor took; none is left out."


def _seconds(found: Sequence[Found], rows: Sequence[Row]) -> str:
    table = []
    for method, title in METHODS.items():
        for family in found if method not in READINGS else ():
            chosen = {_which(row): row["seconds"] for row in rows if row["method"] == method and row["architecture"] == family.family}
            pace = ratio([row for row in rows if row["architecture"] == family.family], method)
            shown = [f"{np.mean(list(chosen.values())):.1f}" if chosen else DASH, str(len(chosen)), DASH if pace is None else f"{pace:.2f}"]
            table.append([title, family.family, *shown])
    table += [[name, "not implemented", DASH, "0", DASH] for name in UNDONE]
    heads = ["method", "architecture", "mean seconds", "classifiers", "BTI-DBF's seconds on the same / its own"]
    return markdown_table(heads, table)


def _which(row: Row) -> tuple[str, str, int]:
    return row["architecture"], row["attack"], row["seed"]


def ratio(rows: Sequence[Row], method: str) -> float | None:
    """How many times as long BTI-DBF takes for the classifiers that both judged."""
    own = {_which(row): float(row["seconds"]) for row in rows if row["method"] == method}
    other = {_which(row): float(row["seconds"]) for row in rows if row["method"] == FASTER_THAN and _which(row) in own}
    return sum(other.values()) / sum(own[one] for one in other) if other else None


def _repairs(found: Sequence[Found]) -> str:
    table = []
    for family in found:
        settings = {f"this project's ({family.rate:g})": family.repaired, "the paper's": family.repaired_as_published}
        for title, repairs in settings.items():
            by_attack = {name: [one for one in repairs if one.model.recipe.attack == name] for name in ATTACKS}
            table += [[family.family, title, name, *_repair_means(chosen)] for name, chosen in by_attack.items() if chosen]
            table += [[family.family, title, "mean", *_repair_means(repairs)]] if repairs else []
    heads = [
        "architecture", "learning rate", "attack", "n", "aimed at its target", "accuracy before", "after", "attack success before", "after",
        "seconds",
    ]  # fmt: skip
    return (
        "The first seed of each backdoor on all the training images. This project's repair learns the true labels of images that lean "
        "towards the class that its audit suspects, and works under neuron noise where the audit finds no backdoor; the paper's, under "
        "neuron noise at its own learning rate, mends the first backdoor.\n\n" + markdown_table(heads, table) + "\n\n" + _rates(found)
    )


def _repair_means(repairs: Sequence[Repaired]) -> list[str]:
    names = ("accuracy_before", "accuracy_after", "success_before", "success_after")
    means = [percent(_mean(repairs, name)) for name in names]
    aimed = [one.target == one.model.target for one in repairs if one.target is not None]
    return [str(len(repairs)), f"{sum(aimed)} of {len(aimed)}" if aimed else "-", *means, f"{_mean(repairs, 'seconds'):.0f}"]


def _mean(repairs: Sequence[Repaired], name: str) -> float:
    return float(np.mean([getattr(one, name) for one in repairs]))


def _rates(found: Sequence[Found]) -> str:
    table = [
        [one.family, rate, percent(figures["lost"]), percent(figures["success"]), "chosen" if float(rate) == one.rate else ""]
        for one in found
        for rate, figures in one.tried.items()
    ]
    text = "The learning rate is chosen on a further backdoored classifier of each family, which is in no other table:"
    return text + "\n\n" + markdown_table(["architecture", "learning rate", "accuracy lost", "attack success left", ""], table)


def _models(found: Sequence[Found]) -> str:
    table = []
    for family in found:
        models = [*(model for model, _ in family.judged), *family.not_taken]
        for name in dict.fromkeys(attack_name(model) for model in models):
            chosen = [model for model in models if attack_name(model) == name]
            success = [model.attack_success for model in chosen if model.attack_success is not None]
            targets = ", ".join(str(model.target) for model in chosen if model.target is not None)
            figures = [percent(float(np.mean([model.clean_accuracy for model in chosen]))), _percent(min(success) if success else None)]
            table.append([family.family, name, str(len(chosen)), percent(chosen[0].recipe.share, 0), targets or DASH, *figures])
    heads = ["architecture", "attack", "n", "poisoned share", "targets", "mean clean accuracy", "least attack success"]
    augmentation = f"Heavy augmentation: random crops and mirroring, noise of a deviation of up to {DEVIATION:g}."
    return markdown_table(heads, table) + f"\n\n{augmentation} `models.csv` has every classifier, those for calibration among them."


def _percent(value: float | None) -> str:
    return DASH if value is None else percent(value)


def _facts(facts: Mapping[str, Any]) -> str:
    command = f"```sh\n{facts['command']}\n```\n\n" if "command" in facts else ""
    return command + "\n".join(f"- {name}: {_fact(value)}" for name, value in facts.items() if name != "command")


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {f'({_fact(one)})' if isinstance(one, Mapping) else one}" for key, one in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


# --- goals ---------------------------------------------------------------------------------------------------------------------------


def goals(found: Sequence[Found], rows: Sequence[Row]) -> list[tuple[str, str, Verdict]]:
    """What the audit is meant to reach, what it reached, and whether that is enough."""
    own = [row for row in rows if row["method"] == OURS]
    return [_accuracy_goal(own), _alarm_goal(own), _hard_goal(own), _speed_goal(rows), *_repair_goals(found), _zoo_goal(own)]


def _verdict(met: bool, enough: bool = True) -> Verdict:
    """A part of the zoo can fail a goal; it cannot meet it."""
    return "not met" if not met else "met" if enough else "not measured"


def enough(own: Sequence[Row]) -> bool:
    """Whether one method's rows are those of a whole zoo."""
    clean = sum(not row["backdoored"] for row in own)
    return len(own) >= LEAST and clean >= LEAST_CLEAN * len(own) and len({row["architecture"] for row in own}) >= LEAST_FAMILIES


def _accuracy_goal(own: Sequence[Row]) -> tuple[str, str, Verdict]:
    text = f"detection accuracy over the zoo, hard clean cases among them: at least {percent(ACCURACY, 0)}"
    if len({row["backdoored"] for row in own}) < 2:
        return text, "no clean or no backdoored classifier was judged", "not measured"
    right = sum(row["backdoored"] == row["called_backdoored"] for row in own)
    return text, f"{percent(accuracy(own))} ({right} of {len(own)} verdicts are right)", _verdict(accuracy(own) >= ACCURACY, enough(own))


def _alarm_goal(own: Sequence[Row]) -> tuple[str, str, Verdict]:
    text = f"clean classifiers called backdoored, hard cases among them: at most {percent(FALSE_ALARMS, 0)}"
    calls = [row["called_backdoored"] for row in own if not row["backdoored"]]
    if not calls:
        return text, "no clean classifier was judged", "not measured"
    return (
        text,
        f"{percent(float(np.mean(calls)))} ({sum(calls)} of {len(calls)})",
        _verdict(float(np.mean(calls)) <= FALSE_ALARMS, enough(own)),
    )


def _hard_goal(own: Sequence[Row]) -> tuple[str, str, Verdict]:
    text = "few classes, unbalanced data or heavy augmentation are not taken for a backdoor"
    hard = [row for row in own if _attack(row) in HARD]
    called = [f"{row['architecture']} with {CASES[_attack(row)]}" for row in hard if row["called_backdoored"]]
    figure = f"none of {len(hard)} is called backdoored" if not called else f"called backdoored: {', '.join(called)}"
    complete = {_attack(row) for row in hard} == set(HARD)
    return text, figure if hard else "not judged", _verdict(not called) if complete or called else "not measured"


def _speed_goal(rows: Sequence[Row]) -> tuple[str, str, Verdict]:
    text = f"at least {SPEED} times as fast as BTI-DBF"
    paces = {name: ratio(rows, name) for name in (OURS, "ban-published")}
    own = paces[OURS]
    if own is None:
        return text, "not timed", "not measured"
    published = f"; as published {paces['ban-published']:.2f} times" if paces["ban-published"] is not None else ""
    return text, f"{own:.2f} times{published}", _verdict(own >= SPEED)


def _repair_goals(found: Sequence[Found]) -> list[tuple[str, str, Verdict]]:
    texts = (
        f"attack success after repair: below {percent(SUCCESS, 0)}, mean",
        f"clean accuracy that a repair costs: at most {100 * LOSS:g} points, mean",
    )
    repairs = [one for family in found for one in family.repaired]
    if not repairs:
        return [(text, "nothing was repaired", "not measured") for text in texts]
    success = _mean(repairs, "success_after")
    lost = _mean(repairs, "accuracy_before") - _mean(repairs, "accuracy_after")
    above = sum(one.success_after >= SUCCESS for one in repairs)
    return [
        (texts[0], f"{percent(success)}; {above} of {len(repairs)} are at {percent(SUCCESS, 0)} or above", _verdict(success < SUCCESS)),
        (texts[1], f"{100 * lost:.1f} points", _verdict(lost <= LOSS)),
    ]


def _zoo_goal(own: Sequence[Row]) -> tuple[str, str, Verdict]:
    text = f"a zoo of at least {LEAST} classifiers of {LEAST_FAMILIES} families, a third of them clean"
    clean, families = sum(not row["backdoored"] for row in own), {row["architecture"] for row in own}
    return text, f"{len(own)} judged, {clean} of them clean, families: {', '.join(sorted(families))}", _verdict(enough(own))


# --- plot ----------------------------------------------------------------------------------------------------------------------------


def draw(found: Sequence[Found], path: Path) -> None:
    """BAN's score over its threshold: one panel a family, clean against backdoored, one dot a classifier."""
    figure, panels = plt.subplots(1, len(found), figsize=(1 + 4.2 * len(found), 4), sharey=True, squeeze=False, layout="constrained")
    for axes, family in zip(panels[0], found, strict=True):
        _panel(axes, family)
    panels[0][0].set_ylabel("score over threshold")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axes: Axes, family: Found) -> None:
    kinds: list[tuple[str, str, Callable[[str], bool]]] = [
        ("clean", CLEAN_COLOUR, lambda attack: attack == CLEAN),
        ("hard clean", HARD_COLOUR, lambda attack: attack in HARD),
        *((name, BAD_COLOUR, lambda attack, name=name: attack == name) for name in ATTACKS),
    ]
    for place, (_, colour, belongs) in enumerate(kinds):
        found = [methods[OURS] for model, methods in family.judged if belongs(model.recipe.attack)]
        axes.plot([place] * len(found), [one.score / one.threshold for one in found], "o", color=colour, alpha=0.7)
    axes.axhline(1, color="black", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(kinds)), [name for name, _, _ in kinds], rotation=45, ha="right")
    axes.set_xlim(-0.6, len(kinds) - 0.4)
    axes.set_ylim(bottom=0)
    axes.set_title(family.family, fontsize=10)
