"""Your own ``.npz`` of images and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from noisec.builders.images import Images, Pixels, Pools
from noisec.builders.sources.decoded import Picture, digest, stamp
from noisec.builders.sources.faults import Faults
from noisec.builders.spec import DataSpec
from noisec.errors import NoisecError
from noisec.npz import read_npz


def pools(spec: DataSpec, cache: Path, faults: Faults) -> Pools:
    """``images`` and ``labels`` of ``data.path``, and ``test_images`` and ``test_labels`` where it has them."""
    assert spec.path is not None
    images = load(spec.path)
    assert images is not None
    return Pools(images, load(spec.path, "test_"), (), digest(spec.path, [Picture(spec.path.name, 0, stamp(spec.path))]))


def load(path: Path, prefix: str = "") -> Images | None:
    """``<prefix>images`` and ``<prefix>labels`` of an npz file; None where it has neither.

    Images are as in :func:`arrays`; labels are integers from 0.

    Raises:
        NoisecError: the file or an array is not of that form.
    """
    found = arrays(path, prefix)
    if found is None:
        return None
    pixels, labels = found
    if len(labels) and labels.min() < 0:
        raise _wrong_labels(path, prefix, pixels, labels)
    return Images.whole(pixels, labels.astype(np.int64))


def arrays(path: Path, prefix: str) -> tuple[Pixels, npt.NDArray[np.integer[Any]]] | None:
    """``<prefix>images``, as uint8 [n, C, H, W], and ``<prefix>labels``, as integers [n]; None where the file has neither.

    Images are uint8, or floats in [0, 1]; [n, H, W], [n, H, W, C] or [n, C, H, W] with C = 1 or 3. Labels are integers, [n] or [n, 1].

    Raises:
        NoisecError: the file or an array is not of that form.
    """
    archive = read_npz(path)
    names = f"{prefix}images", f"{prefix}labels"
    missing = [name for name in names if name not in archive]
    if prefix and len(missing) == 2:
        return None
    if missing:
        raise NoisecError(f"{path}: no array {' and no array '.join(missing)}; it holds {list(archive)}")
    pixels, labels = (archive[name] for name in names)
    if labels.shape not in ((len(pixels),), (len(pixels), 1)) or not np.issubdtype(labels.dtype, np.integer):
        raise _wrong_labels(path, prefix, pixels, labels)
    return _channels_first(path, _to_bytes(path, pixels)), labels.reshape(-1)


def _wrong_labels(path: Path, prefix: str, pixels: npt.NDArray[np.generic], labels: npt.NDArray[np.generic]) -> NoisecError:
    return NoisecError(
        f"{path}: {prefix}labels is {labels.dtype} {list(labels.shape)}; expected integers from 0, one for each of {len(pixels)} images"
    )


def _to_bytes(path: Path, pixels: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return np.asarray(pixels, np.uint8)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise NoisecError(f"{path}: images are {pixels.dtype}; expected uint8, or floats in [0, 1]")
    values = pixels.astype(np.float32)
    if not bool(np.all((values >= 0) & (values <= 1))):
        raise NoisecError(f"{path}: float images reach from {np.min(values)} to {np.max(values)}; expected [0, 1] and no NaN")
    return np.asarray(np.rint(values * 255), np.uint8)


def _channels_first(path: Path, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if pixels.ndim == 3:
        return pixels[:, None]
    if pixels.ndim == 4 and pixels.shape[1] in (1, 3):
        return pixels
    if pixels.ndim == 4 and pixels.shape[3] in (1, 3):
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    raise NoisecError(f"{path}: images are {list(pixels.shape)}; expected [n, H, W], [n, H, W, C] or [n, C, H, W] with C = 1 or 3")
