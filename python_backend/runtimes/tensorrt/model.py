"""Stand-in for Triton's native ``tensorrt`` backend, for servers that carry only the Python backend.

Runs a plan with the ``tensorrt`` package and torch's CUDA tensors: own stream, buffers that stay, one optimisation profile. Answers leave
after the stream has been waited for, so that no request reads a buffer that is still written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from noisec.python_backend.scorer.batching import Arrays, answer


class TritonPythonModel:
    """Runs the plan of this GPU's compute capability, from the model's version directory."""

    def initialize(self, args: dict[str, str]) -> None:
        name = args["model_name"]
        try:
            import tensorrt
            import torch
        except ImportError as error:
            raise pb_utils.TritonModelException(
                f"{name}: a TensorRT plan needs the package {error.name}: it is not installed here"
            ) from error
        if not torch.cuda.is_available():
            raise pb_utils.TritonModelException(
                f"{name}: a TensorRT plan needs an NVIDIA GPU and this server sees none: serve an ONNX release"
            )
        config = json.loads(args["model_config"])
        self.torch = torch
        self.device = torch.device("cuda", int(args["model_instance_device_id"]))
        self.plan = Path(args["model_repository"], args["model_version"], self._plan_name(config))
        engine = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING)).deserialize_cuda_engine(self.plan.read_bytes())
        if engine is None:
            raise pb_utils.TritonModelException(
                f"{name}: {self.plan.name} does not load with TensorRT {tensorrt.__version__}: compile it here"
            )
        self.engine = engine
        self.context = engine.create_execution_context()
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        largest = max(1, int(config["max_batch_size"]))
        self.input = config["input"][0]["name"]
        self.buffers = {
            entry["name"]: torch.empty((largest, *map(int, entry["dims"])), dtype=torch.float32, device=self.device)
            for entry in [*config["input"], *config["output"]]
        }
        for tensor, buffer in self.buffers.items():
            self.context.set_tensor_address(tensor, buffer.data_ptr())

    def _plan_name(self, config: dict[str, Any]) -> str:
        """The plan for this GPU's compute capability, else the default one."""
        major, minor = self.torch.cuda.get_device_capability(self.device)
        named: dict[str, str] = config.get("cc_model_filenames") or {}
        return named.get(f"{major}.{minor}") or config.get("default_model_filename") or "model.plan"

    def compute(self, arrays: Arrays, wanted: Sequence[str]) -> Arrays:
        images = np.ascontiguousarray(arrays[self.input], np.float32)
        rows = len(images)
        with self.torch.cuda.stream(self.stream):
            self.buffers[self.input][:rows].copy_(self.torch.from_numpy(images), non_blocking=True)
            self.context.set_input_shape(self.input, images.shape)
            if not self.context.execute_async_v3(self.stream.cuda_stream):
                raise RuntimeError(f"{self.plan.name} failed on a batch of {rows}")
            results = {name: self.buffers[name][:rows].to("cpu", non_blocking=True) for name in wanted}
        self.stream.synchronize()
        return {name: result.numpy() for name, result in results.items()}

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return answer(requests, [self.input], self.compute)
