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
        self._points = np.zeros((int(rule.size), len(rule.centre) + 1), np.float32)
        """[size, d + 1], a remembered input's activations around the centre, and minus half their squared length"""
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
            lengths = np.einsum("nd,nd->n", rows, rows)
            points = np.concatenate([rows, -0.5 * lengths[:, None]], axis=1)
            # |a - b|^2 <= r^2 as a.b - |b|^2 / 2 >= (|a|^2 - r^2) / 2: the left side is one matrix product.
            products = [np.column_stack([rows, np.ones(len(rows), np.float32)]) @ held.T for held in (self._points[: self._seen], points)]
            near, same = (((lengths - radius**2) / 2)[:, None] for radius in (self._rule.radius, SAME * self._rule.radius))
            before, beside = products
            known = (before.max(axis=1, initial=-np.inf) >= same[:, 0]).astype(np.intp)
            fresh = np.flatnonzero(np.isfinite(lengths) & (known == 0) & ~np.tril(beside >= same, -1).any(axis=1))
            others = beside[:, fresh]
            found = np.count_nonzero(before >= near, axis=1) - known + ((others >= near) & (others < same)).sum(axis=1)
        self._remember(points[fresh])
        repeated: npt.NDArray[np.bool_] = found >= self._rule.neighbours
        return repeated

    def _remember(self, points: Floats) -> None:
        points = points[-len(self._points) :]
        self._points[(self._seen + np.arange(len(points))) % len(self._points)] = points
        self._seen += len(points)
