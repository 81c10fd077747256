"""Throughput against concurrency, and latency against load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from noisec.benchmarks.throughput.rows import EVENLY, Row, choose, middle
from noisec.benchmarks.throughput.summary import Summary

PLOTS = {"throughput.png": "Throughput against concurrency", "latency.png": "Latency against load"}


def draw(rows: Sequence[Row], summary: Summary, folder: Path) -> None:
    """Write the plots."""
    _throughput(rows, summary["limit_per_second"], folder / "throughput.png")
    _latency(rows, summary["single_image_per_second"], folder / "latency.png")


def _throughput(rows: Sequence[Row], limit: float, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    measured = [*choose(rows, "batches and clients"), *choose(rows, "single images")]
    for batch in sorted({row.batch for row in measured}):
        of_batch = [row for row in measured if row.batch == batch]
        clients = sorted({row.clients for row in of_batch})
        axes.plot(clients, [middle([row for row in of_batch if row.clients == one]) for one in clients], marker="o", label=f"batch {batch}")
    axes.axhline(limit, color="black", linestyle="--", linewidth=1, label="limit, without a server")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="clients", ylabel="images per second", ylim=(0, None), title="Throughput (perf_analyzer, every output)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _latency(rows: Sequence[Row], capacity: float, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    arrivals = [row for row in choose(rows, "arrivals") if row.note != EVENLY]
    rates = sorted({row.rate for row in arrivals})
    for name in ("p50_ms", "p95_ms", "p99_ms"):
        values = [middle([row for row in arrivals if row.rate == rate], name) for rate in rates]
        axes.plot([rate / capacity for rate in rates], values, marker="o", label=name.removesuffix("_ms"))
    axes.set(xlabel="Poisson arrivals, as a share of the throughput of single images", ylabel="ms", yscale="log")
    axes.set_title("Latency of single images")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
