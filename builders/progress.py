"""One look for every progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

T = TypeVar("T")
console = Console(stderr=True, markup=False, highlight=False)


@contextmanager
def bar(title: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A bar of ``total`` steps, ``done`` of them before; shown only on a terminal."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Bar(progress, progress.add_task(title, total=total, completed=done, note=""))


class Bar:
    def __init__(self, progress: Progress, task: object) -> None:
        self._progress = progress
        self._task = task

    def advance(self, note: str = "") -> None:
        self._progress.update(self._task, advance=1, note=note)  # type: ignore[arg-type]


def tracked(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """The items, with a bar that advances as they are taken."""
    with bar(title, total) as shown:
        for item in items:
            yield item
            shown.advance()
