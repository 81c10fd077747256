"""Every measurement is a row; figures are medians of rows."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal, TypeVar

from noisec.benchmarks.throughput.limit import Speed
from noisec.benchmarks.throughput.load import Load
from noisec.benchmarks.throughput.perf import Perf

Compared = TypeVar("Compared")
Part = Literal[
    "limit",
    "batches and clients",
    "single images",
    "side by side",
    "shared memory",
    "labels",
    "one client",
    "arrivals",
    "mixed",
    "peer settings",
    "peers",
    "soak",
]
"""which question the measurement answers"""
GUARD: Final = "guard"
CLASSIFIER: Final = "classifier"
LABELS = "guard, label only"
NONE = float("nan")
HALF = "0.5 of the throughput"
"""note of single images at Poisson arrivals, at half of what many clients reach"""
EVENLY = f"{HALF}, evenly spaced"
MANY = 16
"""clients that send single images"""
CONTENDERS = 2
"""settings that a sweep passes on: the best of one short measurement each may have been lucky"""


@dataclass(frozen=True)
class Row:
    """One measurement. Figures that a tool does not give are NaN."""

    part: Part
    what: str
    """what was asked: the guard, its bare classifier, or a peer"""
    tool: str
    """"in process", "perf_analyzer" or "own load" """
    batch: int
    clients: int
    """requests under way, or processes that compute; 0 where a rate was given"""
    rate: float
    """requests per second, at Poisson arrivals or evenly spaced; 0 where clients were"""
    per_second: float
    """images"""
    p50_ms: float
    p95_ms: float
    p99_ms: float
    failed: int
    note: str = ""
    """settings or circumstances; of the guard in turns with a peer, the peer's name"""


def in_turns(rounds: int, compared: Sequence[Compared]) -> Iterator[Compared]:
    """Each once in every round, in the opposite order in every second one: what follows another load finds colder caches than what follows
    its own kind, and that must not be the same one's lot every time."""
    for turn in range(rounds):
        yield from compared[::-1] if turn % 2 else compared


def of_speed(part: Part, speed: Speed) -> Row:
    note = f"{speed.threads} threads each"
    return Row(part, speed.what, "in process", speed.batch, speed.processes, 0, speed.per_second, speed.p50_ms, NONE, NONE, 0, note)


def of_perf(part: Part, what: str, perf: Perf, rate: float = 0, note: str = "") -> Row:
    times = (perf.p50_ms, perf.p95_ms, perf.p99_ms)
    return Row(part, what, "perf_analyzer", perf.batch, perf.clients, rate, perf.per_second, *times, 0, note)


def of_failure(part: Part, what: str, rate: float, why: str) -> Row:
    """A measurement by perf_analyzer of single images that a failed request has ended."""
    return Row(part, what, "perf_analyzer", 1, 0, rate, 0, NONE, NONE, NONE, 1, why)


def of_load(part: Part, what: str, load: Load, batch: int, clients: int = 0, rate: float = 0, note: str = "") -> Row:
    times = (load.p50_ms, load.p95_ms, load.p99_ms)
    return Row(part, what, "own load", batch, clients, rate, load.per_second, *times, load.failed, note)


def choose(rows: Iterable[Row], part: Part, **wanted: Any) -> list[Row]:
    """Rows of a part whose fields have these values."""
    return [row for row in rows if row.part == part and all(getattr(row, name) == value for name, value in wanted.items())]


def middle(rows: Sequence[Row], figure: str = "per_second") -> float:
    """Median of a figure."""
    return float(median(getattr(row, figure) for row in rows))


def by_setting(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of the same batch, clients and note together, the group with the highest throughput first."""
    groups: dict[tuple[int, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.batch, row.clients, row.note), []).append(row)
    return sorted(groups.values(), key=middle, reverse=True)


def write_csv(rows: Iterable[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in asdict(row).items()} for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if value != value else f"{value:.5g}"
    return value
