"""A guard in other layouts and with other inputs: the same arithmetic in fewer stages, and bytes instead of floats."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from onnx import ModelProto, helper

from noisec import contract, manifest
from noisec.builders.classifier import read_model
from noisec.builders.graphs import JOIN, PART, joined, only, save_model, take_bytes, take_floats
from noisec.builders.passes import fused_passes
from noisec.builders.release import Release
from noisec.builders.repository import read_plans, read_widths, write_repository
from noisec.builders.spec import NETWORK_STAGES, GuardSpec, ServingSpec, Stage, changed
from noisec.builders.stages import in_process
from noisec.errors import NoisecError

MAX_DIFFERENCE = 1e-3
"""largest difference of a fused graph's activations from the two graphs' that still counts as rounding, relative to their scale"""
COMPARED = 4
"""rows on which they are compared"""


def changed_stages(spec: GuardSpec) -> tuple[Stage, ...]:
    """Network stages whose graphs in the specification's layout, with its input, are not the plain ones."""
    if spec.serving.input == "uint8":
        return ("autoencoder", "classifier")
    return ("autoencoder",) if fused_passes(spec) else ()


def arrange(spec: GuardSpec, plain: Mapping[Stage, Path], stage: Stage, folder: Path) -> None:
    """Write one stage's graph in the specification's layout, with its kind of input.

    Args:
        plain: ``autoencoder`` and ``classifier`` -> folder with ``model.onnx``, staged and with float input
        folder: gets ``model.onnx``

    Raises:
        NoisecError: the graphs cannot be joined, or compute something else together.
    """
    graph = read_model(plain[stage] / "model.onnx")
    if stage == "autoencoder" and fused_passes(spec):
        graph = fuse(graph, read_model(plain["classifier"] / "model.onnx"), spec)
    if spec.serving.input == "uint8":
        graph = take_bytes(graph)
    save_model(graph, folder)
    if stage == "autoencoder" and fused_passes(spec):
        _compare(spec, plain, folder)


def fuse(autoencoder: ModelProto, classifier: ModelProto, spec: GuardSpec) -> ModelProto:
    """The autoencoder stage with the classifier behind it: one pass over the noise and the reconstruction, one below the other.

    The outputs are the autoencoder stage's own and the penultimate activations of :func:`noisec.builders.passes.fused_passes`.
    """
    passes = fused_passes(spec)
    sources = {"noise": spec.noise_source, "reconstruction": contract.RECONSTRUCTION}
    names = [contract.PASSES[one] for one in passes]
    join = helper.make_node("Concat", [sources[one] for one in passes], [f"classifier/{contract.IMAGE}"], JOIN, axis=0)
    part = helper.make_node("Split", [f"classifier/{contract.PENULTIMATE}"], names, PART, axis=0, num_outputs=len(names))
    return joined(autoencoder, classifier, join, [part])


def unarranged(spec: GuardSpec, stage: Stage, folder: Path) -> ModelProto:
    """A stage's graph before it was arranged: staged, with float input.

    Args:
        folder: with ``model.onnx`` in the specification's layout, with its kind of input
    """
    graph = read_model(folder / "model.onnx")
    if spec.serving.input == "uint8":
        graph = take_floats(graph)
    joined_in = {contract.PASSES[one] for one in fused_passes(spec)} if stage == "autoencoder" else set()
    return only(graph, [output.name for output in graph.graph.output if output.name not in joined_in])


def _compare(spec: GuardSpec, plain: Mapping[Stage, Path], fused: Path) -> None:
    """Run random pixels through the fused stage and the plain ones.

    Raises:
        NoisecError: the activations differ by more than rounding: the classifier mixes the rows of a batch.
    """
    apart, together = in_process({str(stage): path for stage, path in plain.items()}, 1), in_process({"autoencoder": fused}, 1)
    shape = [entry.dim_value for entry in read_model(plain["autoencoder"] / "model.onnx").graph.input[0].type.tensor_type.shape.dim[1:]]
    pixels = np.random.default_rng(0).integers(0, 256, (COMPARED, *shape)).astype(np.float32) / np.float32(255)
    sources = {"noise": spec.noise_source, "reconstruction": contract.RECONSTRUCTION}
    made = apart("autoencoder", pixels, list(sources.values()))
    found = together("autoencoder", pixels, [contract.PASSES[one] for one in fused_passes(spec)])
    for one in fused_passes(spec):
        wanted = apart("classifier", made[sources[one]], [contract.PENULTIMATE])[contract.PENULTIMATE]
        difference, scale = np.abs(found[contract.PASSES[one]] - wanted).max(), max(1.0, float(np.abs(wanted).max()))
        if not difference <= MAX_DIFFERENCE * scale:
            raise NoisecError(
                f"layout = {spec.serving.layout!r}: activations of the {one} differ by {difference:.2e} from the staged ones, at most "
                f"{MAX_DIFFERENCE * scale:.2e} is rounding: the classifier mixes the rows of a batch; serve it staged"
            )


def rearrange(repository: Path, guard: str, serving: ServingSpec, target: Path) -> None:
    """Write a guard's newest release with another serving section; the verdicts, and so its figures and number, stay.

    Args:
        target: model repository, the same or another

    Raises:
        NoisecError: the release is not there, or holds plans, which stay as they are.
    """
    old, former = manifest.read_manifest(repository, guard), Release.newest(repository, guard)
    spec, release, new = former.spec, former.release, changed(former.spec, serving=serving)
    other = (fused_passes(new), serving.input) != (fused_passes(spec), spec.serving.input)
    changes = [key for key in ("layout", "input") if getattr(serving, key) != getattr(spec.serving, key)]
    if changes and spec.runtime != "onnxruntime":
        raise NoisecError(f"{guard} release {release} holds TensorRT plans: set serving.{changes[0]} in the TOML file and build it again")
    widths, names = read_widths(repository, guard)
    with tempfile.TemporaryDirectory() as folder:
        kept: dict[Stage, Path] = {stage: shutil.copytree(former.folder(stage), Path(folder, stage)) for stage in NETWORK_STAGES}
        for stage in changed_stages(spec) if other else ():
            graph, kept[stage] = unarranged(spec, stage, kept[stage]), Path(folder, f"plain-{stage}")
            kept[stage].mkdir()
            save_model(graph, kept[stage])
        stages = {str(stage): path for stage, path in kept.items()}
        for stage in changed_stages(new) if other else ():
            stages[stage] = Path(folder, f"new-{stage}")
            stages[stage].mkdir()
            arrange(new, kept, stage, stages[stage])
        write_repository(target, new, widths, names, stages, former.scorer, read_plans(repository, guard))
    card = repository / guard / manifest.CARD
    if target != repository and card.is_file():
        shutil.copyfile(card, target / guard / manifest.CARD)
    content = {key: value for key, value in old.items() if key not in ("guard", "release", "files", "spec")}
    manifest.write_manifest(target, guard, release, {**content, "spec": json.loads(new.model_dump_json())})
