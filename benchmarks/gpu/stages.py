"""Network stages on the GPU: as torch operations, as CUDA graphs of them, or as TensorRT plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from noisec.builders.images import Floats
from noisec.builders.stages import Infer, Tensors, joined
from noisec.builders.torchgraph import TorchGraph
from noisec.errors import NoisecError
from noisec.python_backend.runtimes.tensorrt.names import graph_sizes
from noisec.python_backend.runtimes.tensorrt.plan import Plan

BATCHES = (1, 8, 32, 64, 256)


class GpuStage(Protocol):
    """One network stage on the GPU."""

    largest: int
    """largest batch"""

    def launcher(self, rows: int) -> Callable[[], object]:
        """A function that queues the stage for one batch, already on the GPU, on the current stream."""

    def infer(self, images: Floats, outputs: Sequence[str]) -> Tensors:
        """float32 [n, C, H, W], n <= ``largest``, to output name -> float32 [n, ...]"""


class TorchStage:
    """A stage as torch operations, launched one by one or, by default, replayed as a CUDA graph of its own for each batch size."""

    largest = max(BATCHES)

    def __init__(self, path: Path, *, half: bool, eager: bool = False) -> None:
        self._graph = TorchGraph(path, "cuda", half=half)
        self._eager = eager
        self._captured: dict[int, tuple[Tensor, tuple[Tensor, ...], torch.cuda.CUDAGraph]] = {}

    def launcher(self, rows: int) -> Callable[[], object]:
        if self._eager:
            return partial(self._graph, torch.zeros((rows, *self._graph.shape), device="cuda"))
        return self._capture(rows)[2].replay

    def infer(self, images: Floats, outputs: Sequence[str]) -> Tensors:
        pixels = torch.from_numpy(np.ascontiguousarray(images))
        if self._eager:
            made = self._graph(pixels.cuda())
        else:
            buffer, made, graph = self._capture(len(images))
            buffer.copy_(pixels)
            graph.replay()
        answers = dict(zip(self._graph.outputs, made, strict=True))
        return {name: answers[name].cpu().numpy() for name in outputs}

    def _capture(self, rows: int) -> tuple[Tensor, tuple[Tensor, ...], torch.cuda.CUDAGraph]:
        """Input buffer, output buffers and the graph that leads from one to the others."""
        if rows not in self._captured:
            buffer = torch.zeros((rows, *self._graph.shape), device="cuda")
            side = new_stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # cuDNN chooses its kernels before they are captured
                    self._graph(buffer)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                made = self._graph(buffer)
            self._captured[rows] = (buffer, made, graph)
        return self._captured[rows]


class PlanStage:
    """A stage as a TensorRT plan, run by the package that built it as the stand-in backend runs it: a CUDA graph for each power of two."""

    def __init__(self, trt: Any, path: Path, largest: int) -> None:
        self.largest = largest
        try:
            self._plan = Plan(trt, path, torch.device("cuda", 0), largest, graph_sizes(largest))
        except RuntimeError as error:
            raise NoisecError(str(error)) from error

    def launcher(self, rows: int) -> Callable[[], object]:
        return partial(self._plan.enqueue, rows)

    def infer(self, images: Floats, outputs: Sequence[str]) -> Tensors:
        made = self._plan(torch.from_numpy(np.ascontiguousarray(images)))
        return {name: made[name].cpu().numpy() for name in outputs}


def asking(stages: Mapping[str, GpuStage]) -> Infer:
    """Stages on the GPU as everything that asks stages wants them."""

    def infer(stage: str, images: Floats, outputs: Sequence[str]) -> Tensors:
        one = stages[stage]
        return joined([one.infer(images[start : start + one.largest], outputs) for start in range(0, len(images), one.largest)])

    return infer


def new_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]
