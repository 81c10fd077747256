"""Answers, detection and speed of stages on the GPU."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from noisec import contract
from noisec.benchmarks.gpu.prepared import Guard, Prepared
from noisec.benchmarks.gpu.stages import BATCHES, GpuStage, new_stream
from noisec.builders.calibrate import fit_scorer
from noisec.builders.figures import Answers
from noisec.builders.images import Floats, in_batches
from noisec.builders.passes import own_passes, passes_needed
from noisec.builders.stages import Infer, Tensors, joined
from noisec.builders.variants import measured
from noisec.clients import GuardClient
from noisec.python_backend.scorer.scoring import Scorer

LOAD_SECONDS = 5.0
WARM_UP, REPEATS = 20, 200


def answers_of(guard: Guard, infer: Infer, images: Floats) -> Tensors:
    """Every tensor that the guard's stages answer for real images: the autoencoder's, LOGITS, and PENULTIMATE of each pass."""
    parts = [infer("autoencoder", batch, contract.AUTOENCODER_OUTPUTS) for batch in in_batches(images)]
    return {**joined(parts), **guard.runner(infer)(in_batches(images), len(images), "comparing")}


def differences(found: Tensors, wanted: Tensors, exact: Tensors) -> dict[str, Any]:
    """Per output the largest difference and its share of the largest value; share of labels as in fp32."""
    outputs = {}
    for name, tensor in wanted.items():
        difference = float(np.abs(found[name] - tensor).max())
        outputs[name] = {"max_abs": difference, "relative": difference / max(float(np.abs(tensor).max()), 1e-12)}
    labels = [tensors[contract.LOGITS].argmax(axis=1) for tensors in (found, exact)]
    return {"outputs": outputs, "label_agreement": float(np.mean(labels[0] == labels[1]))}


def detection(guard: Guard, infer: Infer, prepared: Prepared) -> tuple[Scorer, dict[str, Any]]:
    """A scorer refitted on what the stages answer, and what it catches."""
    run = guard.runner(infer)
    scorer = fit_scorer(guard.spec, run, prepared.splits, guard.scorer.head)
    return scorer, measured(guard.spec, run, scorer, prepared.splits, prepared.attacked)[0]


def median_ms(launch: Callable[[], object]) -> float:
    """Median time of a launch among many back to back, by CUDA events, in milliseconds."""
    for _ in range(WARM_UP):
        launch()
    pairs = [(_event(), _event()) for _ in range(REPEATS)]
    torch.cuda.synchronize()
    for start, stop in pairs:
        start.record()
        launch()
        stop.record()
    torch.cuda.synchronize()
    return float(np.median([start.elapsed_time(stop) for start, stop in pairs]))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def speed(guard: Guard, runtime: str, stages: Mapping[str, GpuStage]) -> list[dict[str, Any]]:
    """Times of each stage, and of the guard: its autoencoder stage and a classifier batch for each pass outside that, on one stream."""
    outside = set(passes_needed(guard.spec)) - set(own_passes(guard.spec))
    rows = []
    with torch.cuda.stream(new_stream()):
        for batch in [size for size in BATCHES if size <= min(stage.largest for stage in stages.values())]:
            launchers = {name: stage.launcher(batch) for name, stage in stages.items()}
            whole = [launchers["autoencoder"], *(launchers["classifier"] for _ in outside)]
            launchers["guard"] = lambda whole=whole: [launch() for launch in whole]  # type: ignore[misc]
            for name, launch in launchers.items():
                ms = median_ms(launch)
                rows.append({"runtime": runtime, "stage": name, "batch": batch, "median_ms": ms, "images_per_second": 1000 * batch / ms})
    return rows


def load(url: str, guard: str, images: Floats, clients: int, batch: int) -> dict[str, Any]:
    """Latency and throughput of a served guard under ``clients`` clients, each of which sends the next batch when it has its answer."""
    feeds = [images[start : start + batch] for start in range(0, len(images) - batch + 1, batch)]

    def ask(client: GuardClient, first: int) -> list[float]:
        seconds = []
        for index in itertools.count(first):
            start = time.perf_counter()
            if start > deadline:
                break
            client.classify(feeds[index % len(feeds)])
            seconds.append(time.perf_counter() - start)
        return seconds

    with ExitStack() as stack, ThreadPoolExecutor(clients) as pool:
        connected = [stack.enter_context(GuardClient(url, guard)) for _ in range(clients)]
        for client in connected:
            client.classify(feeds[0])
        begin = time.perf_counter()
        deadline = begin + LOAD_SECONDS
        seconds = [one for many in pool.map(ask, connected, range(clients)) for one in many]
        rate = len(seconds) * batch / (time.perf_counter() - begin)
    median, late = np.quantile(seconds, [0.5, 0.99]) * 1000
    return {"clients": clients, "batch": batch, "median_ms": float(median), "p99_ms": float(late), "images_per_second": rate}


def agreement(found: Answers, expected: Answers) -> dict[str, float]:
    """Shares of equal labels and verdicts, and the largest difference of a score, in nats."""
    return {
        "labels": float(np.mean(found.labels == expected.labels)),
        "verdicts": float(np.mean(found.is_malicious == expected.is_malicious)),
        "score": float(np.abs(found.scores - expected.scores).max()),
    }
