"""A guard's computation as any Python server would hold it: both ONNX graphs, and the scorer's own code and arrays.

Self-contained, because it runs where ``noisec`` is not installed: it needs NumPy and ONNX Runtime, and reads a model repository. Start the
process with ``PYTHONDONTWRITEBYTECODE=1``: compiled code beside the scorer's would be no part of its release.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from abc import ABC, abstractmethod
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

Array = npt.NDArray[Any]
TENSORS = ("SCORE", "P_VALUE", "IS_MALICIOUS")
"""the verdict's tensors that servers answer, [n, 1] each"""
ANSWERS = ("label", "score", "p_value", "is_malicious")
"""int64, float32, float32 and bool, [n] each"""
VARIABLE = "NOISEC_PEER"
"""environment variable with a ``Task`` in JSON"""


@dataclass(frozen=True)
class Task:
    """What a server is started with."""

    repository: str
    guard: str
    ports: list[int]
    """free ones, as many as the server wants; the first answers requests"""
    workers: int
    threads: int
    """compute threads of each worker"""
    batch: int
    """requests or images that are computed together; 1 joins none"""
    delay_ms: float
    """how long a request waits for others"""
    preferred: int
    """what a longer queue is parted into; 0: ``batch``"""

    @classmethod
    def read(cls) -> Task:
        return cls(**json.loads(os.environ[VARIABLE]))

    def load(self) -> Computation:
        return open_guard(Path(self.repository), self.guard, self.threads)


def open_guard(repository: Path, name: str, threads: int = 1) -> Computation:
    """The newest release of a guard, in this process.

    Args:
        repository: model repository with ONNX stages
        name: the guard's
        threads: compute threads of ONNX Runtime
    """
    release = max((path.name for path in (repository / name).iterdir() if path.name.isdigit()), key=int)
    whole = repository / f"{name}_scorer" / release / "model.onnx"
    return Graph(whole, threads) if whole.is_file() else Guard(repository, name, release, threads)


class Computation(ABC):
    """A guard in this process."""

    shape: tuple[int, int, int]

    @abstractmethod
    def __call__(self, images: npt.NDArray[np.float32]) -> dict[str, Array]:
        """``ANSWERS``, [n] each, from float32 [n, C, H, W]"""

    def together(self, requests: Sequence[npt.NDArray[np.float32]]) -> list[dict[str, Array]]:
        """One answer for each request, computed as one batch."""
        answers = self(np.concatenate(requests) if len(requests) > 1 else requests[0])
        edges = np.cumsum([0, *map(len, requests)])
        return [{name: rows[start:stop] for name, rows in answers.items()} for start, stop in pairwise(edges)]

    def decode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """float32 [n, C, H, W] from each image's bytes in base64"""
        return np.frombuffer(b"".join(map(b64decode, texts)), np.float32).reshape(-1, *self.shape)


class Graph(Computation):
    """A guard that is one graph, verdict included."""

    def __init__(self, path: Path, threads: int) -> None:
        self._session = open_session(path, threads)
        self.shape = tuple(self._session.get_inputs()[0].shape[1:])

    def __call__(self, images: npt.NDArray[np.float32]) -> dict[str, Array]:
        logits, *verdict = self._session.run(["LOGITS", *TENSORS], {"IMAGE": images})
        return dict(zip(ANSWERS, (logits.argmax(axis=1), *(rows[:, 0] for rows in verdict)), strict=True))


