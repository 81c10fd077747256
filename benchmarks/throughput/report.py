"""A run's pages: tables, plots, CSV files, and the summary of all guards."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisec.benchmarks.throughput.plots import PLOTS, draw
from noisec.benchmarks.throughput.rows import CLASSIFIER, EVENLY, GUARD, LABELS, MANY, Row, choose, middle, write_csv
from noisec.benchmarks.throughput.summary import (
    Summary,
    added_latency,
    figures_with,
    over_peer,
    peer_figures,
    peer_names,
    read_summaries,
    turns_with,
    write_summaries,
)
from noisec.builders.figures import markdown_table

if TYPE_CHECKING:
    from noisec.benchmarks.throughput.run import Observation, Result

HOW = """*Limit*: the same ONNX files and the same scorer without a server, every pass of the ensemble, at the best number of processes,
threads and batch size. *Served*: the guard's whole answer over gRPC, real images, on the same machine as its load. "perf_analyzer" and
"own load" name the load generator; perf_analyzer always asks for every output. Where a rate is asked for, requests arrive at random
(Poisson) unless said otherwise, whether or not the ones before are answered. Figures are medians over rounds in which what is compared
takes turns. Of servers that take turns only the one that is measured runs.
Labels alone are asked of the model that clients ask for them: of a guard that is one graph, the classifier stage itself, for which that
is no goal."""
GOALS = {"cifar10_resnet20": (0.95, 0.80)}
"""guard -> share of the limit that is wanted of it at saturation, and with single images from 16 clients"""
USUAL_GOALS = (0.80, 0.60)


def write_results(guard: str, result: Result, summary: Summary, facts: Mapping[str, Any], out: Path) -> None:
    """Write the guard's folder below ``out``, and its figures into ``out/summary.json`` beside those of other guards.

    Args:
        facts: ``command``, ``machine``, ``versions``, ``seconds`` and whatever else a reader should know
    """
    folder = out / guard
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(result.rows, folder / "measurements.csv")
    _write_stages(result.observations, folder / "stages.csv")
    draw(result.rows, summary, folder)
    (folder / "README.md").write_text(as_markdown(guard, result, summary, facts))
    summaries = {**read_summaries(out / "summary.json"), guard: summary}
    write_summaries(summaries, out / "summary.json")
    (out / "README.md").write_text(_index(summaries))


def as_markdown(guard: str, result: Result, summary: Summary, facts: Mapping[str, Any]) -> str:
    """Every table of a run."""
    rows = result.rows
    tables = {
        "Goals": goal_table(guard, result, summary),
        "The limit, in process": _table(choose(rows, "limit"), "processes"),
        "Batches and clients": _table([*choose(rows, "batches and clients"), *choose(rows, "shared memory")]),
        "Single images": _table(choose(rows, "single images")),
        "Side by side": _table(choose(rows, "side by side"), "clients or processes"),
        "Labels alone": _medians(choose(rows, "labels")),
        "One client, one image": _table(choose(rows, "one client")),
        "Arrivals of single images": _table(choose(rows, "arrivals"), "requests"),
        "Mixed traffic": _table(choose(rows, "mixed"), "clients or requests"),
        "Other servers": peer_table(result),
        "Settings of other servers": _table(choose(rows, "peer settings")),
        "Soak": _soak_table(result),
        "The server meanwhile": stage_table(result.observations),
    }
    parts = [f"# Throughput of `{guard}`", HOW, _facts(facts)]
    parts += [f"## {title}\n\n{table}" for title, table in tables.items() if table]
    parts += [f"![{title}]({name})" for name, title in PLOTS.items()]
    return "\n\n".join(parts) + "\n"


def goals(guard: str, result: Result, summary: Summary) -> list[tuple[str, str, bool]]:
    """What is wanted, what was measured, and whether that is enough; what was not measured is left out."""
    saturated, single = GOALS.get(guard, USUAL_GOALS)
    tail, even = summary["p99_ms"] / summary["p50_ms"], choose(result.rows, "arrivals", note=EVENLY)
    found = [
        (f"saturated: >= {saturated:.0%} of the limit", f"{summary['served_over_limit']:.1%}", summary["served_over_limit"] >= saturated),
        (
            f"single images, 16 clients: >= {single:.0%} of the limit",
            f"{summary['single_image_over_limit']:.1%}",
            summary["single_image_over_limit"] >= single,
        ),
        *(_label_goal(summary) if result.own_labels else ()),
        (
            "one image, one client: <= 0.5 ms added",
            f"{summary['added_latency_ms']:.2f} ms (the bare classifier: {added_latency(result.rows, CLASSIFIER):.2f} ms)",
            summary["added_latency_ms"] <= 0.5,
        ),
        ("half the load, Poisson arrivals: p99 <= 3 x p50", f"{tail:.2f} x", tail <= 3),
        *(_even_goal(even) if even else ()),
    ]
    return found + _peer_goals(result.rows) + _soak_goals(result)


def _even_goal(rows: Sequence[Row]) -> list[tuple[str, str, bool]]:
    tail = middle(rows, "p99_ms") / middle(rows, "p50_ms")
    return [("half the load, evenly spaced: p99 <= 3 x p50", f"{tail:.2f} x", tail <= 3)]


def _label_goal(summary: Summary) -> list[tuple[str, str, bool]]:
    ratio = summary["label_only_over_bare"]
    return [("labels alone: >= 97% of the bare classifier", f"{ratio:.1%}", ratio >= 0.97)]


def goal_table(guard: str, result: Result, summary: Summary) -> str:
    rows = [[goal, measured, "met" if met else "**not met**"] for goal, measured, met in goals(guard, result, summary)]
    return markdown_table(["goal", "measured", ""], rows)


def _peer_goals(rows: Sequence[Row]) -> list[tuple[str, str, bool]]:
    """Beside the peer that does best in turns with the guard."""
    ratios = {name: over_peer(rows, name) for name in peer_names(rows)}
    if not ratios:
        return []
    many, best = min((ratio["per_second_single_image"], name) for name, ratio in ratios.items())
    one, quickest = min((ratio["per_second_1x1"], name) for name, ratio in ratios.items())
    return [
        ("single images, 16 clients: >= 2 x the best other server", f"{many:.2f} x {best}", many >= 2),
        ("one image, one client: no slower than another server", f"{one:.2f} x {quickest}", one >= 1),
    ]


def _soak_goals(result: Result) -> list[tuple[str, str, bool]]:
    soak = choose(result.rows, "soak")
    if not soak:
        return []
    failed = [("80% load: no failed request", str(sum(row.failed for row in soak)), not any(row.failed for row in soak))]
    if not result.memory:
        return failed
    growth = memory_growth(result.memory)
    return [*failed, ("80% load: memory grows <= 2%", f"{growth:.2%}", growth <= 0.02)]


def memory_growth(megabytes: Sequence[float]) -> float:
    """The mean of the last fifth over that of the first one, less 1."""
    part = max(1, len(megabytes) // 5)
    return sum(megabytes[-part:]) / sum(megabytes[:part]) - 1


def peer_table(result: Result) -> str:
    """Images per second of each peer at its best settings; below, the guard's in turns with it, and their ratio to the peer's."""
    names = peer_names(result.rows)
    if not names and not result.absent:
        return ""
    rows = [line for name in names for line in _beside(result.rows, name)]
    heads = [
        "server",
        "encoding",
        "1 image, 1 client",
        f"1 image, {MANY} clients",
        f"the most of these and of {_batches(result.rows)}",
        "failed",
    ]
    return "\n\n".join(
        [markdown_table(heads, rows)] * bool(names) + [f"{name} was not measured: {reason}" for name, reason in result.absent.items()]
    )


def _batches(rows: Sequence[Row]) -> str:
    """The load of batches that every peer has: the one that is this server's best."""
    loads = {(row.batch, row.clients) for row in choose(rows, "peers")} - {(1, 1), (1, MANY)}
    return ", ".join(f"{batch} images, {clients} clients" for batch, clients in sorted(loads)) or "no others"


