"""What a guard answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Verdicts:
    """One answer for each of ``n`` images, in their order."""

    labels: npt.NDArray[np.int64]
    """int64 [n], the predicted class"""
    logits: npt.NDArray[np.float32]
    """float32 [n, classes]"""
    scores: npt.NDArray[np.float32] | None
    """float32 [n] in nats, higher is more suspicious, the largest number where the input was no image; None where only labels were asked
    for"""
    p_values: npt.NDArray[np.float32] | None
    """float32 [n], conformal p-values in (0, 1]"""
    is_malicious: npt.NDArray[np.bool_] | None
    """bool [n]"""
    releases: npt.NDArray[np.int32] | None
    """int32 [n], the guard's release that gave each verdict"""

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def join(cls, parts: Sequence[Verdicts]) -> Verdicts:
        """Several answers as one, in order."""
        if len(parts) == 1:
            return parts[0]
        columns = {name: [getattr(part, name) for part in parts] for name in cls.__dataclass_fields__}
        joined: dict[str, Any] = {name: None if column[0] is None else np.concatenate(column) for name, column in columns.items()}
        return cls(**joined)
