"""The figures of a run, and the file that holds them for every guard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TypedDict

from noisec.benchmarks.throughput.rows import CLASSIFIER, GUARD, HALF, LABELS, MANY, Row, by_setting, choose, middle


class PeerFigures(TypedDict):
    """Images per second of a server, each at the settings that are its best for that load; saturated: the most of these loads and of the
    guard's own best one."""

    per_second_1x1: float
    per_second_single_image: float
    per_second_saturated: float


class Summary(TypedDict):
    """Figures of one guard."""

    limit_per_second: float
    served_per_second: float
    served_over_limit: float
    single_image_per_second: float
    single_image_over_limit: float
    label_only_over_bare: float
    added_latency_ms: float
    p50_ms: float
    p99_ms: float
    peers: dict[str, PeerFigures]


def summary_of(rows: Sequence[Row]) -> Summary:
    """Medians over rounds. Ratios are ratios of medians of measurements that took turns; the added latency is the median over rounds."""
    limit = highest(choose(rows, "side by side", tool="in process"))
    served = by_setting(choose(rows, "side by side", tool="perf_analyzer"))[0]
    single = middle(choose(rows, "side by side", tool="perf_analyzer", batch=1, clients=MANY))
    half = choose(rows, "arrivals", note=HALF)
    return {
        "limit_per_second": limit,
        "served_per_second": middle(served),
        "served_over_limit": middle(served) / limit,
        "single_image_per_second": single,
        "single_image_over_limit": single / limit,
        "label_only_over_bare": label_ratio(rows, served[0].batch, served[0].clients),
        "added_latency_ms": added_latency(rows, GUARD),
        "p50_ms": middle(half, "p50_ms"),
        "p99_ms": middle(half, "p99_ms"),
        "peers": {name: peer_figures(rows, name) for name in peer_names(rows)},
    }


def added_latency(rows: Sequence[Row], what: str) -> float:
    """Milliseconds that one client waits longer for one image than the computation takes in process: the median over rounds."""
    alone, asked = (choose(rows, "one client", what=what, tool=tool) for tool in ("in process", "perf_analyzer"))
    return float(median(two.p50_ms - one.p50_ms for one, two in zip(alone, asked, strict=True)))


def label_ratio(rows: Sequence[Row], batch: int, clients: int) -> float:
    """Throughput of label-only requests over that of the bare classifier."""
    guard, bare = (middle(choose(rows, "labels", what=what, batch=batch, clients=clients)) for what in (LABELS, CLASSIFIER))
    return guard / bare


def peer_names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.what for row in choose(rows, "peers") if row.what != GUARD))


def peer_figures(rows: Sequence[Row], name: str) -> PeerFigures:
    """A peer's."""
    return _figures(choose(rows, "peers", what=name))


def turns_with(rows: Sequence[Row], name: str) -> list[Row]:
    """The guard's own turns with a peer."""
    return choose(rows, "peers", what=GUARD, note=name)


def figures_with(rows: Sequence[Row], name: str) -> PeerFigures:
    """The guard's, in turns with a peer."""
    return _figures(turns_with(rows, name))


def _figures(turns: Sequence[Row]) -> PeerFigures:
    return {
        "per_second_1x1": highest(choose(turns, "peers", batch=1, clients=1)),
        "per_second_single_image": highest(choose(turns, "peers", batch=1, clients=MANY)),
        "per_second_saturated": highest(turns),
    }


def over_peer(rows: Sequence[Row], name: str) -> PeerFigures:
    """The guard's figures in turns with a peer over the peer's: ratios."""
    own, other = figures_with(rows, name), peer_figures(rows, name)
    return {
        "per_second_1x1": _over(own["per_second_1x1"], other["per_second_1x1"]),
        "per_second_single_image": _over(own["per_second_single_image"], other["per_second_single_image"]),
        "per_second_saturated": _over(own["per_second_saturated"], other["per_second_saturated"]),
    }


def _over(own: float, other: float) -> float:
    """Infinite where the other answered nothing."""
    return own / other if other else math.inf


def highest(rows: Sequence[Row]) -> float:
    """The median over rounds at the setting where it is highest."""
    return middle(by_setting(rows)[0])


def read_summaries(path: Path) -> dict[str, Summary]:
    """Guard -> its figures; empty where there is no file yet."""
    found: dict[str, Summary] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def write_summaries(summaries: Mapping[str, Summary], path: Path) -> None:
    path.write_text(json.dumps(summaries, indent=2, allow_nan=False) + "\n")
