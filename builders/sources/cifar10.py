"""CIFAR-10: the official binary batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from noisec.builders.images import Images, Pixels, Pools
from noisec.builders.sources.faults import Faults
from noisec.builders.sources.official import official_file
from noisec.builders.spec import DataSpec
from noisec.errors import NoisecError

FOLDER = "cifar-10-batches-bin"
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
LEARN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
HELD_OUT = ("test_batch.bin",)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE = (3, 32, 32)
ROW = 1 + math.prod(SHAPE)
"""bytes of a row: the label, then the image"""
ROWS = 10_000
"""rows of an official batch"""


def read_batch(path: Path) -> Pixels:
    """A batch as it lies on disk: uint8 [n, 3073], a memory map.

    Raises:
        NoisecError: the file is no whole number of rows.
    """
    size = path.stat().st_size
    if size == 0 or size % ROW:
        raise NoisecError(
            f"{path}: {size} bytes, not a multiple of {ROW}; an official batch has {ROWS} rows, {ROWS * ROW} bytes; put a whole one there"
        )
    return np.memmap(path, np.uint8, mode="r").reshape(-1, ROW)


def load(names: Sequence[str], faults: Faults) -> Images:
    """The images of some batches: uint8 [n, 3, 32, 32]. Rows whose label byte is above 9 are faults, and so is a batch that is short."""
    batches = [read_batch(official_file(FOLDER, name, URL, MD5, archive=True)) for name in names]
    for name, batch in zip(names, batches, strict=True):
        faults.add_rows(name, batch[:, 0] >= len(CLASSES), f"label byte above {len(CLASSES) - 1}")
        if len(batch) < ROWS:
            faults.add(f"{name} rows {len(batch)} to {ROWS - 1}", f"truncated batch of fewer than {ROWS} rows")
    labels = np.concatenate([batch[:, 0] for batch in batches]).astype(np.int64)
    store = np.concatenate([batch[:, 1:] for batch in batches]).reshape(-1, *SHAPE)
    sound = np.flatnonzero(labels < len(CLASSES))
    return Images(store, sound, labels[sound])


def pools(spec: DataSpec, cache: Path, faults: Faults) -> Pools:
    """The official 50,000 + 10,000."""
    return Pools(load(LEARN, faults), load(HELD_OUT, faults), CLASSES)
