"""What the check needs: a guard as it lies in its repository, and what was prepared for it on a CPU."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from noisec import manifest
from noisec.builders.images import Images, Splits
from noisec.builders.precision import STAGE
from noisec.builders.release import Release
from noisec.builders.spec import NETWORK_STAGES
from noisec.builders.stages import Infer, StageRunner
from noisec.errors import NoisecError

PREPARED = Path("build/gpu/prepared")
FACTS, ATTACKED = "prepared.json", "attacked"
LAYOUTS = ("fused", "staged")
"""that the check measures"""
SETS = ("fit", "calibrate", "report")


@dataclass(frozen=True)
class Prepared:
    """What the check needs besides the guard: images, attacked images, and graphs in lower precision."""

    splits: Splits
    """without training images"""
    attacked: Path
    """folder with ``<attack>.npz`` and their ``names.json``: report images, attacked"""
    graphs: dict[str, dict[str, Path]]
    """precision -> stage -> folder with ``model.onnx``"""
    skipped: dict[str, str]
    """precision -> why there is no graph"""

    @classmethod
    def load(cls, folder: Path, guard: Guard) -> Prepared:
        """What :meth:`save` wrote.

        Raises:
            NoisecError: nothing is there, or it was prepared for another guard.
        """
        if not (folder / FACTS).is_file():
            raise NoisecError(f"{folder}: nothing is prepared there; {_first(folder, guard)}")
        facts = json.loads((folder / FACTS).read_text())
        if facts["made_for"] != guard.digests:
            raise NoisecError(f"{folder}: prepared for other stages than the guard's; {_first(folder, guard)}")
        with np.load(folder / "images.npz", allow_pickle=False) as arrays:
            fit, calibrate, report = (Images.whole(arrays[name], arrays[f"{name}_labels"]) for name in SETS)
        splits = Splits(fit[:0], fit, calibrate, report, tuple(facts["class_names"]))
        graphs = {name: {str(stage): folder / name / stage for stage in NETWORK_STAGES} for name in facts["precisions"]}
        return cls(splits, folder / ATTACKED, graphs, facts["skipped"])

    def save(self, folder: Path, guard: Guard) -> None:
        """Write images and facts; attacked images and graphs lie in ``folder`` already."""
        sets = {name: getattr(self.splits, name) for name in SETS}
        labels = {f"{name}_labels": images.labels for name, images in sets.items()}
        np.savez_compressed(folder / "images.npz", **{name: images.pixels for name, images in sets.items()}, **labels)
        facts = {
            "made_for": guard.digests,
            "class_names": self.splits.class_names,
            "precisions": list(self.graphs),
            "skipped": self.skipped,
        }
        (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")


class Guard(Release):
    """A release, and how its stages are asked."""

    @property
    def digests(self) -> dict[str, str]:
        """stage -> SHA-256 of its graph"""
        return {stage: manifest.digest(folder / STAGE) for stage, folder in self.stages.items()}

    def runner(self, infer: Infer) -> StageRunner:
        """Asks the stages for what the served ensemble asks them for.

        Args:
            infer: (stage, float32 [n, C, H, W], output names) -> output name -> float32 [n, ...]
        """
        return StageRunner.of(self.spec, infer)

    @classmethod
    def measurable(cls, repository: Path, name: str) -> Guard:
        """The newest release of a guard.

        Raises:
            NoisecError: it is served as no ensemble of stages that take floats, which the check measures.
        """
        guard = cls.newest(repository, name)
        serving = guard.spec.serving
        if serving.input != "float32" or serving.layout not in LAYOUTS:
            options = ["--guard", name, "--layout", LAYOUTS[0], "--input", "float32", "--out", "measured"]
            command = shlex.join(["noisec", "arrange", str(repository), *options])
            raise NoisecError(
                f"{name} is served with input {serving.input} and layout {serving.layout}; the check measures stages that take float32 and "
                f"are served as an ensemble: {command}, and then the check on that folder"
            )
        return guard


def _first(folder: Path, guard: Guard) -> str:
    """What to run, and where what it prepares will lie."""
    options = [str(guard.repository), "--guard", guard.name, "--out", str(folder.parent), "--only-prepare"]
    command = shlex.join(["python", "-m", "noisec.benchmarks.gpu.pack", *options])
    return f"run this first: {command}; then the check with --prepared {shlex.quote(str(folder.parent / PREPARED.name))}"
