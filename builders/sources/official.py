"""Official data files: from ``$NOISEC_DATA``, else shipped with the package, else downloaded and checked."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

from noisec.errors import NoisecError


def local(*parts: str) -> Path | None:
    """``$NOISEC_DATA/<parts>``; None where the variable is not set or nothing lies there."""
    root = os.environ.get("NOISEC_DATA")
    path = Path(root, *parts) if root else None
    return path if path is not None and path.exists() else None


def official_file(folder: str, name: str, url: str, md5: str, *, shipped: Path | None = None, archive: bool = False) -> Path:
    """One official file, ``<folder>/<name>``.

    Args:
        url: what is downloaded; its MD5 is checked
        shipped: where the package brings the file along, if it does
        archive: ``url`` is a tar file that holds ``<folder>/<name>``

    Raises:
        NoisecError: the download failed or is not the official file.
    """
    for path in (local(folder, name), shipped):
        if path is not None and path.is_file():
            return path
    import pooch

    try:
        found = pooch.retrieve(
            url,
            f"md5:{md5}",
            fname=url.rsplit("/", 1)[1],
            path=pooch.os_cache("noisec") / folder,
            processor=pooch.Untar(members=[f"{folder}/{name}"]) if archive else None,
            progressbar=False,
        )
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        raise NoisecError(
            f"{name}: download of {url} failed ({error}); put the official file into a folder DIR/{folder} and set NOISEC_DATA=DIR"
        ) from error
    return Path(found[0] if archive else found)
