"""Cells of a detection benchmark: written, read, grouped over seeds, chosen and shown."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from noisec.benchmarks.detection import published
from noisec.benchmarks.detection.cells import Cell
from noisec.builders.figures import percent
from noisec.errors import NoisecError

SUCCESSFUL = " (successful)"
LADDER = ("gray-box", "query", "adaptive")
UNPOISONED = ("white-box", "black-box", *LADDER)
"""accesses whose false alarms are the guard's own; a backdoor's are those of a guard around another classifier"""
OPTIONAL = ("joint_success", "fpr_natural_noise", "note")
"""keys of a summary's row that are left out where there is nothing to say"""
LEAST = 100
"""triggered images that succeed, below which nothing is said of a backdoor"""
DASH = "-"


@dataclass(frozen=True)
class Row:
    """Cells that differ in their seed only."""

    cells: tuple[Cell, ...]

    @property
    def cell(self) -> Cell:
        return self.cells[0]

    def values(self, figure: str) -> list[float]:
        return [value for value in (getattr(cell, figure) for cell in self.cells) if value is not None]

    def mean(self, figure: str) -> float | None:
        values = self.values(figure)
        return float(np.mean(values)) if values else None

    def share(self, figure: str) -> str:
        """As a percentage."""
        return _shown(self.values(figure), percent)

    def number(self, figure: str) -> str:
        return _shown(self.values(figure), three)


@dataclass(frozen=True)
class Paired:
    """A detector and the default one, each as mean AUROC and mean TPR at 1 %, over the attacks that both were measured on."""

    attacks: int
    own: tuple[float, float]
    default: tuple[float, float]

    def ahead(self) -> list[str]:
        """What the detector beats the default in, in words."""
        names: tuple[tuple[str, Callable[[float], str]], ...] = (("mean AUROC", three), ("mean TPR at 1 %", percent))
        pairs = zip(names, self.own, self.default, strict=True)
        return [f"{name} {show(own)} against {show(default)}" for (name, show), own, default in pairs if own > default + 1e-9]


def over_seeds(cells: Iterable[Cell]) -> list[Row]:
    """One row for all seeds, in the order in which they first come."""
    found: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        key = (cell.dataset, cell.guard, cell.detector, cell.protocol, cell.access, cell.attack, cell.eps, cell.note)
        found.setdefault(key, []).append(cell)
    return [Row(tuple(group)) for group in found.values()]


def read_summary(path: Path) -> list[Cell]:
    """The cells of a ``summary.json``.

    Raises:
        NoisecError: the file is not there or holds something else.
    """
    try:
        return [Cell(**row) for row in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise NoisecError(f"{path} holds no detection figures: {error}") from error


def summary_row(cell: Cell) -> dict[str, Any]:
    """A cell as ``summary.json`` has it."""
    return {key: value for key, value in asdict(cell).items() if key not in OPTIONAL or value not in (None, "")}


def write_summary(cells: Sequence[Cell], path: Path) -> None:
    path.write_text(json.dumps([summary_row(cell) for cell in cells], indent=1, allow_nan=False) + "\n")


def write_csv(cells: Sequence[Cell], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Cell)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(cell) for cell in cells)


def guards_of(rows: Iterable[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row.cell.dataset, row.cell.guard) for row in rows))


def rows_of(rows: Iterable[Row], data: str, guard: str) -> list[Row]:
    """Those of one guard on one data set."""
    return [row for row in rows if (row.cell.dataset, row.cell.guard) == (data, guard)]


def detectors_of(rows: Iterable[Row]) -> list[str]:
    """The default first."""
    names = dict.fromkeys(row.cell.detector for row in rows)
    return sorted(names, key=lambda name: name != "default")


def choose(rows: Iterable[Row], protocol: str | None, access: Sequence[str] | None, detector: str) -> list[Row]:
    """None stands for any."""
    return [
        row
        for row in rows
        if row.cell.detector == detector
        and (protocol is None or row.cell.protocol == protocol)
        and (access is None or row.cell.access in access)
    ]


def ordered(rows: Iterable[Row]) -> list[Row]:
    """By access, attack and eps; the successful ones below all."""
    accesses = (*UNPOISONED, "backdoor")

    def place(row: Row) -> tuple[int, int, str, float, bool]:
        name = row.cell.attack.removesuffix(SUCCESSFUL)
        known = published.ATTACKS.index(name) if name in published.ATTACKS else len(published.ATTACKS)
        return accesses.index(row.cell.access), known, name, row.cell.eps, name != row.cell.attack

    return sorted(rows, key=place)


