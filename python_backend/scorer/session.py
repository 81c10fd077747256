"""How an exported stage is opened, in the server and by the builders that calibrate on its outputs."""

from __future__ import annotations

from pathlib import Path

import onnxruntime


def open_session(model: Path | bytes, threads: int = 0) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU.

    Args:
        model: file, or its content
        threads: compute threads; 0 takes every core
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else model.as_posix(), options, providers=["CPUExecutionProvider"]
    )
