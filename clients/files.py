"""Image files in, rows of a table out: what ``noisec classify`` shows."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from noisec.clients.requests import GuardInterface
from noisec.clients.results import Verdicts
from noisec.errors import NoisecError


def read_images(paths: Sequence[Path], interface: GuardInterface) -> tuple[list[str], npt.NDArray[np.float32]]:
    """Every image of every file, ready to send.

    Returns:
        a name for each image, and float32 [n, C, H, W] in [0, 1]

    Raises:
        NoisecError: a file is missing or unreadable, or an image does not fit the guard; nothing is left out.
    """
    names: list[str] = []
    parts: list[npt.NDArray[np.float32]] = []
    for path in paths:
        try:
            images = interface.prepare(_npz(path) if path.suffix == ".npz" else _picture(path, interface))
        except NoisecError as error:
            raise NoisecError(f"{path}: {error}") from error
        parts.append(images)
        names += [str(path)] if len(images) == 1 else [f"{path}[{index}]" for index in range(len(images))]
    return names, np.concatenate(parts)


def _npz(path: Path) -> npt.NDArray[Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if "images" not in archive:
                raise NoisecError(f"no array 'images'; it holds {archive.files}")
            images: npt.NDArray[Any] = archive["images"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise NoisecError(f"not a readable npz file: {error}") from error
    return images


def _picture(path: Path, interface: GuardInterface) -> npt.NDArray[np.uint8]:
    channels, height, width = interface.shape
    try:
        with Image.open(path) as picture:
            if picture.size != (width, height):
                raise NoisecError(
                    f"the picture is {picture.width} x {picture.height}; {interface.guard} takes {width} x {height}: resize it first"
                )
            pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise NoisecError(f"not a readable picture: {error}") from error
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
            "score": verdicts.scores.tolist(),
            "release": verdicts.releases.tolist(),
        }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
