"""A guard's newest release, as it lies in a model repository."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from noisec import manifest
from noisec.builders.spec import NETWORK_STAGES, GuardSpec, spec_of
from noisec.contract import stage_model
from noisec.errors import NoisecError
from noisec.python_backend.scorer.scoring import Scorer

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Release:
    """Where its files are, and what they were built from."""

    repository: Path
    name: str
    """the guard's"""
    release: int
    spec: GuardSpec

    @classmethod
    def newest(cls, repository: Path, name: str) -> Self:
        """Read it.

        Raises:
            NoisecError: the repository does not hold the guard as it was built, or its manifest is of another version.
        """
        problems = manifest.verify(repository, name)
        if problems:  # what is made of it would be taken for genuine
            raise NoisecError("\n".join([f"{repository}: {name} is not as it was built; build it again", *problems[:20]]))
        content = manifest.read_manifest(repository, name)
        return cls(repository, name, content["release"], spec_of(content))

    def folder(self, stage: str) -> Path:
        """A stage's folder: ``model.onnx`` of a network stage, ``scorer.npz`` of the scorer."""
        return self.repository / stage_model(self.name, stage) / str(self.release)

    @property
    def own_folder(self) -> Path:
        """The guard's own: empty where it is an ensemble."""
        return self.repository / self.name / str(self.release)

    @property
    def stages(self) -> dict[str, Path]:
        """Network stage -> its folder."""
        return {stage: self.folder(stage) for stage in NETWORK_STAGES}

    @cached_property
    def scorer(self) -> Scorer:
        """The release's own."""
        return Scorer.load(self.folder("scorer") / "scorer.npz")
