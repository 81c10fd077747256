"""Clean, labelled images and their disjoint sets."""

from __future__ import annotations

import gzip
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from noisec.builders.spec import DataSpec

from noisec.errors import NoisecError

FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
FASHION_MNIST_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SHIPPED = Path(__file__).parent / "data" / "fashion-mnist"


@dataclass(frozen=True)
class Images:
    """Images with their labels."""

    pixels: npt.NDArray[np.uint8]
    """uint8 [n, C, H, W]"""
    labels: npt.NDArray[np.int64]
    """int64 [n]"""

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: slice | npt.NDArray[np.intp]) -> Images:
        return Images(self.pixels[rows], self.labels[rows])

    def floats(self) -> npt.NDArray[np.float32]:
        """float32 [n, C, H, W] in [0, 1]"""
        return self.pixels.astype(np.float32) / 255


@dataclass(frozen=True)
class Splits:
    """Four disjoint sets of clean images."""

    train: Images
    fit: Images
    calibrate: Images
    report: Images
    class_names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        _, channels, height, width = self.train.pixels.shape
        return channels, height, width


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """A gzipped idx file (the MNIST format) as a uint8 array of the shape it states.

    Raises:
        NoisecError: the file is truncated, or no unsigned-byte idx file.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise NoisecError(f"{path}: not a readable gzip file ({error}); remove it to have it downloaded again") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise NoisecError(f"{path}: not an idx file of unsigned bytes; it begins with {content[:4].hex() or 'nothing'}")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], dtype=">u4").astype(int)
    if len(content) != start + shape.prod():
        raise NoisecError(f"{path}: {len(content) - start} bytes of data where its header {tuple(shape)} asks for {shape.prod()}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def fashion_mnist_file(name: str) -> Path:
    """One official file: from ``$NOISEC_DATA/fashion-mnist``, else shipped with the package, else downloaded and checked."""
    local = [Path(root) / "fashion-mnist" / name for root in filter(None, [os.environ.get("NOISEC_DATA")])]
    for path in [*local, SHIPPED / name]:
        if path.is_file():
            return path
    import pooch

    try:
        return Path(
            pooch.retrieve(
                FASHION_MNIST_URL + name,
                f"md5:{FASHION_MNIST_MD5[name]}",
                fname=name,
                path=pooch.os_cache("noisec") / "fashion-mnist",
                progressbar=False,
            )
        )
    except OSError as error:
        raise NoisecError(
            f"{name}: download from {FASHION_MNIST_URL} failed ({error}); put the official file into a folder "
            "DIR/fashion-mnist and set NOISEC_DATA=DIR"
        ) from error


def fashion_mnist(split: str) -> Images:
    """Official Fashion-MNIST, split ``train`` (60,000) or ``t10k`` (10,000): uint8 [n, 1, 28, 28]."""
    pixels = read_idx(fashion_mnist_file(f"{split}-images-idx3-ubyte.gz"))
    labels = read_idx(fashion_mnist_file(f"{split}-labels-idx1-ubyte.gz"))
    return Images(pixels[:, None], labels.astype(np.int64))


def npz_images(path: Path, prefix: str = "") -> Images | None:
    """``<prefix>images`` and ``<prefix>labels`` of an npz file; None where it has neither.

    Images are uint8, or floats in [0, 1]; [n, H, W], [n, H, W, C] or [n, C, H, W] with C = 1 or 3. Labels are integers from 0.

    Raises:
        NoisecError: the file or an array is not of that form.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = f"{prefix}images", f"{prefix}labels"
            missing = [name for name in names if name not in archive]
            if missing:
                if prefix and len(missing) == 2:
                    return None
                raise NoisecError(f"{path}: no array {' and no array '.join(missing)}; it holds {archive.files}")
            pixels, labels = (archive[name] for name in names)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise NoisecError(f"{path}: not a readable npz file: {error}") from error
    if labels.shape != (len(pixels),) or not np.issubdtype(labels.dtype, np.integer) or (len(labels) and labels.min() < 0):
        raise NoisecError(
            f"{path}: {names[1]} is {labels.dtype} {list(labels.shape)}; expected integers from 0, one for each of {len(pixels)} images"
        )
    return Images(_channels_first(path, _to_bytes(path, pixels)), labels.astype(np.int64))


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


def load_pools(spec: DataSpec) -> tuple[Images, Images | None]:
    """What networks and detectors learn from, and the held-out images where the source keeps them apart."""
    if spec.source == "fashion-mnist":
        return fashion_mnist("train"), fashion_mnist("t10k")
    if spec.source == "fashion-mnist-test":
        return fashion_mnist("t10k"), None
    assert spec.path is not None
    images = npz_images(spec.path)
    assert images is not None
    return images, npz_images(spec.path, "test_")


def load_splits(spec: DataSpec, seed: int) -> Splits:
    """Cut the source into its four disjoint sets: ``train`` and ``fit`` from the first pool, ``calibrate`` and ``report`` from the
    held-out one, or all four from one pool where there is no other.

    Raises:
        NoisecError: the source is too small, or a class is missing from the training set.
    """
    pool, held_out = load_pools(spec)
    learn, judge = (spec.train, spec.fit), (spec.calibrate, spec.report)
    parts = cut(pool, (*learn, *judge), [seed]) if held_out is None else [*cut(pool, learn, [seed]), *cut(held_out, judge, [seed, 1])]
    names = spec.class_names or (FASHION_MNIST_CLASSES if spec.source.startswith("fashion-mnist") else ())
    classes = int(pool.labels.max()) + 1
    names = names or tuple(map(str, range(classes)))
    if len(names) != classes:
        raise NoisecError(f"data.class_names has {len(names)} names; the labels go from 0 to {classes - 1}")
    absent = sorted(set(range(classes)) - set(parts[0].labels.tolist()))
    if absent:
        raise NoisecError(f"classes {absent} have no image in the {len(parts[0])} training images; give more images or renumber the labels")
    train, fit, calibrate, report = parts
    return Splits(train, fit, calibrate, report, names)


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


def with_natural_noise(images: npt.NDArray[np.float32], deviation: float, seed: int) -> npt.NDArray[np.float32]:
    """Half of the images as they are, half with Gaussian sensor noise of a deviation drawn from [0, ``deviation``], clipped to [0, 1].

    Args:
        images: float32 [n, C, H, W] in [0, 1]
    """
    generator = np.random.default_rng(seed)
    each = generator.uniform(0, deviation, len(images)) * (generator.random(len(images)) < 0.5)
    noise = generator.standard_normal(images.shape, dtype=np.float32)
    return np.clip(images + each.astype(np.float32)[:, None, None, None] * noise, 0, 1)
