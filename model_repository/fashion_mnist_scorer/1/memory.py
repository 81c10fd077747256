"""What a scorer remembers of recent inputs: one that many others nearly repeat is a step of a search for what the guard lets pass
(stateful detection: Chen, Carlini and Wagner 2019).

A search that may change no pixel by more than a little asks for the same image again and again, a little changed each time. Different
images do not come in such clusters. The very same input sent again and again tells its sender nothing new, and does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .detectors import Floats

SAME = 0.01
"""share of the radius within which two inputs are the same one"""
ROUNDING = 1e-5
"""of a matrix product, relative to an input's squared length"""


@dataclass(frozen=True)
class Repeats:
    """When an input repeats others."""

    centre: Floats
    """[d], mean of natural inputs' activations, which is subtracted from all: small numbers have small rounding errors"""
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
        self._points = np.zeros((int(rule.size), len(rule.centre) + 1), np.float32)
        """[size, d + 1], a remembered input's activations around the centre, and minus half their squared length"""
        self._seen = 0
        """inputs that were ever remembered"""

    def repeated(self, activations: Floats) -> npt.NDArray[np.bool_]:
        """Whether enough recent inputs, others of the batch among them, are nearly what each input is; remembers the inputs.

        Args:
            activations: float32 [n, d], the images' penultimate activations

        Returns:
            bool [n]; what it is for activations that are not finite does not matter, they are malicious anyway
        """
        with np.errstate(over="ignore", invalid="ignore"):
            rows = (activations - self._rule.centre).astype(np.float32)
            lengths = np.einsum("nd,nd->n", rows, rows)
            points = np.concatenate([rows, -0.5 * lengths[:, None]], axis=1)
            near_held, same_held = self._neighbours(rows, lengths, self._points[: self._seen])
            near_batch, same_batch = self._neighbours(rows, lengths, points)
        new = np.flatnonzero(np.isfinite(lengths) & ~same_held.any(axis=1) & ~np.tril(same_batch, -1).any(axis=1))
        self._remember(points[new])
        repeated: npt.NDArray[np.bool_] = near_held.sum(axis=1) + near_batch[:, new].sum(axis=1) >= self._rule.neighbours
        return repeated

    def _neighbours(self, rows: Floats, lengths: Floats, points: Floats) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Which points are nearly what each row is, and which are the same: bool [n, m] each.

        |a - b|^2 <= r^2 as a.b - |b|^2 / 2 >= (|a|^2 - r^2) / 2: the left side is one matrix product. It is too coarse to tell the same
        from the nearly same, so that the few pairs for which that is open are subtracted.
        """
        products = np.concatenate([rows, np.ones((len(rows), 1), np.float32)], axis=1) @ points.T
        same_below = float(SAME * self._rule.radius) ** 2
        near = products >= (lengths[:, None] - self._rule.radius**2) / 2
        same = products >= (lengths[:, None] * (1 - ROUNDING) - same_below) / 2
        open_rows, open_points = np.nonzero(same)
        same[open_rows, open_points] = np.square(rows[open_rows] - points[open_points, :-1]).sum(axis=1) <= same_below
        return near & ~same, same

    def _remember(self, points: Floats) -> None:
        points = points[-len(self._points) :]
        self._points[(self._seen + np.arange(len(points))) % len(self._points)] = points
        self._seen += len(points)
