"""What a release is: its digests, versions and measured figures.

The manifest lies in the version directory of the guard's own model, ``<repository>/<guard>/<release>/manifest.json``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from noisec.contract import STAGES, stage_model
from noisec.errors import NoisecError

FILE_NAME = "manifest.json"
CONFIG = "config.pbtxt"
CARD = "README.md"
UNFINISHED = ".noisec-"
"""how the names of folders begin in which a release is written before it is put into its place: no server looks into them"""


def manifest_path(repository: Path, guard: str, release: int) -> Path:
    return repository / guard / str(release) / FILE_NAME


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def models(guard: str) -> list[str]:
    """Triton models of a guard: its own and those of its stages."""
    return [guard, *(stage_model(guard, stage) for stage in STAGES)]


def release_files(repository: Path, guard: str, release: int) -> list[Path]:
    """Every file that the server reads for one release: configurations and version directories.

    The manifest itself is left out, as no file can hold its own digest.
    """
    found: list[Path] = []
    for model in models(guard):
        found.append(repository / model / CONFIG)
        found += sorted(path for path in (repository / model / str(release)).rglob("*") if path.is_file())
    return [path for path in found if path != manifest_path(repository, guard, release)]


def write_manifest(repository: Path, guard: str, release: int, content: dict[str, Any]) -> Path:
    """Write the manifest with the SHA-256 of every file of the release. ``content`` holds everything else."""
    files = {path.relative_to(repository).as_posix(): digest(path) for path in release_files(repository, guard, release)}
    path = manifest_path(repository, guard, release)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"guard": guard, "release": release, **content, "files": files}, indent=2, allow_nan=False)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text + "\n")
    unfinished.replace(path)
    return path


def read_manifest(repository: Path, guard: str, release: int | None = None) -> dict[str, Any]:
    """The manifest of one release, or of the highest one.

    Raises:
        NoisecError: the guard or the release is not in the repository, or the file is damaged.
    """
    if release is None:
        release = max(releases(repository, guard))
    path = manifest_path(repository, guard, release)
    if not path.is_file():
        raise NoisecError(f"{path}: no such manifest; releases of {guard!r} here: {releases(repository, guard)}")
    try:
        content = json.loads(path.read_text())
        if content["guard"] == guard and content["release"] == release and isinstance(content["files"], dict):
            return dict(content)
    except (ValueError, TypeError, KeyError):
        pass
    raise NoisecError(f"{path}: damaged: not the manifest of release {release} of {guard!r}; build the guard again")


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


def verify(repository: Path, guard: str) -> list[str]:
    """Differences between a guard's folders and its manifests' digests, one sentence each; empty when there are none.

    Every file counts, in every release and beside them: whatever lies in a model's folder may be run by the server. The releases share
    their configurations, which are those of the newest.
    """
    numbers = releases(repository, guard)
    expected: dict[str, str] = {}
    for number in numbers:
        files: dict[str, str] = read_manifest(repository, guard, number)["files"]
        expected |= {name: found for name, found in files.items() if number == numbers[-1] or not name.endswith(f"/{CONFIG}")}
    own = {manifest_path(repository, guard, number) for number in numbers} | {repository / guard / CARD}
    present = {
        path.relative_to(repository).as_posix(): path
        for model in models(guard)
        for path in sorted((repository / model).rglob("*"))
        if (path.is_file() or path.is_symlink())  # a link to a folder, which is not looked into here, may hold code as well
        and path not in own
        and not path.relative_to(repository / model).parts[0].startswith(UNFINISHED)
    }
    problems = [f"{name}: missing" for name in expected if name not in present]
    problems += [f"{name}: not in a manifest" for name in present if name not in expected]
    problems += [
        f"{name}: changed since the build"
        for name, path in present.items()
        if name in expected and not (path.is_file() and digest(path) == expected[name])
    ]
    return problems


def verify_repository(repository: Path) -> list[str]:
    """The same for every guard of a repository, and folders that belong to no guard, which a server would load as well."""
    found = guards(repository)
    known = {model for guard in found for model in models(guard)}
    foreign = sorted(path.name for path in repository.iterdir() if path.is_dir() and path.name not in known)
    return [problem for guard in found for problem in verify(repository, guard)] + [f"{name}/: belongs to no guard" for name in foreign]
