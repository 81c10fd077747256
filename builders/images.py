"""Images, larger than memory where need be, and disjoint sets of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from noisec.errors import NoisecError

BATCH = 250
"""images in one float batch"""
SAMPLED = 1000
"""images that tell one set from another"""

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Images:
    """Labelled images: rows of a store, which may be a memory map."""

    store: Pixels
    """uint8 [m, C, H, W]"""
    rows: npt.NDArray[np.intp]
    """int [n], this set's rows of the store"""
    labels: npt.NDArray[np.int64]
    """int64 [n]"""

    @classmethod
    def whole(cls, store: Pixels, labels: npt.NDArray[np.int64]) -> Images:
        """Every row of a store."""
        return cls(store, np.arange(len(store)), labels)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | npt.NDArray[np.integer[Any]]) -> Images:
        return Images(self.store, self.rows[rows], self.labels[rows])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        _, channels, height, width = self.store.shape
        return channels, height, width

    @property
    def pixels(self) -> Pixels:
        """uint8 [n, C, H, W], all in memory"""
        return np.asarray(_remapped(self.store)[self.rows])

    def floats(self) -> Floats:
        """float32 [n, C, H, W] in [0, 1], all in memory"""
        return self.pixels.astype(np.float32) / 255

    @property
    def digest(self) -> str:
        """SHA-256 of all labels and of `SAMPLED` images spread over the set: of another set it is another one"""
        spread = np.linspace(0, len(self) - 1, min(len(self), SAMPLED)).astype(np.intp)
        return hashlib.sha256(self.labels.tobytes() + self[spread].pixels.tobytes()).hexdigest()

    def batches(self, size: int = BATCH) -> Iterator[Images]:
        """The same rows in order, at most ``size`` at a time."""
        return (self[start : start + size] for start in range(0, len(self), size))


@dataclass(frozen=True)
class Pools:
    """What a source holds."""

    learn: Images
    """what networks and detectors learn from"""
    held_out: Images | None
    """kept apart for calibration and report; None: the source does not keep any apart"""
    class_names: tuple[str, ...] = ()
    """empty where the source has no names"""
    digest: str = ""
    """changes when the user's own files do; empty for an official set"""


@dataclass(frozen=True)
class Splits:
    """Four disjoint sets of clean images."""

    train: Images
    fit: Images
    calibrate: Images
    report: Images
    class_names: tuple[str, ...]
    digest: str = ""
    """changes when the user's own files do; empty for an official set"""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.fit.shape


def _remapped(store: Pixels) -> Pixels:
    """A memory map opened anew, so that the pages that are read through it are given back with it; any other array, a view of a map
    among them, as it is."""
    if isinstance(store, np.memmap) and not isinstance(store.base, np.ndarray) and store.filename is not None:
        return np.memmap(store.filename, store.dtype, mode="r", offset=store.offset, shape=store.shape)
    return store


def cut(pool: Images, sizes: Sequence[int], seed: Sequence[int]) -> list[Images]:
    """Disjoint random sets of the given sizes.

    Raises:
        NoisecError: the pool is too small.
    """
    if sum(sizes) > len(pool):
        raise NoisecError(f"data: {sizes} images asked for, {sum(sizes)} in all, of a pool of {len(pool)}; ask for fewer")
    order = np.random.default_rng(seed).permutation(len(pool))
    edges = np.cumsum([0, *sizes])
    return [pool[order[start:stop]] for start, stop in pairwise(edges)]


def natural(images: Images, deviation: float, seed: int, share: float = 0.5) -> Iterator[Floats]:
    """Natural inputs, batch by batch: a share of the images with Gaussian sensor noise of a standard deviation drawn from
    [0, ``deviation``], clipped to [0, 1], the others as they are.

    Yields:
        float32 [<= BATCH, C, H, W]
    """
    generator = np.random.default_rng(seed)
    for batch in images.batches():
        each = generator.uniform(0, deviation, len(batch)) * (generator.random(len(batch)) < share)
        noise = generator.standard_normal((len(batch), *images.shape), dtype=np.float32)
        yield np.clip(batch.floats() + each.astype(np.float32)[:, None, None, None] * noise, 0, 1)


def in_batches(floats: Floats) -> Iterator[Floats]:
    """An array in batches of at most ``BATCH`` rows."""
    return (floats[start : start + BATCH] for start in range(0, len(floats), BATCH))
