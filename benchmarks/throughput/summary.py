"""The figures of a run, and the file that holds them for every guard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TypedDict

from noisec.benchmarks.throughput.rows import CLASSIFIER, GUARD, LABELS, Row, choose, middle


class PeerFigures(TypedDict):
    """Images per second of a peer, each at the settings that are its best for that load."""

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


def summary_of(rows: Sequence[Row], many: int) -> Summary:
    """Medians over rounds. Ratios are ratios of medians of measurements that took turns; the added latency is the median over rounds.

    Args:
        many: clients that send single images
    """
    limit = middle(choose(rows, "side by side", tool="in process"))
    served = [row for row in choose(rows, "side by side", tool="perf_analyzer") if (row.batch, row.clients) != (1, many)]
    single = choose(rows, "side by side", tool="perf_analyzer", batch=1, clients=many)
    served_per_second, single_per_second = middle(served or single), middle(single)
    alone, asked = choose(rows, "one client", tool="in process"), choose(rows, "one client", tool="perf_analyzer")
    half = choose(rows, "arrivals", note="0.5 of the throughput")
    return {
        "limit_per_second": limit,
        "served_per_second": served_per_second,
        "served_over_limit": served_per_second / limit,
        "single_image_per_second": single_per_second,
        "single_image_over_limit": single_per_second / limit,
        "label_only_over_bare": label_ratio(rows, (served or single)[0].batch),
        "added_latency_ms": float(median(two.p50_ms - one.p50_ms for one, two in zip(alone, asked, strict=True))),
        "p50_ms": middle(half, "p50_ms"),
        "p99_ms": middle(half, "p99_ms"),
        "peers": {name: peer_figures(rows, name, many) for name in peer_names(rows)},
    }


def label_ratio(rows: Sequence[Row], batch: int) -> float:
    """Throughput of label-only requests over that of the bare classifier."""
    guard, bare = (middle(choose(rows, "labels", what=what, batch=batch)) for what in (LABELS, CLASSIFIER))
    return guard / bare


def peer_names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.what for row in choose(rows, "peers") if row.what != GUARD))


def peer_figures(rows: Sequence[Row], name: str, many: int) -> PeerFigures:
    """A peer's, or with ``GUARD`` this server's own under the same loads."""
    own = choose(rows, "peers", what=name)
    large = [row for row in own if row.batch > 1]
    return {
        "per_second_1x1": best_setting([row for row in own if (row.batch, row.clients) == (1, 1)]),
        "per_second_single_image": best_setting([row for row in own if (row.batch, row.clients) == (1, many)]),
        "per_second_saturated": best_setting(large or own),
    }


def best_setting(rows: Sequence[Row]) -> float:
    """The median over rounds at the setting where it is highest."""
    return max(middle([row for row in rows if row.note == note]) for note in {row.note for row in rows})


def read_summaries(path: Path) -> dict[str, Summary]:
    """Guard -> its figures; empty where there is no file yet."""
    found: dict[str, Summary] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def write_summaries(summaries: Mapping[str, Summary], path: Path) -> None:
    path.write_text(json.dumps(summaries, indent=2, allow_nan=False) + "\n")