def _beside(rows: Sequence[Row], name: str) -> list[list[str]]:
    """A peer's line, and that of the guard in turns with it."""
    other, own = choose(rows, "peers", what=name), turns_with(rows, name)
    theirs = [f"{value:,.0f}" for value in peer_figures(rows, name).values()]
    pairs = zip(figures_with(rows, name).values(), over_peer(rows, name).values(), strict=True)
    ours = [f"{value:,.0f} ({ratio:.2f} x)" for value, ratio in pairs]
    return [
        [name, other[0].note.split("; ")[-1], *theirs, str(sum(row.failed for row in other))],
        [f"**{GUARD}**, in turns with it", "binary over gRPC", *ours, str(sum(row.failed for row in own))],
    ]


def stage_table(observations: Sequence[Observation]) -> str:
    """Triton's statistics; rounds of the same load one below the other."""
    heads = [
        "during",
        "model",
        "requests",
        "images a batch",
        "queue ms",
        "input ms",
        "infer ms",
        "output ms",
        "processor ms an image",
        "server MB",
    ]
    rows = [
        [
            one.during,
            stage.model,
            str(stage.requests),
            f"{stage.mean_batch:.1f}",
            *(f"{value:.2f}" for value in (stage.queue_ms, stage.input_ms, stage.infer_ms, stage.output_ms)),
            _cell(one.cpu_ms),
            _cell(one.memory_mb, 0),
        ]
        for one in observations
        for stage in one.stages
    ]
    return markdown_table(heads, rows)


