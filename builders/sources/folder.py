"""Your own folder of image files: one sub-folder for each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from noisec.builders.images import Pools
from noisec.builders.sources.decoded import Picture, decode, digest, stamp
from noisec.builders.sources.faults import Faults
from noisec.builders.spec import DataSpec
from noisec.errors import NoisecError

LEARN, HELD_OUT = "train", "test"
CHANNELS = 3


def pools(spec: DataSpec, cache: Path, faults: Faults) -> Pools:
    """The images of ``data.path``; with sub-folders ``train`` and ``test``, each with its own class folders, two pools, else one.

    Files that lie anywhere else are faults.

    Raises:
        NoisecError: the folder is missing or has no class folder, or not one image is readable.
    """
    assert spec.path is not None
    root = spec.path
    if not root.is_dir():
        raise NoisecError(f"{root}: no such folder; data.path of source = 'folder' is a folder with one sub-folder for each class")
    tops = [root / LEARN, root / HELD_OUT]
    if all(top.is_dir() for top in tops):
        _outside(root, [path for path in _entries(root) if path not in tops], "outside every class folder", faults)
    else:
        tops = [root]
    names = class_names(tops[0])
    listed = [_pictures(root, top, names, faults) for top in tops]
    images = decode(root, listed, lambda name: (root / name).open("rb"), spec.size, spec.channels or CHANNELS, cache, faults)
    return Pools(images[0], images[1] if len(images) == 2 else None, names, digest(root, [picture for part in listed for picture in part]))


def class_names(top: Path) -> tuple[str, ...]:
    """Names of the class folders, sorted; hidden folders are none.

    Raises:
        NoisecError: there is none, or a name has characters that cannot be shown.
    """
    names = tuple(path.name for path in _entries(top) if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise NoisecError(f"{top}: no class folder in it; put the images of each class into a sub-folder named after the class")
    for name in names:
        if not name.isprintable():
            raise NoisecError(f"{top}: class folder {name!a} has characters that cannot be shown; rename it")
    return names


def _pictures(root: Path, top: Path, names: Sequence[str], faults: Faults) -> list[Picture]:
    found = []
    for entry in _entries(top):
        if not entry.is_dir() or entry.name.startswith("."):
            _outside(root, [entry], "outside every class folder", faults)
        elif entry.name not in names:
            _outside(root, [entry], f"class that {LEARN}/ does not have", faults)
        else:
            label = names.index(entry.name)
            for file in _entries(entry):
                name = str(file.relative_to(root))
                if file.is_dir():
                    _outside(root, [file], "in a folder inside a class folder", faults)
                elif file.is_file() and os.access(file, os.R_OK):
                    found.append(Picture(name, label, stamp(file)))
                else:
                    faults.add(name, "not a readable file")
    return found


def _outside(root: Path, paths: Sequence[Path], reason: str, faults: Faults) -> None:
    """Every file in or below the paths is a fault."""
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if not file.is_dir():
                faults.add(str(file.relative_to(root)), reason)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise NoisecError(f"{folder}: cannot be listed ({error}); make it readable") from error
