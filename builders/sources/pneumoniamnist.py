"""PneumoniaMNIST: the official ``.npz`` of chest X-rays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from noisec.builders.images import Images, Pools
from noisec.builders.sources import npz
from noisec.builders.sources.faults import Faults
from noisec.builders.sources.official import official_file
from noisec.builders.spec import DataSpec
from noisec.errors import NoisecError

FOLDER = "pneumoniamnist"
NAME = "pneumoniamnist.npz"
URL = f"https://zenodo.org/records/10519652/files/{NAME}"
MD5 = "28209eda62fecd6e6a2d98b1501bb15f"
CLASSES = ("normal", "pneumonia")
SHAPE = (1, 28, 28)


def load(path: Path, splits: Sequence[str], faults: Faults) -> Images:
    """The images of some of ``train``, ``val`` and ``test``: uint8 [n, 1, 28, 28]. Rows whose label is not 0 or 1 are faults.

    Raises:
        NoisecError: an array is missing or of another shape.
    """
    parts = []
    for split in splits:
        part = npz.arrays(path, f"{split}_")
        if part is None:
            raise NoisecError(f"{path}: no arrays {split}_images and {split}_labels; put the official {NAME} there")
        if part[0].shape[1:] != SHAPE:
            raise NoisecError(f"{path}: {split}_images are {list(part[0].shape)}; expected [n, 28, 28]; put the official {NAME} there")
        faults.add_rows(f"{split}_labels", ~np.isin(part[1], range(len(CLASSES))), "label not 0 or 1")
        parts.append(part)
    store, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    sound = np.flatnonzero(np.isin(labels, range(len(CLASSES))))
    return Images(store, sound, labels[sound].astype(np.int64))


def pools(spec: DataSpec, cache: Path, faults: Faults) -> Pools:
    """Learned from: the official training and validation sets, 5,232 images; held out: the test set, 624."""
    path = official_file(FOLDER, NAME, URL, MD5)
    return Pools(load(path, ("train", "val"), faults), load(path, ("test",), faults), CLASSES)
