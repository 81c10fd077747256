"""Fashion-MNIST: the official idx files."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from noisec.builders.images import Images, Pools
from noisec.builders.sources.faults import Faults
from noisec.builders.sources.official import official_file
from noisec.builders.spec import DataSpec
from noisec.errors import NoisecError

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SHIPPED = Path(__file__).parent.parent / "data" / "fashion-mnist"


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


def official(name: str) -> Path:
    """One official file."""
    return official_file("fashion-mnist", name, URL + name, MD5[name], shipped=SHIPPED / name)


def load(split: str) -> Images:
    """Official Fashion-MNIST, split ``train`` (60,000) or ``t10k`` (10,000): uint8 [n, 1, 28, 28]."""
    pixels = read_idx(official(f"{split}-images-idx3-ubyte.gz"))
    labels = read_idx(official(f"{split}-labels-idx1-ubyte.gz"))
    return Images.whole(pixels[:, None], labels.astype(np.int64))


def pools(spec: DataSpec, cache: Path, faults: Faults) -> Pools:
    """The official 60,000 + 10,000."""
    return Pools(load("train"), load("t10k"), CLASSES)


def shipped_pools(spec: DataSpec, cache: Path, faults: Faults) -> Pools:
    """The 10,000 test images, which ship with the package, as one pool."""
    return Pools(load("t10k"), None, CLASSES)
