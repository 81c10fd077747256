"""Image files -> one uint8 memory map, decoded image by image, once."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from noisec.builders.images import Images, Pixels
from noisec.builders.progress import tracked
from noisec.builders.sources.faults import Faults
from noisec.builders.workbench import Workbench
from noisec.errors import NoisecError

Size = tuple[int, int]
"""(H, W)"""
Opener = Callable[[str], BinaryIO]
"""a picture's name -> its open file"""
STORE, ROWS, FAULTS = "images.npy", "rows.npy", "faults.json"


@dataclass(frozen=True)
class Picture:
    """An image file that is not decoded yet."""

    name: str
    label: int
    stamp: str
    """changes when the file does: size and modification time"""


def stamp(path: Path) -> str:
    """Size and modification time of a file."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def digest(where: Path, pictures: Sequence[Picture]) -> str:
    """SHA-256 of the list of files, with their sizes and modification times."""
    found = hashlib.sha256(str(where.resolve()).encode("utf-8", "surrogateescape"))
    for picture in pictures:
        found.update(f"\n{picture.name}\0{picture.stamp}".encode("utf-8", "surrogateescape"))
    return found.hexdigest()


def decode(
    where: Path, pools: Sequence[Sequence[Picture]], opened: Opener, size: Size | None, channels: int, cache: Path, faults: Faults
) -> list[Images]:
    """The images of each pool, uint8 [n, channels, H, W], all of them in one memory map that a later call reuses.

    Args:
        where: what the pictures' names are relative to
        size: resized to this; None: those that do not have the most common size are faults
        cache: folder of the memory maps

    Raises:
        NoisecError: no picture at all is readable, or the memory map cannot be written or read.
    """
    pictures = [picture for pool in pools for picture in pool]
    inputs = {"files": digest(where, pictures), "size": size, "channels": channels}
    folder = Workbench(cache).step("images", inputs, lambda empty: _write(pictures, opened, size, channels, empty))
    try:
        store, rows = np.load(folder / STORE, mmap_mode="r"), np.load(folder / ROWS)
        found = json.loads((folder / FAULTS).read_text())
    except (OSError, ValueError) as error:
        raise NoisecError(f"{folder}: damaged memory map of images ({error}); remove this folder to have it made again") from error
    for name, reason in found:
        faults.add(name, reason)
    if not len(rows):
        raise NoisecError("\n".join([*faults.lines(), f"{where}: not one readable image; put images there or correct data.path"]))
    labels = np.array([picture.label for picture in pictures], np.int64)
    edges = np.searchsorted(rows, np.cumsum([len(pool) for pool in pools])[:-1])
    return [Images(store, part, labels[part]) for part in np.split(rows, edges)]


def _write(pictures: Sequence[Picture], opened: Opener, size: Size | None, channels: int, folder: Path) -> None:
    """Fill a folder with the memory map, the rows of it that hold an image, and the faults of the others.

    The file is written row by row and not through a map, so that a full disk is an error and no dirty page counts as memory in use.
    """
    height, width = size or _common_size(pictures, opened)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(pictures), channels, height, width)}
    blank = bytes(channels * height * width)
    rows: list[int] = []
    faults: list[tuple[str, str]] = []
    try:
        with (folder / STORE).open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]
            for row, picture in enumerate(tracked(pictures, "decode images", len(pictures))):
                pixels = _read(picture.name, opened, (height, width), channels, resize=size is not None)
                if isinstance(pixels, str):
                    faults.append((picture.name, pixels))
                    file.write(blank)
                else:
                    rows.append(row)
                    file.write(pixels.tobytes())
    except OSError as error:
        gigabytes = len(pictures) * len(blank) / 1e9
        raise NoisecError(f"{folder}: cannot write {gigabytes:.1f} GB of decoded images ({error}); free space or give less") from error
    np.save(folder / ROWS, np.array(rows, np.intp))
    (folder / FAULTS).write_text(json.dumps(faults))


def _read(name: str, opened: Opener, size: Size, channels: int, *, resize: bool) -> Pixels | str:
    """uint8 [channels, H, W], or what is wrong with the file."""
    height, width = size
    try:
        with opened(name) as file, Image.open(file) as picture:
            if picture.mode.startswith(("I", "F")):
                return "more than 8 bits a channel"
            if not resize and picture.size != (width, height):
                return f"mixed size, not the most common {height} x {width}"
            plain = picture.convert("L" if channels == 1 else "RGB")
            if resize:
                plain = plain.resize((width, height), Image.Resampling.BILINEAR)
            return np.asarray(plain).reshape(height, width, channels).transpose(2, 0, 1)
    except UnidentifiedImageError:
        return "not an image"
    except Exception:  # on broken files decoders raise anything, from SyntaxError to struct.error
        return "broken or truncated"


def _common_size(pictures: Sequence[Picture], opened: Opener) -> Size:
    """The most common (H, W), from the headers; (1, 1) where none is readable."""
    found = Counter(_header_size(picture.name, opened) for picture in tracked(pictures, "measure images", len(pictures)))
    return max(filter(None, found), key=found.__getitem__, default=(1, 1))


def _header_size(name: str, opened: Opener) -> Size | None:
    try:
        with opened(name) as file, Image.open(file) as picture:
            return picture.height, picture.width
    except Exception:  # decoding gives the reason
        return None
