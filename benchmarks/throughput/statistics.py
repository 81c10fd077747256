"""What the server did meanwhile: Triton's statistics of each stage, and its processes' time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import tritonclient.grpc as triton_grpc

from noisec.errors import NoisecError

PARTS = {"queue_ms": "queue", "input_ms": "compute_input", "infer_ms": "compute_infer", "output_ms": "compute_output"}
Reading = Mapping[str, Any]
"""model -> Triton's ``ModelStatistics`` message"""


@dataclass(frozen=True)
class Stage:
    """One model between two readings. Milliseconds are means over requests; each has the whole time of the batch that it was part of."""

    model: str
    requests: int
    failed: int
    images: int
    executions: int
    batches: dict[int, int]
    """realised batch size -> executions"""
    queue_ms: float
    input_ms: float
    infer_ms: float
    output_ms: float

    @property
    def mean_batch(self) -> float:
        """Images of one execution."""
        return self.images / self.executions if self.executions else 0.0


def read(url: str, models: Sequence[str]) -> Reading:
    """Triton's statistics of some models, as they are now.

    Raises:
        NoisecError: the server does not answer.
    """
    with triton_grpc.InferenceServerClient(url) as client:
        try:
            return {model: client.get_inference_statistics(model).model_stats[-1] for model in models}
        except triton_grpc.InferenceServerException as error:
            raise NoisecError(f"{url}: no statistics: {error.message()}; the server has to have loaded {', '.join(models)}") from error


def between(before: Reading, after: Reading) -> list[Stage]:
    """What each model did between two readings."""
    return [_difference(model, before[model], after[model]) for model in after]


def _difference(model: str, old: Any, new: Any) -> Stage:
    def change(name: str, field: str) -> int:
        return int(getattr(getattr(new.inference_stats, name), field) - getattr(getattr(old.inference_stats, name), field))

    requests = change("success", "count")
    known = {one.batch_size: one.compute_infer.count for one in old.batch_stats}
    batches = {int(one.batch_size): int(one.compute_infer.count - known.get(one.batch_size, 0)) for one in new.batch_stats}
    times = {name: change(part, "ns") / max(1, requests) / 1e6 for name, part in PARTS.items()}
    return Stage(
        model,
        requests,
        change("fail", "count"),
        int(new.inference_count - old.inference_count),
        int(new.execution_count - old.execution_count),
        {size: count for size, count in sorted(batches.items()) if count},
        **times,
    )


@dataclass(frozen=True)
class Usage:
    """What a tree of processes has used."""

    cpu_seconds: float
    memory_mb: float
    """proportional set size: pages that processes share count once"""


def server_processes() -> list[psutil.Process]:
    """The embedded server that this process started, and the server's own children; empty where there is none."""
    children = psutil.Process().children(recursive=True)
    servers = [process for process in children if process.name() == "tritonserver"]
    return [process for server in servers for process in (server, *server.children(recursive=True))]


def usage(processes: Sequence[psutil.Process]) -> Usage:
    """Of processes that are all alive."""
    times = [process.cpu_times() for process in processes]
    memory = [process.memory_full_info().pss for process in processes]
    return Usage(sum(one.user + one.system for one in times), sum(memory) / 1e6)
