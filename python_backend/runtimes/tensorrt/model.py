"""Stand-in for Triton's native ``tensorrt`` backend, for servers that carry only the Python backend.

Runs a plan with the ``tensorrt`` package on the instance's GPU. Inputs that lie on the GPU are read there, and their answers stay there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton_python_backend_utils as pb_utils

from noisec.python_backend.scorer.batching import Joint, answer

if TYPE_CHECKING:
    from torch import Tensor

    from noisec.python_backend.runtimes.tensorrt.plan import Plan


class TritonPythonModel:
    """Runs the plan of this GPU's compute capability, from the model's version directory."""

    def initialize(self, args: dict[str, str]) -> None:
        name, config = args["model_name"], json.loads(args["model_config"])
        try:
            self.plan = _load(args, config)
        except ImportError as error:
            raise pb_utils.TritonModelException(
                f"{name}: a TensorRT plan needs the package {error.name}: it is not installed here"
            ) from error
        except (RuntimeError, OSError) as error:
            raise pb_utils.TritonModelException(f"{name}: {error}") from error
        self.inputs = [entry["name"] for entry in config["input"]]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        on_gpu = any(not pb_utils.get_input_tensor_by_name(request, self.plan.input).is_cpu() for request in requests)
        return answer(requests, self.inputs, self.compute, Joint(_read, _join, _to_gpu if on_gpu else _to_host))

    def compute(self, tensors: dict[str, Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
        """float32 [n, ...] on any device -> float32 [n, ...] on the GPU"""
        made = self.plan(tensors[self.plan.input])
        return {name: made[name] for name in wanted}


def _load(args: dict[str, str], config: dict[str, Any]) -> Plan:
    """The plan of the instance's GPU, with the CUDA graphs that the configuration asks for.

    Raises:
        ImportError: ``tensorrt`` or ``torch`` is missing.
        RuntimeError: there is no GPU, or the plan does not load.
    """
    import tensorrt
    import torch

    from noisec.python_backend.runtimes.tensorrt.names import has_host_code
    from noisec.python_backend.runtimes.tensorrt.plan import Plan

    if not torch.cuda.is_available():
        raise RuntimeError("a TensorRT plan needs an NVIDIA GPU and this server sees none: serve an ONNX release")
    device = torch.device("cuda", int(args["model_instance_device_id"]))
    major, minor = torch.cuda.get_device_capability(device)
    named: dict[str, str] = config.get("cc_model_filenames") or {}
    file = named.get(f"{major}.{minor}") or config["default_model_filename"]
    cuda = config.get("optimization", {}).get("cuda", {})
    sizes = [int(spec["batch_size"]) for spec in cuda.get("graph_spec", [])] if cuda.get("graphs") else []
    folder = Path(args["model_repository"], args["model_version"])
    largest = max(1, int(config["max_batch_size"]))
    return Plan(tensorrt, folder / file, device, largest, sizes, host_code=has_host_code(folder))


def _read(tensor: Any) -> Tensor:
    import torch

    return torch.from_numpy(tensor.as_numpy()) if tensor.is_cpu() else torch.utils.dlpack.from_dlpack(tensor.to_dlpack())


def _join(parts: list[Tensor]) -> Tensor:
    """Several requests' rows as one batch; on the GPU where any of them lies there."""
    import torch

    device = next((part.device for part in parts if part.is_cuda), parts[0].device)
    return torch.cat([part.to(device) for part in parts])


def _to_host(name: str, rows: Tensor) -> Any:
    return pb_utils.Tensor(name, rows.cpu().numpy())


def _to_gpu(name: str, rows: Tensor) -> Any:
    return pb_utils.Tensor.from_dlpack(name, rows.contiguous())
