"""Stand-in for Triton's native ``onnxruntime`` backend, for servers that carry only the Python backend.

Triton looks a backend up as ``<backends>/onnxruntime/libtriton_onnxruntime.so`` and then as ``<backends>/onnxruntime/model.py``: the
same ``config.pbtxt`` and ``model.onnx`` load with either. Each model instance is a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from noisec.python_backend.scorer.batching import Arrays, answer
from noisec.python_backend.scorer.session import open_session


class TritonPythonModel:
    """Runs ``model.onnx`` (or ``default_model_filename``) of the model's version directory."""

    session: onnxruntime.InferenceSession

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        name = config.get("default_model_filename") or "model.onnx"
        threads = config.get("parameters", {}).get("intra_op_thread_count", {"string_value": "1"})["string_value"]
        self.session = open_session(Path(args["model_repository"], args["model_version"], name), int(threads))
        self.inputs = [entry["name"] for entry in config["input"]]

    def compute(self, arrays: Arrays, wanted: Sequence[str]) -> Arrays:
        return dict(zip(wanted, self.session.run(list(wanted), dict(arrays)), strict=True))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return answer(requests, self.inputs, self.compute)
