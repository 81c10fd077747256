"""What a guard is meant to reach, judged by its rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from noisec.benchmarks.detection import published
from noisec.benchmarks.detection.cells import Cell
from noisec.benchmarks.detection.rows import (
    DASH,
    LEAST,
    Row,
    alarms,
    choose,
    data_name,
    detectors_of,
    each_backdoor,
    figures_of,
    guards_of,
    means_of,
    not_taken,
    ordered,
    over_seeds,
    paired,
    range_of,
    rows_of,
    standing,
    successful,
    three,
)
from noisec.builders.figures import markdown_table, percent

Verdict = Literal["met", "not met", "not measured"]
Judged = tuple[str, str, Verdict]
"""goal, figure, verdict"""

FPR_BOUNDS = (0.005, 0.015)
QUERIES = 1000


@dataclass(frozen=True)
class Goal:
    dataset: str
    guard: str
    text: str
    figure: str
    verdict: Verdict


def goals(cells: Sequence[Cell]) -> list[Goal]:
    """Every goal of every guard; those on backdoors are a data set's, as each backdoor may have a guard of its own."""
    rows, found = over_seeds(cells), []
    for data, guard in guards_of(rows):
        found += [Goal(data, guard, *one) for one in _guard_goals(rows_of(rows, data, guard), data, guard)]
    for data in dict.fromkeys(row.cell.dataset for row in rows):
        found += [Goal(data, "all", *one) for one in _backdoor_goals([row for row in rows if row.cell.dataset == data])]
    return found


def goal_table(found: Sequence[Goal]) -> str:
    table = [[data_name(goal.dataset), goal.guard, goal.text, goal.figure, goal.verdict] for goal in found]
    return markdown_table(["data set", "guard", "goal", "measured", "verdict"], table) if table else "Nothing was measured."


def _guard_goals(rows: Sequence[Row], data: str, guard: str) -> list[Judged]:
    return [
        *(_as_published(rows) if data == "cifar10" and guard in published.RECIPE_GUARDS else []),
        *_strength(rows),
        _never_behind(rows),
        _alarms(rows, "clean images", "fpr"),
        _alarms(rows, "natural-noise images", "fpr_natural_noise"),
        _joint(rows, "gray-box transfer at the paper's eps: joint success <= .15", "gray-box", 0.15),
        _joint(rows, f"query attacker with {QUERIES} label-and-verdict queries an image: joint success <= .50", "query", 0.50),
        _adaptive(rows),
    ]


def _judge(met: bool, measured: bool) -> Verdict:
    return "not measured" if not measured else "met" if met else "not met"


def _as_published(rows: Sequence[Row]) -> list[Judged]:
    """The paper's detector goes by its own name; fitted on the tested images, as in the paper, it is judged apart."""
    names = [name for name in detectors_of(rows) if name.startswith("NoiSec")] or ["default"]
    return [_beside_published(rows, name) for name in names]


def _beside_published(rows: Sequence[Row], detector: str) -> Judged:
    chosen = {
        published.family(row.cell.attack): row for row in choose(rows, "published", ("white-box",), detector) if standing(row) is not None
    }
    below = [attack for attack, row in chosen.items() if standing(row) == "below"]
    figure = f"{len(chosen) - len(below)} of {len(chosen)} cells" + (f", below: {', '.join(below)}" if below else "") if chosen else DASH
    complete = len(chosen) == len(published.ATTACKS)
    text = f"published protocol, white-box, {detector}: each cell within two standard errors of the paper's or above"
    return text, figure + _missing(published.ATTACKS, chosen), _judge(not below, complete or bool(below))


def _strength(rows: Sequence[Row]) -> list[Judged]:
    found = successful(rows, "default")
    text = "honest protocol, successful white-box attacks at the paper's eps"
    return _mean_goals(text, found, published.ATTACKS, (0.97, 0.80))


def _backdoor_goals(rows: Sequence[Row]) -> list[Judged]:
    """A backdoor that succeeds on too few images, not learnt or tried on few, is named and counts nowhere."""
    chosen = choose(rows, "honest", ("backdoor",), "default")
    weak = not_taken(chosen)
    found = {name: group for name, group in each_backdoor(chosen).items() if name not in weak}
    judged = _mean_goals("honest protocol, backdoors", found, [name for name in published.BACKDOORS if name not in weak], (0.95, 0.70))
    if not weak:
        return judged
    shares = ", ".join(f"{name} (succeeds on {percent(share)})" for name, share in weak.items())
    left = f"; fewer than {LEAST} images on which they succeed: {shares}"
    return [(text, figure + left, "not measured" if verdict == "met" else verdict) for text, figure, verdict in judged]


