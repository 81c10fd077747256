"""Image files in, rows of a table out: what ``noisec classify`` shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from noisec.clients.requests import GuardInterface, Pixels
from noisec.clients.results import Verdicts
from noisec.errors import NoisecError
from noisec.npz import read_npz


def read_images(paths: Sequence[Path], interface: GuardInterface) -> tuple[list[str], Pixels]:
    """Every image of every file, ready to send.

    Returns:
        a name for each image, and [n, C, H, W] as the guard takes them

    Raises:
        NoisecError: a file is missing or unreadable, or an image does not fit the guard; nothing is left out.
    """
    names: list[str] = []
    parts: list[Pixels] = []
    for path in paths:
        array = _npz(path) if path.suffix == ".npz" else _picture(path, interface)
        try:
            images = interface.prepare(array)
        except NoisecError as error:
            raise NoisecError(f"{path}: {error}") from error
        parts.append(images)
        names += [str(path)] if len(images) == 1 else [f"{path}[{index}]" for index in range(len(images))]
    return names, np.concatenate(parts)


def _npz(path: Path) -> npt.NDArray[Any]:
    arrays = read_npz(path)
    if "images" not in arrays:
        raise NoisecError(f"{path}: no array 'images'; it holds {list(arrays)}")
    return arrays["images"]


def _picture(path: Path, interface: GuardInterface) -> npt.NDArray[np.uint8]:
    channels, height, width = interface.shape
    try:
        with Image.open(path) as picture:
            mode, size = picture.mode, picture.size
            transparent = mode.endswith(("A", "a")) or "transparency" in picture.info
            pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    except Exception as error:  # on broken files decoders raise anything, from SyntaxError to struct.error
        raise NoisecError(f"{path}: not a readable picture: {error}") from error
    if mode.startswith(("I", "F")) or transparent:
        what = "transparency" if transparent else "more than 8 bits a channel"
        raise NoisecError(f"{path}: a picture with {what} ({mode}); save it as 8-bit grey or RGB, as the classifier is to see it")
    if size != (width, height):
        raise NoisecError(f"{path}: the picture is {size[0]} x {size[1]}; {interface.guard} takes {width} x {height}: resize it first")
    return pixels.reshape(1, height, width, channels).transpose(0, 3, 1, 2)


def verdict_rows(names: Sequence[str], verdicts: Verdicts, interface: GuardInterface) -> list[dict[str, Any]]:
    """One dictionary of plain values for each image."""
    columns: dict[str, Sequence[Any]] = {
        "file": names,
        "label": verdicts.labels.tolist(),
        "class": [interface.name_of(label) for label in verdicts.labels],
    }
    if (
        verdicts.scores is not None
        and verdicts.p_values is not None
        and verdicts.is_malicious is not None
        and verdicts.releases is not None
    ):
        columns |= {
            "malicious": verdicts.is_malicious.tolist(),
            "p_value": verdicts.p_values.tolist(),
            "score": [score if math.isfinite(score) else None for score in verdicts.scores.tolist()],
            "release": verdicts.releases.tolist(),
        }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
