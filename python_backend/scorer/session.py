"""How an exported stage is opened, in the server and by the builders that calibrate on its outputs."""

from __future__ import annotations

from pathlib import Path

import onnxruntime


def open_session(model: Path | bytes, threads: int = 0, *, spinning: bool = True) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU.

    Args:
        model: file, or its content
        threads: compute threads; 0 takes every core
        spinning: whether they look for more work for a while before they sleep, which takes a core that others may want
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else model.as_posix(), options, providers=["CPUExecutionProvider"]
    )
