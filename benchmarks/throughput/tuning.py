"""Which serving settings suit this machine: measured on the real server, one setting changed at a time, within a time budget."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from noisec import contract
from noisec.benchmarks.throughput.load import Generator, Load, Traffic, generator, triton
from noisec.benchmarks.throughput.rows import in_turns
from noisec.benchmarks.throughput.target import CORES, Target
from noisec.builders.layout import rearrange
from noisec.builders.progress import bar, console
from noisec.builders.spec import GuardSpec, ServingSpec
from noisec.errors import NoisecError
from noisec.python_backend.server import EmbeddedServer

Goal = Literal["throughput", "latency"]
ROUNDS = 2
"""turns that a setting and the present one take, side by side: other work on the machine slows both"""
LEAST_GAIN = 1.02
"""by which a setting has to beat another one, as measurements scatter"""


@dataclass(frozen=True)
class Wish:
    """What is asked of the settings."""

    goal: Goal
    clients: int
    """each with one request under way"""
    batch: int
    """images in a request"""
    latency_ms: float | None
    """``latency``: bound of the 99th percentile"""

    def __post_init__(self) -> None:
        if (self.goal == "latency") != (self.latency_ms is not None):
            raise NoisecError("--latency-ms goes with --goal latency, which needs it")

    def value(self, trial: Trial) -> float:
        """The higher, the better: the gain, or where the bound is not met minus the latency, so that what meets it always wins."""
        return trial.gain if self.latency_ms is None or trial.load.p99_ms <= self.latency_ms else -trial.load.p99_ms

    def beats(self, one: Trial, other: Trial) -> bool:
        """Whether ``one`` is better than ``other`` by more than scatter."""
        first, second = self.value(one), self.value(other)
        return first > second * LEAST_GAIN if second > 0 else first > second / LEAST_GAIN


@dataclass(frozen=True)
class Trial:
    """A setting and what was measured of it."""

    serving: ServingSpec
    load: Load
    """of its median turn; of two, the slower one: the faster one may have been lucky"""
    gain: float
    """images a second over those of the present setting, measured in turns: the median ratio"""


@dataclass(frozen=True)
class Tuning:
    """What a sweep found."""

    trials: list[Trial]
    """the present setting first, in the order of measurement"""
    best: Trial
    complete: bool
    """whether the budget was enough for every axis"""


def axes(present: ServingSpec, runtime: str, cores: int, batch: int, *, remembers: bool = False) -> list[list[dict[str, Any]]]:
    """Changes of the serving settings that are tried with requests of ``batch`` images, axis by axis; the ones that matter most first.

    A guard in one process or graph is tried with one for each core: with fewer of them it leaves cores idle. TensorRT plans stay in their
    layout, and take no larger batches than they were compiled for.

    Args:
        remembers: whether the guard has a memory, which a graph has not
    """
    largest = present.max_batch_size
    layouts: list[dict[str, Any]] = [
        {"layout": "fused"},
        *({"layout": layout, "instances": cores} for layout in ("fused", "single", *(() if remembers else ("graph",)))),
    ]
    others: dict[str, list[int]] = {
        "instances": sorted({1, 2, cores}),
        "preferred_batch_size": [0, 4, 8],
        "scorer_delay_microseconds": [0, 100, 300],
        "queue_delay_microseconds": [0, 200, 1000],
        "max_batch_size": [max(batch, largest // 4), *([2 * largest] if runtime == "onnxruntime" else [])],
    }
    further: list[list[dict[str, Any]]] = [[{name: value} for value in values] for name, values in others.items()]
    found = [layouts, *further] if runtime == "onnxruntime" else further
    return [[change for change in axis if present.model_copy(update=change) != present] for axis in found]


def without_effect(serving: ServingSpec, change: Mapping[str, Any]) -> bool:
    """Whether a change says nothing to a guard that is served so: one that is a single model has no scorer stage that could wait, and what
    no batch exceeds does not part it."""
    waits_in_vain = serving.is_one_model and set(change) == {"scorer_delay_microseconds"}
    return waits_in_vain or ("preferred_batch_size" in change and serving.preferred_batch_size >= serving.max_batch_size)


def tune(repository: Path, guard: str, wish: Wish, seconds: float, cache: Path, measure_seconds: float = 1.5) -> Tuning:
    """Try settings one axis after the other, each from the best so far, until the budget is used up; the repository is only read.

    Args:
        wish: what the best one is best at
        seconds: budget
        cache: folder for decoded images
        measure_seconds: length of each measurement

    Raises:
        NoisecError: the guard or its data is not there, its server does not start, or it takes no requests of that size.
    """
    target = Target.newest(repository, guard)
    present = target.spec.serving
    if wish.batch > present.max_batch_size:
        raise NoisecError(f"--batch {wish.batch}: {guard} takes at most {present.max_batch_size} images in a request")
    open_axes = axes(present, target.spec.runtime, CORES, wish.batch, remembers=target.spec.memory is not None)
    deadline, cost = time.monotonic() + seconds, 0.0
    steps = 1 + sum(map(len, open_axes))
    with generator(target.images(cache)) as load, served(target, present) as url, bar("tuning", steps) as shown:
        measure = partial(_measure, load, guard, wish, measure_seconds)
        trials = [Trial(present, measure(url), 1.0)]
        best, complete = trials[0], True
        for axis in open_axes:
            for change in axis:
                start, serving = time.monotonic(), best.serving.model_copy(update=change)
                if serving in [one.serving for one in trials] or without_effect(serving, change):
                    shown.advance("nothing to measure")
                    continue
                if start + cost > deadline:
                    complete = False
                    continue
                try:
                    with served(target, serving) as other:
                        trials.append(_in_turns(measure, serving, url, other))
                except NoisecError as error:  # the others' measurements count all the same
                    console.print(f"  {change} does not run here: {error}", style="yellow")
                    shown.advance("does not run")
                    continue
                best = trials[-1] if wish.beats(trials[-1], best) else best
                shown.advance(f"{trials[-1].gain:.2f} of the present throughput; best {best.gain:.2f}")
                cost = max(cost, time.monotonic() - start)
    return Tuning(trials, best, complete)


def _in_turns(measure: partial[Load], serving: ServingSpec, present: str, other: str) -> Trial:
    loads: dict[str, list[Load]] = {present: [], other: []}
    for url in in_turns(ROUNDS, [present, other]):
        loads[url].append(measure(url))
    gain = statistics.median(new.per_second / old.per_second for old, new in zip(*loads.values(), strict=True))
    return Trial(serving, sorted(loads[other], key=lambda load: load.per_second)[(ROUNDS - 1) // 2], gain)


def _measure(load: Generator, guard: str, wish: Wish, seconds: float, url: str) -> Load:
    return load.closed([Traffic(partial(triton, url, guard, contract.OUTPUTS), wish.batch)], wish.clients, seconds)


@contextmanager
def served(target: Target, serving: ServingSpec) -> Iterator[str]:
    """gRPC address of a server with a copy of the guard's newest release, served so."""
    with tempfile.TemporaryDirectory() as folder:
        rearrange(target.repository, target.name, serving, Path(folder))
        with EmbeddedServer(Path(folder)) as server:
            yield server.grpc_url


def memories(spec: GuardSpec, serving: ServingSpec) -> str:
    """What a guard with a memory loses where several processes serve it; empty where it loses nothing."""
    if not spec.memory or serving.layout != "single" or serving.instances == 1:
        return ""
    return (
        f"each of {serving.instances} instances has a [memory] of its own: a search by queries goes on about {serving.instances} times as "
        "long before it is noticed"
    )


def tuning_rows(found: Tuning) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows of the table."""
    settings = {
        "layout": "layout",
        "instances": "instances",
        "preferred batch": "preferred_batch_size",
        "scorer delay us": "scorer_delay_microseconds",
        "queue delay us": "queue_delay_microseconds",
        "max batch": "max_batch_size",
    }
    rows = []
    for trial in found.trials:
        load = trial.load
        figures = [f"{load.per_second:.0f}", f"{load.p50_ms:.2f}", f"{load.p99_ms:.2f}", f"{trial.gain:.2f}"]
        rows.append([*(str(getattr(trial.serving, name)) for name in settings.values()), *figures, "best" if trial is found.best else ""])
    return [*settings, "images/s", "p50 ms", "p99 ms", "gain", ""], rows
