"""The guard that is measured: its newest release in a repository, and real images for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from noisec import contract, manifest
from noisec.builders.datasets import SOURCES
from noisec.builders.images import Floats
from noisec.builders.repository import passes_needed
from noisec.builders.sources.faults import Faults
from noisec.builders.spec import GuardSpec
from noisec.contract import stage_model

IMAGES = 512
"""different images that the load is made of"""


@dataclass(frozen=True)
class Target:
    """A guard's newest release: where its files are, and which passes it makes of them."""

    repository: Path
    guard: str
    release: int
    stages: dict[str, Path]
    """network stage -> folder with its ``model.onnx``"""
    passes: tuple[contract.Pass, ...]
    noise_source: str
    largest: int
    """rows of the largest batch that its server takes"""

    @classmethod
    def open(cls, repository: Path, guard: str) -> Target:
        """Read a guard.

        Raises:
            NoisecError: the repository does not hold it.
        """
        content = manifest.read_manifest(repository, guard)
        spec, release = GuardSpec.model_validate(content["spec"]), content["release"]
        folders = {stage: repository / stage_model(guard, stage) / str(release) for stage in ("autoencoder", "classifier")}
        return cls(repository, guard, release, folders, passes_needed(spec), spec.noise_source, spec.serving.max_batch_size)

    @property
    def classifier(self) -> str:
        """Triton model name of the bare classifier."""
        return stage_model(self.guard, "classifier")

    @property
    def scorer(self) -> Path:
        """The scorer's artefact."""
        return self.repository / stage_model(self.guard, "scorer") / str(self.release) / "scorer.npz"

    def images(self, cache: Path, count: int = IMAGES) -> Floats:
        """Held-out images of the guard's own data, float32 [count, C, H, W]; Fashion-MNIST's test images ship with the package.

        Args:
            cache: folder for decoded images

        Raises:
            NoisecError: the data is not there.
        """
        spec = GuardSpec.model_validate(manifest.read_manifest(self.repository, self.guard)["spec"]).data
        pools = SOURCES[SHIPPED.get(spec.source, spec.source)](spec, cache, Faults())
        pool = pools.learn if pools.held_out is None else pools.held_out
        return pool[:count].floats()


SHIPPED = {"fashion-mnist": "fashion-mnist-test"}
"""sources part of which ships with the package -> that part"""
