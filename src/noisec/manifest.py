"""What a release is: its digests, versions and measured figures.

The manifest lies in the version directory of the guard's ensemble, ``<repository>/<guard>/<release>/manifest.json``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from noisec.contract import STAGES, stage_model
from noisec.errors import NoisecError

FILE_NAME = "manifest.json"


def manifest_path(repository: Path, guard: str, release: int) -> Path:
    return repository / guard / str(release) / FILE_NAME


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def release_files(repository: Path, guard: str, release: int) -> list[Path]:
    """Every file that the server reads for one release: configs and version directories of the guard and its stages.

    The manifest itself is left out, as no file can hold its own digest.
    """
    models = [guard, *(stage_model(guard, stage) for stage in STAGES)]
    found: list[Path] = []
    for model in models:
        found.append(repository / model / "config.pbtxt")
        found += sorted(path for path in (repository / model / str(release)).rglob("*") if path.is_file())
    own = manifest_path(repository, guard, release)
    return [path for path in found if path != own and "__pycache__" not in path.parts]


def write_manifest(repository: Path, guard: str, release: int, content: dict[str, Any]) -> Path:
    """Write the manifest with the SHA-256 of every file of the release. ``content`` holds everything else."""
    files = {path.relative_to(repository).as_posix(): digest(path) for path in release_files(repository, guard, release)}
    path = manifest_path(repository, guard, release)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"guard": guard, "release": release, **content, "files": files}, indent=2) + "\n")
    return path


def read_manifest(repository: Path, guard: str, release: int | None = None) -> dict[str, Any]:
    """The manifest of one release, or of the highest one.

    Raises:
        NoisecError: the guard or the release is not in the repository.
    """
    if release is None:
        release = max(releases(repository, guard))
    path = manifest_path(repository, guard, release)
    if not path.is_file():
        raise NoisecError(f"{path}: no such manifest; releases of {guard!r} here: {releases(repository, guard)}")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def guards(repository: Path) -> list[str]:
    """Names of the guards in a model repository."""
    return sorted({path.parent.parent.name for path in repository.glob(f"*/*/{FILE_NAME}")})


def releases(repository: Path, guard: str) -> list[int]:
    """Release numbers of a guard, ascending.

    Raises:
        NoisecError: there is none.
    """
    found = sorted(int(path.parent.name) for path in (repository / guard).glob(f"*/{FILE_NAME}") if path.parent.name.isdigit())
    if not found:
        raise NoisecError(f"{repository}: no guard {guard!r}; guards here: {guards(repository) or 'none'}. Build one with 'noisec build'.")
    return found


def verify(repository: Path, guard: str, release: int | None = None) -> list[str]:
    """Differences between the files on disk and the manifest's digests, one sentence each; empty when there are none."""
    manifest = read_manifest(repository, guard, release)
    expected: dict[str, str] = manifest["files"]
    present = {p.relative_to(repository).as_posix(): p for p in release_files(repository, guard, manifest["release"]) if p.is_file()}
    problems = [f"{name}: missing" for name in expected if name not in present]
    problems += [f"{name}: not in the manifest" for name in present if name not in expected]
    problems += [
        f"{name}: changed since the build" for name, path in present.items() if name in expected and digest(path) != expected[name]
    ]
    return problems
