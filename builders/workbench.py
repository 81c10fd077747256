"""Build steps that are done once: a step whose inputs have not changed is taken from the last run."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import noisec
from noisec.builders.progress import console

DONE = "step.json"
FORMAT = 2
"""raised when a step makes something else of the same inputs"""


def seconds_of(folder: Path) -> float:
    """How long a finished step took."""
    return float(json.loads((folder / DONE).read_text())["seconds"])


class Workbench:
    """A folder of finished steps.

    Args:
        folder: kept between runs; removing it forgets every step
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def step(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The folder that ``make`` filled for these inputs, now or in an earlier run. Where another process is at it, it is waited for.

        Args:
            inputs: everything that the result depends on, as JSON; the folder of an earlier step stands for that step's own inputs
            make: fills the folder it is given; interrupted, it finds there what it had left, and nothing takes that for finished
        """
        text = json.dumps({"step": name, "noisec": noisec.__version__, "format": FORMAT, **inputs}, sort_keys=True, default=str)
        target = self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if not (target / DONE).is_file():
            with self._alone(name, target):
                if not (target / DONE).is_file():  # nor has whoever was waited for made it
                    self._make(name, target, json.loads(text), make)
                    return target
        console.print(f"  {name}: unchanged, reused ({seconds_of(target):.0f} s saved)")
        return target

    def _make(self, name: str, target: Path, inputs: Any, make: Callable[[Path], None]) -> None:
        unfinished = target.with_name(f"{target.name}.unfinished")
        unfinished.mkdir(exist_ok=True)
        start = time.monotonic()
        make(unfinished)
        seconds = time.monotonic() - start
        (unfinished / DONE).write_text(json.dumps({"inputs": inputs, "seconds": seconds}, indent=2))
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
        console.print(f"  {name}: done in {seconds:.0f} s")

    @contextmanager
    def _alone(self, name: str, target: Path) -> Iterator[None]:
        """No other process makes the same step meanwhile; the lock of one that has ended is free."""
        lock = FileLock(target.with_name(f".{target.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            console.print(f"  {name}: another process is at it; waiting")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
