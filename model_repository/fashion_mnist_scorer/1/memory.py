"""What a scorer remembers of recent inputs: one that many others nearly repeat is a step of a search for what the guard lets pass
(stateful detection: Chen, Carlini and Wagner 2019).

A search that may change no pixel by more than a little asks for the same image again and again, a little changed each time. Natural inputs
do not come in such clusters; the very same input sent again and again does, tells its sender nothing new, and does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .detectors import Floats

SAME = 0.01
"""share of the radius within which two inputs are the same one, and what rounding makes of it"""


@dataclass(frozen=True)
class Repeats:
    """When an input repeats others."""

    centre: Floats
    """[d], mean of natural inputs' activations: float32 tells small distances best around it"""
    radius: Floats
    """[], distance of activations within which one input nearly repeats another"""
    neighbours: npt.NDArray[np.int64]
    """[], how many recent inputs have to be that near"""
    size: npt.NDArray[np.int64]
    """[], recent inputs that are remembered"""


class Memory:
    """The most recent inputs, each once; the oldest is forgotten first."""

    def __init__(self, rule: Repeats) -> None:
        self._rule = rule
        self._same = float(SAME * rule.radius) ** 2
        self._rows = np.zeros((int(rule.size), len(rule.centre)), np.float32)
        self._squares = np.zeros(int(rule.size), np.float32)
        self._seen = 0
        """inputs that were ever remembered"""

    def repeated(self, activations: Floats) -> npt.NDArray[np.bool_]:
        """Whether enough recent inputs, others of the batch among them, are nearly what each input is; remembers the inputs.

        Args:
            activations: float32 [n, d], the images' penultimate activations

        Returns:
            bool [n], False for activations that are not finite
        """
        with np.errstate(over="ignore", invalid="ignore"):
            rows = (activations - self._rule.centre).astype(np.float32)
            squares = (rows * rows).sum(axis=1)
            known = min(self._seen, len(self._rows))
            before = squares[:, None] - 2 * (rows @ self._rows[:known].T) + self._squares[:known]
            beside = squares[:, None] - 2 * (rows @ rows.T) + squares
        same = (before <= self._same).any(axis=1) | np.tril(beside <= self._same, -1).any(axis=1)
        fresh = np.flatnonzero(np.isfinite(squares) & ~same)
        near = self._near(before).sum(axis=1) + self._near(beside[:, fresh]).sum(axis=1)
        self._remember(rows, squares, fresh)
        repeated: npt.NDArray[np.bool_] = near >= self._rule.neighbours
        return repeated

    def _near(self, distances: Floats) -> npt.NDArray[np.bool_]:
        """Whether squared distances are those of inputs that are nearly, but not quite, the same."""
        found: npt.NDArray[np.bool_] = (distances <= self._rule.radius**2) & (distances > self._same)
        return found

    def _remember(self, rows: Floats, squares: Floats, fresh: npt.NDArray[np.intp]) -> None:
        fresh = fresh[-len(self._rows) :]
        places = (self._seen + np.arange(len(fresh))) % len(self._rows)
        self._rows[places], self._squares[places] = rows[fresh], squares[fresh]
        self._seen += len(fresh)