class Guard(Computation):
    """A guard of several graphs and a scorer."""

    def __init__(self, repository: Path, name: str, release: str, threads: int = 1) -> None:
        folders = {stage: repository / f"{name}_{stage}" / release for stage in ("autoencoder", "classifier", "scorer")}
        together = repository / name / release
        alone = (together / "guard.py").is_file()  # the layout in one process, with graphs of its own
        if alone:
            folders["scorer"] = together
        if (together / "image").is_dir():
            folders |= {"autoencoder": together / "autoencoder", "classifier": together / "image"}
        graphs = {name: together / name / "model.onnx" for name in ("autoencoder", "scorer")}
        self._scores = open_session(graphs["scorer"], threads) if graphs["scorer"].is_file() else None
        self._whole = open_session(graphs["autoencoder"], threads) if graphs["autoencoder"].is_file() and not self._scores else None
        """of one graph with the scorer in it, as that layout has it where the guard asks no copies of its classifier"""
        self._autoencoder = open_session(folders["autoencoder"] / "model.onnx", threads)
        self._classifier = open_session(folders["classifier"] / "model.onnx", threads)
        self._scorer = load_code(folders["scorer"], "scoring").Scorer.load(folders["scorer"] / "scorer.npz")
        self._part = int(load_code(together, "guard").PART) if alone else 0
        """images that the guard's own process computes at a time; 0: all of them"""
        self._memory = self._scorer.new_memory()
        self._answered = [output.name for output in self._classifier.get_outputs()]
        outputs = [output.name for output in self._autoencoder.get_outputs()]
        sources = {
            "NOISE_PENULTIMATE": "NOISE_INPUT" if "NOISE_INPUT" in outputs else "NOISE",
            "RECONSTRUCTION_PENULTIMATE": "RECONSTRUCTION",
        }
        # what a fused autoencoder stage answers itself is not computed again
        self._passes = {name: source for name, source in sources.items() if name in self._scorer.inputs and name not in outputs}
        self._wanted = [*self._passes.values(), *(name for name in self._scorer.inputs if name in outputs)]
        self.shape = tuple(self._autoencoder.get_inputs()[0].shape[1:])

    def __call__(self, images: npt.NDArray[np.float32]) -> dict[str, Array]:
        """``ANSWERS``, [n] each, from float32 [n, C, H, W], in parts where the guard's own process takes parts"""
        size = self._part or len(images)
        parts = [self._tensors(images[start : start + size]) for start in range(0, len(images), size)]
        tensors = parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        score = tensors["SCORE"][:, 0] if "SCORE" in tensors else None
        verdict = self._scorer.outputs(tensors, self._memory, score)
        return dict(zip(ANSWERS, (tensors["LOGITS"].argmax(axis=1), *(verdict[name][:, 0] for name in TENSORS)), strict=True))

    def _tensors(self, images: npt.NDArray[np.float32]) -> dict[str, Array]:
        """LOGITS, what the scorer reads and, where a graph makes it, SCORE, [n, ...] each: one call of the autoencoder and one of the
        classifier for all its passes; or one of all together."""
        if self._whole:
            names = [output.name for output in self._whole.get_outputs()]
            return dict(zip(names, self._whole.run(names, {"IMAGE": images}), strict=True))
        tensors = dict(zip(self._wanted, self._autoencoder.run(self._wanted, {"IMAGE": images}), strict=True))
        joined = np.concatenate([images, *(tensors[source] for source in self._passes.values())])
        answers = dict(zip(self._answered, self._classifier.run(self._answered, {"IMAGE": joined}), strict=True))
        passes = np.split(answers.pop("PENULTIMATE"), 1 + len(self._passes))
        tensors |= {name: rows[: len(images)] for name, rows in answers.items()}
        tensors |= dict(zip(["IMAGE_PENULTIMATE", *self._passes], passes, strict=True))
        if self._scores:
            (tensors["SCORE"],) = self._scores.run(["SCORE"], {name: tensors[name] for name in self._scorer.inputs})
        return tensors


def encode(images: npt.NDArray[np.float32]) -> list[str]:
    """Each image's bytes in base64, from float32 [n, C, H, W]"""
    return [b64encode(image).decode() for image in np.ascontiguousarray(images)]


def columns(answers: dict[str, Array]) -> npt.NDArray[np.float64]:
    """float64 [n, 4] in the order of ``ANSWERS``, for replies in JSON"""
    return np.column_stack([answers[name] for name in ANSWERS]).astype(np.float64)


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """On the CPU. Several threads sleep as soon as they have no work, as the guard's own do: spinning takes cores that others want."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if threads > 1:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path.as_posix(), options, providers=["CPUExecutionProvider"])


def load_code(folder: Path, module: str) -> Any:
    """A module of a release, from the code that lies beside its arrays."""
    package = ModuleType("guard_code")
    package.__path__ = [str(folder)]
    sys.modules["guard_code"] = package
    return importlib.import_module(f"guard_code.{module}")
