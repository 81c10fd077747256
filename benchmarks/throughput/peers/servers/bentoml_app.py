"""BentoML: a service class whose method is batchable."""

from __future__ import annotations

import bentoml
import numpy as np

from .compute import Task, columns

TASK = Task.read()
JOINED = {"batchable": True, "max_batch_size": TASK.batch, "max_latency_ms": 10_000} if TASK.batch > 1 else {}


@bentoml.service(workers=TASK.workers, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class GuardService:
    """``{"images": [base64, ...]}`` -> rows of ``ANSWERS``."""

    def __init__(self) -> None:
        self.guard = TASK.load()

    @bentoml.api(**JOINED)  # type: ignore[untyped-decorator]
    def judge(self, images: list[str]) -> np.ndarray:  # type: ignore[type-arg]
        return columns(self.guard(self.guard.decode(images)))
