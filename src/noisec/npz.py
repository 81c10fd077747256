"""Reading ``.npz`` files that others have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from noisec.errors import NoisecError


def read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Every array of an npz file, without running pickled code.

    Raises:
        NoisecError: the file is missing, damaged, no npz file, or holds Python objects.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive.items())
    except Exception as error:  # on damaged files zipfile and zlib raise anything
        raise NoisecError(f"{path}: not a readable npz file: {error}") from error
