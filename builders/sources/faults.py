"""Files and rows that cannot be used: counted, named, never silently dropped."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from noisec.builders.progress import console
from noisec.errors import NoisecError

NAMED = 5
"""names in one summary line"""


class Faults:
    """What is wrong with a data set, by reason."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._names.values()))

    def add(self, name: str, reason: str) -> None:
        """One file or row that is left out."""
        self._names.setdefault(reason, []).append(name if name.isprintable() else ascii(name))

    def add_rows(self, file: str, wrong: npt.NDArray[np.bool_], reason: str) -> None:
        """Every row of a file that ``wrong`` marks; bool [n]."""
        for row in np.flatnonzero(wrong):
            self.add(f"{file} row {row}", reason)

    def lines(self) -> list[str]:
        """One line for each reason: its count and the first few names."""
        return [_line(reason, names) for reason, names in self._names.items()]

    def finish(self, strict: bool) -> None:
        """Print the summary.

        Raises:
            NoisecError: ``strict``, and there is a fault.
        """
        if strict and self:
            raise NoisecError("\n".join([*self.lines(), "data: strict allows no fault; mend or remove what is named"]))
        for line in self.lines():
            console.print(line, style="yellow", soft_wrap=True)


def _line(reason: str, names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"data: {len(names)} left out, {reason}: {', '.join(names[:NAMED])}{more}"
