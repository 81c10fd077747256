"""A whole guard in one process of Triton's Python backend: the ``single`` layout.

What the ensemble of the ``fused`` layout does in three models with a message between each two, in one: for machines where those messages
cost as much as the networks, as small networks on few cores do.
"""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .batching import Arrays, answer
from .guard import Guard

LABEL = {"LOGITS"}
QUIET, SURELY_QUIET = 0.0005, 0.0025
"""seconds without a request after which another core is likely free: for passes side by side, which take no more processor time than one
after the other, and for two threads on one pass, which do"""


class TritonPythonModel:
    """IMAGE in; LOGITS, SCORE, P_VALUE, IS_MALICIOUS and RELEASE out."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"], args["model_version"])
        self.guard = Guard(folder, int(args["model_version"]), hurries=len(os.sched_getaffinity(0)) > 1)
        self.quiet = QUIET if self.guard.passes_apart else SURELY_QUIET
        self.last = -math.inf
        """when the last requests were answered"""

    def compute(self, arrays: Arrays, wanted: Sequence[str]) -> Arrays:
        """IMAGE [n, C, H, W] -> [n, ...] for each output; the classifier alone where only the label is wanted."""
        images = arrays["IMAGE"]
        if LABEL.issuperset(wanted):
            return self.guard.label(images)
        return self.guard.verdict(images, hurry=len(images) == 1 and time.monotonic() - self.last > self.quiet)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Requests for the label alone are answered apart, so that they cost no more beside others."""
        kinds = defaultdict(list)
        for place, request in enumerate(requests):
            kinds[LABEL.issuperset(request.requested_output_names())].append(place)
        answers: dict[int, Any] = {}
        for places in kinds.values():
            answers.update(zip(places, answer([requests[place] for place in places], ["IMAGE"], self.compute), strict=True))
        self.last = time.monotonic()
        return [answers[place] for place in range(len(requests))]
