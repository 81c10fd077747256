"""The scorer stage in Triton's Python backend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from .batching import Arrays, answer
from .scoring import Scorer


class TritonPythonModel:
    """Penultimate activations in, SCORE, P_VALUE, IS_MALICIOUS and RELEASE out."""

    def initialize(self, args: dict[str, str]) -> None:
        directory = Path(args["model_repository"], args["model_version"])
        self.scorer = Scorer.load(directory / "scorer.npz", int(args["model_version"]))
        self.memory = self.scorer.new_memory()
        configured = {entry["name"] for entry in json.loads(args["model_config"])["input"]}
        if configured != set(self.scorer.inputs):
            raise pb_utils.TritonModelException(f"config.pbtxt feeds {sorted(configured)}; scorer.npz needs {sorted(self.scorer.inputs)}")

    def compute(self, activations: Arrays, wanted: Sequence[str]) -> Arrays:
        """float32 [n, d] for each input -> [n, 1] for each output"""
        return self.scorer.outputs(activations, self.memory)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return answer(requests, self.scorer.inputs, self.compute)
