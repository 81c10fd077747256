"""The scorer stage in Triton's Python backend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from .batching import Arrays, answer
from .scoring import Scorer


class TritonPythonModel:
    """Penultimate activations in, SCORE, P_VALUE, IS_MALICIOUS and RELEASE out."""

    def initialize(self, args: dict[str, str]) -> None:
        directory = Path(args["model_repository"], args["model_version"])
        self.scorer = Scorer.load(directory / "scorer.npz", int(args["model_version"]))
        self.memory = self.scorer.new_memory()
        configured = {entry["name"]: int(entry["dims"][0]) for entry in json.loads(args["model_config"])["input"]}
        if configured.keys() != set(self.scorer.inputs):
            raise pb_utils.TritonModelException(f"config.pbtxt feeds {sorted(configured)}; scorer.npz needs {sorted(self.scorer.inputs)}")
        try:
            self.scorer.outputs({name: np.zeros((1, width), np.float32) for name, width in configured.items()}, self.scorer.new_memory())
        except ValueError as error:
            raise pb_utils.TritonModelException(f"scorer.npz does not fit the widths in config.pbtxt, {configured}: {error}") from error

    def compute(self, activations: Arrays, wanted: Sequence[str]) -> Arrays:
        """float32 [n, d] for each input -> [n, 1] for each output"""
        return self.scorer.outputs(activations, self.memory)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return answer(requests, self.scorer.inputs, self.compute)
