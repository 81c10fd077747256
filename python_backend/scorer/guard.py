"""A whole guard in one process: its networks' sessions and its scorer. It needs ONNX Runtime beside NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .scoring import IMAGE_PENULTIMATE, Scorer
from .session import open_session

Images = npt.NDArray[np.float32] | npt.NDArray[np.uint8]
"""[n, C, H, W], as the guard takes them"""
Arrays = Mapping[str, npt.NDArray[Any]]
PART = 16
"""images that the networks compute at a time: what larger batches need at once no longer fits the processor's caches"""
Submit = Callable[..., Future[Any]]
"""as an executor's"""


def in_turn(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """The same as an executor's ``submit``, in this thread."""
    done: Future[Any] = Future()
    done.set_result(function(*arguments))
    return done


class Guard:
    """A guard in the ``single`` layout.

    Args:
        directory: with ``scorer.npz``, and ``model.onnx`` in ``autoencoder``, ``classifier``, ``scorer`` and, where the guard asks copies
            of the classifier, ``image``; elsewhere the autoencoder's may make the image's pass, and the score, as well
        release: its number
        threads: compute threads of each session; 0 takes every core
        hurries: whether a second core may be used for an image that is alone; where all passes are one, it takes a second copy of the
            networks in memory

    Raises:
        ValueError: the scorer reads what the networks do not make.
    """

    def __init__(self, directory: Path, release: int, threads: int = 1, *, hurries: bool = False) -> None:
        self.scorer = Scorer.load(directory / "scorer.npz", release)
        self.memory = self.scorer.new_memory()
        networks, copies = directory / "autoencoder" / "model.onnx", directory / "image" / "model.onnx"
        self._classifier = open_session(directory / "classifier" / "model.onnx", threads)
        self._autoencoder = open_session(networks, threads)
        self._image = open_session(copies, threads) if copies.is_file() else self._classifier
        made = {output.name for output in self._autoencoder.get_outputs()}
        self._made = [name for name in ("LOGITS", "SCORE", *self.scorer.inputs) if name in made]
        self._of_image = [] if "LOGITS" in made else [output.name for output in self._image.get_outputs()]
        """outputs of the image's own passes; empty where they are one with the others"""
        read = self.scorer.inputs if "SCORE" not in made else [IMAGE_PENULTIMATE] if self.memory else []
        missing = set(read) - {*self._made, *map(_input, self._of_image)}
        if missing:
            raise ValueError(f"scorer.npz needs {sorted(missing)}, which the graphs beside it do not make")
        self._scores = None if "SCORE" in made else open_session(directory / "scorer" / "model.onnx", threads)
        self._beside = ThreadPoolExecutor(1)
        self._hurried = open_session(networks, 2, spinning=False) if hurries and not self._of_image else self._autoencoder

    @property
    def passes_apart(self) -> bool:
        """Whether the image's own passes can run beside the others."""
        return bool(self._of_image)

    def label(self, images: Images) -> Arrays:
        """LOGITS float32 [n, classes]; the classifier alone runs."""
        return {"LOGITS": self._classifier.run(["LOGITS"], {"IMAGE": images})[0]}

    def verdict(self, images: Images, *, hurry: bool = False) -> Arrays:
        """LOGITS and the scorer's outputs, [n, ...] each.

        Args:
            hurry: use a second core: for the image's own passes, or, where they are one with the others, for all of them
        """
        parts = [self._tensors(images[start : start + PART], hurry=hurry) for start in range(0, max(1, len(images)), PART)]
        tensors = parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {"LOGITS": tensors["LOGITS"], **self.scorer.outputs(tensors, self.memory, tensors["SCORE"][:, 0])}

    def _tensors(self, images: Images, *, hurry: bool) -> Arrays:
        """LOGITS, SCORE and what the scorer reads besides, [n, ...] each."""
        submit: Submit = self._beside.submit if hurry else in_turn
        passes = submit(self._image.run, self._of_image, {"IMAGE": images}) if self._of_image else None
        networks = self._hurried if hurry else self._autoencoder
        tensors = dict(zip(self._made, networks.run(self._made, {"IMAGE": images}), strict=True))
        if passes:
            tensors |= {_input(name): rows for name, rows in zip(self._of_image, passes.result(), strict=True)}
        if self._scores:
            (tensors["SCORE"],) = self._scores.run(["SCORE"], {name: tensors[name] for name in self.scorer.inputs})
        return tensors


def _input(output: str) -> str:
    """The scorer's name for what the image's passes answer."""
    return IMAGE_PENULTIMATE if output == "PENULTIMATE" else output