def _write_stages(observations: Sequence[Observation], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        heads = [
            "during",
            "model",
            "requests",
            "failed",
            "images",
            "executions",
            "queue_ms",
            "input_ms",
            "infer_ms",
            "output_ms",
            "batches",
        ]
        writer.writerow(heads)
        for one in observations:
            for stage in one.stages:
                sizes = " ".join(f"{size}x{count}" for size, count in stage.batches.items())
                writer.writerow([one.during, *(_plain(getattr(stage, name)) for name in heads[1:-1]), sizes])


def _plain(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def _table(rows: Sequence[Row], clients: str = "clients") -> str:
    if not rows:
        return ""
    heads = ["what", "tool", "batch", clients, "images/s", "p50 ms", "p95 ms", "p99 ms", "failed", ""]
    return markdown_table(heads, [_line(row) for row in rows])


def _line(row: Row) -> list[str]:
    load = f"{row.rate:.0f}/s" if row.rate else str(row.clients)
    times = [_cell(value, 2) for value in (row.p50_ms, row.p95_ms, row.p99_ms)]
    return [row.what, row.tool, str(row.batch or "mixed"), load, f"{row.per_second:,.0f}", *times, str(row.failed), row.note]


def _medians(rows: Sequence[Row]) -> str:
    """Label-only requests beside the bare classifier, one line for each load."""
    loads = dict.fromkeys((row.batch, row.clients) for row in rows)
    lines = []
    for batch, clients in loads:
        guard, bare = (middle(choose(rows, "labels", what=what, batch=batch, clients=clients)) for what in (LABELS, CLASSIFIER))
        lines.append([str(batch), str(clients), f"{guard:,.0f}", f"{bare:,.0f}", f"{guard / bare:.1%}"])
    return markdown_table(["batch", "clients", "guard, label only: images/s", "classifier: images/s", "ratio"], lines)


def _soak_table(result: Result) -> str:
    rows = choose(result.rows, "soak")
    answered = [row for row in rows if not row.failed]
    if not answered:
        return "\n\n".join(row.note for row in rows)
    images, tail = sum(row.per_second for row in answered) / len(answered), max(row.p99_ms for row in answered)
    memory = f"memory {result.memory[0]:,.1f} MB after the first part, {result.memory[-1]:,.1f} MB after the last one"
    found = f"{images:,.0f} images/s in {len(answered)} parts; p99 {tail:.1f} ms in the worst part; {memory}."
    return "\n\n".join([found, *(row.note for row in rows if row.failed)])


def _cell(value: float, digits: int = 2) -> str:
    return "" if value != value else f"{value:.{digits}f}"


def _facts(facts: Mapping[str, Any]) -> str:
    listed = {
        name: ", ".join(f"{key} {one}" for key, one in value.items()) if isinstance(value, Mapping) else value
        for name, value in facts.items()
    }
    command = listed.pop("command")
    return f"```sh\n{command}\n```\n\n" + "\n".join(f"- {name}: {value}" for name, value in listed.items())


def _index(summaries: Mapping[str, Summary]) -> str:
    heads = [
        "guard",
        "limit/s",
        "served/s",
        "of the limit",
        "single images/s",
        "of the limit",
        "labels alone",
        "added ms",
        "p50 ms",
        "p99 ms",
    ]
    rows = [
        [
            f"[{guard}]({guard}/README.md)",
            f"{one['limit_per_second']:,.0f}",
            f"{one['served_per_second']:,.0f}",
            f"{one['served_over_limit']:.1%}",
            f"{one['single_image_per_second']:,.0f}",
            f"{one['single_image_over_limit']:.1%}",
            f"{one['label_only_over_bare']:.1%}",
            f"{one['added_latency_ms']:.2f}",
            f"{one['p50_ms']:.2f}",
            f"{one['p99_ms']:.2f}",
        ]
        for guard, one in summaries.items()
    ]
    return "\n\n".join(["# Throughput", HOW, markdown_table(heads, rows)]) + "\n"
