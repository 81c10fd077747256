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

Indices = npt.NDArray[np.intp]

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
        count = len(activations)
        with np.errstate(over="ignore", invalid="ignore"):
            rows = (activations - self._rule.centre).astype(np.float32)
            lengths = np.einsum("nd,nd->n", rows, rows)
            points = np.concatenate([rows, -0.5 * lengths[:, None]], axis=1)
            held, _, held_same = self._neighbours(rows, lengths, self._points[: self._seen])
            own, other, own_same = self._neighbours(rows, lengths, points)
        new = np.isfinite(lengths)
        new[held[held_same]] = False
        new[own[own_same & (other < own)]] = False
        self._remember(points[new])
        near = np.concatenate([held[~held_same], own[~own_same & new[other]]])
        repeated: npt.NDArray[np.bool_] = np.bincount(near, minlength=count) >= self._rule.neighbours
        return repeated

    def _neighbours(self, rows: Floats, lengths: Floats, points: Floats) -> tuple[Indices, Indices, npt.NDArray[np.bool_]]:
        """Pairs of a row and a point that is nearly what the row is, or the same: row, point, and whether they are the same: [pairs] each.

        |a - b|^2 <= r^2 as a.b - |b|^2 / 2 >= (|a|^2 - r^2) / 2: the left side is one matrix product, of which few entries are that large.
        It is too coarse to tell the same from the nearly same, so that the few pairs for which that is open are subtracted.
        """
        products = np.concatenate([rows, np.ones((len(rows), 1), np.float32)], axis=1) @ points.T
        same_below = float(SAME * self._rule.radius) ** 2
        near = ((lengths - self._rule.radius**2) / 2).astype(np.float32)
        same = ((lengths * (1 - ROUNDING) - same_below) / 2).astype(np.float32)
        own, other = np.divmod(np.flatnonzero(products >= np.minimum(near, same)[:, None]), len(points))
        found = products[own, other]
        is_same = found >= same[own]
        pairs = np.flatnonzero(is_same)
        is_same[pairs] = np.square(rows[own[pairs]] - points[other[pairs], :-1]).sum(axis=1) <= same_below
        kept = is_same | (found >= near[own])
        return own[kept], other[kept], is_same[kept]

    def _remember(self, points: Floats) -> None:
        points = points[-len(self._points) :]
        self._points[(self._seen + np.arange(len(points))) % len(self._points)] = points
        self._seen += len(points)
