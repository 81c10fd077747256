"""A TensorRT plan on one GPU: own stream, buffers that stay, one CUDA graph for each batch size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import tensorrt


class Plan:
    """Runs a plan's network on batches of at most ``largest`` rows.

    A CUDA graph replays kernels on the addresses that it was captured with, so that it reads and writes the buffers made here and never a
    request's own memory.

    Args:
        trt: the TensorRT package
        path: the plan
        device: the GPU
        largest: rows of the largest batch, at most what the plan was built for
        graph_sizes: batch sizes with a CUDA graph of their own; a batch runs in the next larger one, its last rows unused. A batch larger
            than all of them runs without a graph.
        host_code: let the plan run code of its own on the host; one that was built ``version_compatible`` does not load without, for it
            brings the TensorRT that it was built with

    Raises:
        RuntimeError: the plan does not load here.
    """

    def __init__(
        self, trt: Any, path: Path, device: torch.device, largest: int, graph_sizes: Sequence[int] = (), *, host_code: bool = False
    ) -> None:
        self.path = path
        self.largest = largest
        torch.cuda.set_device(device)
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        if host_code:
            self._runtime.engine_host_code_allowed = True
        engine: tensorrt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise RuntimeError(f"{path.name} does not load with TensorRT {trt.__version__} on this GPU: compile it here")
        self._engine = engine
        self._context: tensorrt.IExecutionContext = engine.create_execution_context()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        (self.input,) = (name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT)
        self.outputs = tuple(name for name in names if name != self.input)
        shapes = {name: list(engine.get_tensor_shape(name))[1:] for name in names}
        self._buffers = {name: torch.zeros((largest, *shape), dtype=torch.float32, device=device) for name, shape in shapes.items()}
        for name, buffer in self._buffers.items():
            self._context.set_tensor_address(name, buffer.data_ptr())
        self._graphs = {size: self._capture(size) for size in sorted(graph_sizes) if size <= largest}

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Every output of the network.

        Args:
            images: float32 [n, C, H, W], n <= largest, on any device

        Returns:
            output name -> float32 [n, ...] on the GPU, finished
        """
        rows = len(images)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))  # which may still be putting the batch together
        with torch.cuda.stream(self._stream):
            self._buffers[self.input][:rows].copy_(images, non_blocking=True)
            self.enqueue(rows)
            answer = {name: self._buffers[name][:rows].clone() for name in self.outputs}
        self._stream.synchronize()
        return answer

    def enqueue(self, rows: int) -> None:
        """Start the network on the first ``rows`` rows of the input buffer, on the current stream."""
        size = next((size for size in self._graphs if size >= rows), None)
        if size is None:
            self._launch(rows)
        else:
            self._graphs[size].replay()

    def _launch(self, rows: int) -> None:
        self._context.set_input_shape(self.input, tuple(self._buffers[self.input][:rows].shape))
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError(f"{self.path.name} failed on a batch of {rows}")

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        """The kernels of one batch size, after a first run that lets TensorRT allocate what it needs."""
        with torch.cuda.stream(self._stream):
            self._launch(size)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._launch(size)
        return graph