def _mean_goals(text: str, found: Mapping[str, Sequence[Row]], wanted: Sequence[str], least: tuple[float, float]) -> list[Judged]:
    """Mean AUROC and mean TPR at 1 %; a goal is only measured once every attack is."""
    measured = figures_of({attack: found[attack] for attack in wanted if attack in found})
    texts = [f"{text}: mean AUROC >= {_short(least[0])}", f"{text}: mean TPR at 1 % >= {_short(least[1])}"]
    if not measured:
        return [(one, DASH + _missing(wanted, found), "not measured") for one in texts]
    means, complete = means_of(list(measured.values())), all(attack in found for attack in wanted)
    failed = [attack for attack in wanted if attack in found and attack not in measured]
    rest = (f"; none succeeded: {', '.join(failed)}" if failed else "") + _missing(wanted, found)
    shown = (three(means[0]), percent(means[1]))
    return [
        (one, figure + rest, _judge(mean >= least[at], complete))
        for at, (one, figure, mean) in enumerate(zip(texts, shown, means, strict=True))
    ]


def _never_behind(rows: Sequence[Row]) -> Judged:
    text = "never below an ablation or baseline on these two means"
    others = {name: pair for name in detectors_of(rows) if name != "default" and (pair := paired(rows, name)) is not None}
    ahead = [f"{name}: {'; '.join(pair.ahead())}" for name, pair in others.items() if pair.ahead()]
    return (
        text,
        ("ahead is " + ", ".join(ahead) if ahead else f"ahead of or level with {len(others)}") if others else DASH,
        _judge(not ahead, bool(others)),
    )


def _alarms(rows: Sequence[Row], images: str, figure: str) -> Judged:
    values = alarms(rows, figure)
    met = all(FPR_BOUNDS[0] <= value <= FPR_BOUNDS[1] for value in values)
    return f"false alarms on {images} at a nominal 1 %: .5 % to 1.5 %", range_of(values), _judge(met, bool(values))


def _joint(rows: Sequence[Row], text: str, access: str, most: float) -> Judged:
    """The worst of an access's attackers."""
    chosen = [row for row in choose(rows, None, (access,), "default") if row.mean("joint_success") is not None and _counts(row)]
    if not chosen:
        return text, DASH, "not measured"
    worst = max(chosen, key=lambda row: row.mean("joint_success") or 0.0)
    value = worst.mean("joint_success") or 0.0
    return text, f"{percent(value)} ({worst.cell.attack})", _judge(value <= most, True)


def _counts(row: Row) -> bool:
    """Whether an attacker keeps to the paper's eps (or has none), and one with queries to their kind and number, where it says so.

    The note that ``run.py`` writes is "label and verdict" or "label, verdict and score"; only the first counts.
    """
    cell = row.cell
    bounded = cell.eps == 0 or published.at_paper_eps(cell.dataset, cell.attack, cell.eps)
    if cell.access != "query":
        return bounded
    said = f"{cell.attack} {cell.note}".lower()
    budgets = [int(number.replace(",", "")) for number in re.findall(r"([\d,]*\d) (?:[a-z-]+ )*queries", said)]
    scored = "score" in re.sub(r"\b(?:no|without)(?: the)? scores?\b", "", said)
    return bounded and not scored and (not budgets or QUERIES in budgets)


def _adaptive(rows: Sequence[Row]) -> Judged:
    chosen = [row for row in ordered(choose(rows, None, ("adaptive",), "default")) if row.mean("joint_success") is not None]
    worst: dict[float, float] = {}
    for row in chosen:
        worst[row.cell.eps] = max(worst.get(row.cell.eps, 0.0), row.mean("joint_success") or 0.0)
    figure = "joint success " + ", ".join(f"{percent(value)} at eps {eps:g}" for eps, value in sorted(worst.items())) if worst else DASH
    return "adaptive white-box attacker: reported, whatever it is", figure, _judge(True, bool(worst))


def _missing(wanted: Sequence[str], found: Iterable[str]) -> str:
    missing = [name for name in wanted if name not in set(found)]
    return f"; not measured: {', '.join(missing)}" if missing else ""


def _short(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")