def successful(rows: Iterable[Row], detector: str) -> dict[str, list[Row]]:
    """The paper's attacks on the classifier itself, at its eps, where they succeeded."""
    found: dict[str, list[Row]] = {}
    for row in choose(rows, "honest", ("white-box",), detector):
        cell = row.cell
        name = cell.attack.removesuffix(SUCCESSFUL)
        if name in published.ATTACKS and cell.attack != name and published.at_paper_eps(cell.dataset, name, cell.eps):
            found.setdefault(name, []).append(row)
    return found


def each_backdoor(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of successful triggers where there are any, else of all."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.cell.attack.removesuffix(SUCCESSFUL), []).append(row)
    return {name: [row for row in group if row.cell.attack.endswith(SUCCESSFUL)] or group for name, group in found.items()}


def not_taken(rows: Iterable[Row]) -> dict[str, float]:
    """Backdoors that their classifier hardly learned, and the share of the triggered images on which they succeed."""
    whole = [row for row in rows if not row.cell.attack.endswith(SUCCESSFUL)]
    shares = [row.mean("success") or 0.0 for row in whole]
    return {row.cell.attack: share for row, share in zip(whole, shares, strict=True) if share * row.cell.n_malicious < LEAST}


def values_of(rows: Iterable[Row], figure: str) -> list[float]:
    """A figure's means over seeds."""
    return [mean for mean in (row.mean(figure) for row in rows) if mean is not None]


def alarms(rows: Iterable[Row], figure: str) -> list[float]:
    """Each guard's own false-alarm rate on harmless images, mean over seeds; all rows of one seed have the same."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for cell in (cell for row in choose(rows, "honest", UNPOISONED, "default") for cell in row.cells):
        if getattr(cell, figure) is not None:
            found.setdefault((cell.dataset, cell.guard), {})[cell.seed] = getattr(cell, figure)
    return [float(np.mean(list(of_seeds.values()))) for of_seeds in found.values()]


def figures_of(found: Mapping[str, Sequence[Row]]) -> dict[str, tuple[float, float]]:
    """Attack -> AUROC and TPR at 1 %; without attacks that left nothing to detect."""
    figures = {name: [values_of(group, figure) for figure in ("auroc", "tpr_at_1pct")] for name, group in found.items()}
    return {name: (float(np.mean(one)), float(np.mean(two))) for name, (one, two) in figures.items() if one and two}


def means_of(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    first, second = np.mean(pairs, axis=0)
    return float(first), float(second)


def paired(rows: Sequence[Row], detector: str) -> Paired | None:
    """A detector against the default one: successful white-box attacks of the paper, at its eps, honest protocol."""
    own, default = figures_of(successful(rows, detector)), figures_of(successful(rows, "default"))
    shared = [attack for attack in default if attack in own]
    if not shared:
        return None
    return Paired(len(shared), means_of([own[attack] for attack in shared]), means_of([default[attack] for attack in shared]))


def standing(row: Row) -> Literal["within", "above", "below"] | None:
    """Where our AUROC lies against two standard errors around the paper's; None where the paper has no such cell."""
    paper, ours = paper_of(row), row.mean("auroc")
    if paper is None or ours is None:
        return None
    low, high = published.band(paper)
    return "below" if ours < low else "above" if ours > high else "within"


def paper_of(row: Row) -> float | None:
    cell = row.cell
    return published.paper_auroc(cell.dataset, cell.detector, cell.access, cell.attack, cell.eps)


def _shown(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Mean and standard deviation."""
    if not values:
        return DASH
    spread = f" ± {show(float(np.std(values, ddof=1)))}" if len(values) > 1 else ""
    return show(float(np.mean(values))).removesuffix(" %" if spread else "") + spread


def range_of(shares: Sequence[float]) -> str:
    if not shares:
        return DASH
    low, high = percent(min(shares), 2), percent(max(shares), 2)
    return low if low == high else f"{low} to {high}"


def three(value: float) -> str:
    return f"{value:.3f}"


def data_name(dataset: str) -> str:
    return published.NAMES.get(dataset, dataset)
