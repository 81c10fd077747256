"""ONNX stages -> TensorRT plans. Precision is in the graph; nothing here changes it.

Features of TensorRT 10.12, 11 and TensorRT for RTX are looked for by name, never by version. Needs neither torch nor training code.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from noisec import contract
from noisec.builders.spec import EngineOptions
from noisec.errors import NoisecError

if TYPE_CHECKING:
    import tensorrt


def find_tensorrt() -> ModuleType:
    """The ``tensorrt`` package, on a machine with an NVIDIA GPU.

    Raises:
        NoisecError: there is no GPU, or no package; in one sentence, and nothing has been changed.
    """
    if not gpus():
        raise NoisecError("no NVIDIA GPU on this machine: TensorRT plans are compiled on the GPU that runs them; nothing was changed")
    try:
        import tensorrt
    except ImportError as error:
        raise NoisecError("TensorRT is missing: pip install 'noisec-triton[gpu]', or run this inside a Triton container") from error
    module: ModuleType = tensorrt
    return module


def gpus() -> int:
    """Number of NVIDIA GPUs that the driver shows; 0 without a driver."""
    count = ctypes.c_int()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    return count.value if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def compute_capability() -> str:
    """Compute capability of the first GPU, such as ``9.0``."""
    cuda = ctypes.CDLL("libcuda.so.1")
    found = [ctypes.c_int(), ctypes.c_int()]
    for value, attribute in zip(found, (75, 76), strict=True):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
    return f"{found[0].value}.{found[1].value}"


def build_plan(trt: Any, path: Path, largest: int, options: EngineOptions, timing_cache: Path | None = None) -> bytes:
    """A serialised engine of one stage, strongly typed: every layer runs in the precision that the graph states.

    Args:
        trt: the TensorRT package
        path: ``model.onnx``
        largest: largest batch
        timing_cache: measured kernel times, read and written, so that a rebuild is faster

    Raises:
        NoisecError: TensorRT cannot parse or build the stage; the message holds its own words.
    """
    logger = _collecting_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(path.as_posix()):
        raise NoisecError(f"{path}: TensorRT cannot parse this stage: " + "; ".join(_errors(parser)))
    config = builder.create_builder_config()
    _configure(trt, config, options)
    config.add_optimization_profile(_profile(builder, network, largest, options))
    cache = _timing_cache(config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise NoisecError(f"{path}: TensorRT cannot build this stage: {'; '.join(logger.messages) or 'no reason given'}")
    if timing_cache is not None and cache is not None:
        timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def _network_flags(trt: Any) -> int:
    """Strong typing and explicit batch, where they are still options."""
    flags = 0
    for name in ("STRONGLY_TYPED", "EXPLICIT_BATCH"):
        flag = getattr(trt.NetworkDefinitionCreationFlag, name, None)
        flags |= 0 if flag is None else 1 << int(flag)
    return flags


def _configure(trt: Any, config: tensorrt.IBuilderConfig, options: EngineOptions) -> None:
    config.builder_optimization_level = options.level
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_megabytes << 20)
    if options.any_ampere_or_newer:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)


def _profile(
    builder: tensorrt.Builder, network: tensorrt.INetworkDefinition, largest: int, options: EngineOptions
) -> tensorrt.IOptimizationProfile:
    profile = builder.create_optimization_profile()
    shape = tuple(network.get_input(0).shape)[1:]
    optimum = min(options.optimum, largest)
    profile.set_shape(contract.IMAGE, (1, *shape), (optimum, *shape), (largest, *shape))
    return profile


def _timing_cache(config: tensorrt.IBuilderConfig, path: Path | None) -> tensorrt.ITimingCache | None:
    if path is None or not hasattr(config, "create_timing_cache"):
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is not None:
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _errors(parser: tensorrt.OnnxParser) -> Iterator[str]:
    return (str(parser.get_error(index)) for index in range(parser.num_errors))


def _collecting_logger(trt: Any) -> Any:
    """A logger that keeps what went wrong."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.messages.append(message)

    return Logger()
