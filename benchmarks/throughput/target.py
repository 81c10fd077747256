"""The guard that is measured: its newest release in a repository, and real images for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from noisec import contract
from noisec.builders.datasets import SOURCES
from noisec.builders.release import Release
from noisec.builders.repository import read_config
from noisec.builders.sources.faults import Faults
from noisec.clients.requests import Pixels
from noisec.contract import stage_model

CORES = len(os.sched_getaffinity(0))
"""processors that this process may use"""
IMAGES = 512
"""different images that the load is made of"""
SHIPPED = {"fashion-mnist": "fashion-mnist-test"}
"""sources part of which ships with the package -> that part"""


class Target(Release):
    """A release, and images for it."""

    @property
    def classifier(self) -> str:
        """Triton model name of the bare classifier."""
        return stage_model(self.name, "classifier")

    def asked(self, outputs: Sequence[str]) -> str:
        """Triton model that clients ask for these outputs."""
        apart = read_config(self.repository / self.name).parameters if tuple(outputs) == (contract.LOGITS,) else {}
        return apart[contract.LABEL_MODEL].string_value if contract.LABEL_MODEL in apart else self.name

    @property
    def largest(self) -> int:
        """Rows of the largest batch that its server takes."""
        return self.spec.serving.max_batch_size

    def images(self, cache: Path, count: int = IMAGES) -> Pixels:
        """Held-out images of the guard's own data, [count, C, H, W], as it takes them: float32 in [0, 1], or uint8.

        Fashion-MNIST's test images ship with the package, so its training images are not needed.

        Args:
            cache: folder for decoded images

        Raises:
            NoisecError: the data is not there.
        """
        data = self.spec.data
        pools = SOURCES[SHIPPED.get(data.source, data.source)](data, cache, Faults())
        pool = (pools.learn if pools.held_out is None else pools.held_out)[:count]
        return pool.pixels if self.spec.serving.input == "uint8" else pool.floats()
