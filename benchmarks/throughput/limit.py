"""The limit: the same graphs and the same scorer without a server, in processes that start together."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Literal

import numpy as np
from threadpoolctl import threadpool_limits

from noisec import contract
from noisec.benchmarks.throughput.load import Images, stored
from noisec.benchmarks.throughput.target import Target
from noisec.builders.stages import StageRunner, in_process
from noisec.python_backend.scorer.guard import Arrays, Guard

What = Literal["guard", "classifier"]
WARM_UP = 0.2
START_SECONDS = 60.0
"""how long the processes may take to start"""


@dataclass(frozen=True)
class Speed:
    """What some processes computed together."""

    what: What
    processes: int
    threads: int
    """ONNX Runtime threads of each process"""
    batch: int
    per_second: float
    """images"""
    p50_ms: float
    """of one batch"""


class Staged:
    """A guard of several stages in this process: every pass of its ensemble, one after the other, and its scorer.

    Args:
        threads: of ONNX Runtime
    """

    def __init__(self, target: Target, threads: int) -> None:
        self._infer = in_process(target.stages, threads)
        self._run = StageRunner.of(target.spec, self._infer)
        self._scorer = target.scorer
        self._memory = self._scorer.new_memory()

    def label(self, images: Images) -> Arrays:
        """LOGITS float32 [n, classes] from the classifier alone."""
        return self._infer("classifier", images, (contract.LOGITS,))

    def verdict(self, images: Images) -> Arrays:
        """LOGITS and the scorer's outputs, [n, ...] each."""
        tensors = self._run.batch(images)
        return {contract.LOGITS: tensors[contract.LOGITS], **self._scorer.outputs(tensors, self._memory)}


class Whole:
    """A guard that is one graph, in this process.

    Args:
        threads: of ONNX Runtime
    """

    def __init__(self, target: Target, threads: int) -> None:
        self._infer = in_process({"guard": target.folder("scorer"), "classifier": target.folder("classifier")}, threads)

    def label(self, images: Images) -> Arrays:
        """LOGITS float32 [n, classes] from the classifier alone."""
        return self._infer("classifier", images, (contract.LOGITS,))

    def verdict(self, images: Images) -> Arrays:
        """LOGITS and the verdict, [n, ...] each."""
        return self._infer("guard", images, contract.OUTPUTS)


Computation = Staged | Whole | Guard


def computation(target: Target, threads: int) -> Computation:
    """What the guard computes, without a server: its one graph, or its graphs and scorer one after the other.

    Args:
        threads: of ONNX Runtime
    """
    match target.spec.serving.layout:
        case "single":
            return Guard(target.own_folder, target.release, threads)
        case "graph":
            return Whole(target, threads)
        case _:
            return Staged(target, threads)


class Processes:
    """Processes that compute at the same time, each on its own.

    Args:
        count: of the pool's processes
    """

    def __init__(self, pool: ProcessPoolExecutor, count: int, threads: int) -> None:
        self._pool = pool
        self._count = count
        self._threads = threads

    def measure(self, what: What, batch: int, seconds: float) -> Speed:
        """Images per second of all of them together: each counts the batches that it finishes in its own window of ``seconds``."""
        futures = [self._pool.submit(_measure, what, batch, seconds) for _ in range(self._count)]
        parts = [future.result() for future in futures]
        rate = sum(batch * len(times) / sum(times) for times in parts)
        return Speed(what, self._count, self._threads, batch, rate, float(np.median(np.concatenate(parts))) * 1000)


@contextmanager
def processes(target: Target, images: Images, count: int, threads: int) -> Iterator[Processes]:
    """``count`` processes with ``threads`` ONNX Runtime threads each.

    Args:
        images: [n, C, H, W], as the guard takes them; every batch is taken from them
    """
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(count)
    with (
        stored(images) as file,
        ProcessPoolExecutor(count, context, initializer=_prepare, initargs=(target, file, threads, start)) as pool,
    ):
        yield Processes(pool, count, threads)


def settings(cores: int) -> list[tuple[int, int]]:
    """Processes and threads to try: from one process with a thread for every core to one process for every core."""
    return [(count, threads) for count in range(1, cores + 1) for threads in range(1, cores + 1) if count * threads == cores]


def sweep(
    target: Target, images: Images, what: Sequence[What], batches: Sequence[int], cores: int, seconds: float, repeats: int
) -> list[Speed]:
    """Every setting of processes and threads with every batch size, each the median of its repeats, which take turns."""
    found: list[Speed] = []
    for count, threads in settings(cores):
        with processes(target, images, count, threads) as running:
            rounds = [[running.measure(one, batch, seconds) for one in what for batch in batches] for _ in range(repeats)]
        found += [median(list(same)) for same in zip(*rounds, strict=True)]
    return found


def median(speeds: Sequence[Speed]) -> Speed:
    """The one in the middle."""
    return sorted(speeds, key=lambda speed: speed.per_second)[len(speeds) // 2]


def fastest(speeds: Sequence[Speed], what: What, count: int) -> list[Speed]:
    """The best settings, the best one first."""
    return sorted((speed for speed in speeds if speed.what == what), key=lambda speed: -speed.per_second)[:count]


_ready: tuple[Computation, Images, Barrier]
"""in each of the processes"""


def _prepare(target: Target, images: Path, threads: int, start: Barrier) -> None:
    global _ready
    threadpool_limits(1)  # NumPy's own threads: the server's scorer has one as well
    _ready = (computation(target, threads), np.load(images), start)


def _measure(what: What, batch: int, seconds: float) -> list[float]:
    """Seconds of each batch."""
    found, images, start = _ready
    compute = found.verdict if what == "guard" else found.label
    parts = [np.ascontiguousarray(images[at : at + batch]) for at in range(0, len(images) - batch + 1, batch)]
    start.wait(START_SECONDS)
    _timed(compute, parts, WARM_UP)
    start.wait(START_SECONDS)
    return _timed(compute, parts, seconds)


def _timed(compute: object, parts: Sequence[Images], seconds: float) -> list[float]:
    assert callable(compute)
    times: list[float] = []
    begin = now = time.perf_counter()
    while now - begin < seconds:
        compute(parts[len(times) % len(parts)])
        times.append((end := time.perf_counter()) - now)
        now = end
    return times
