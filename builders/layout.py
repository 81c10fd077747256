"""Graphs of other layouts and inputs: the same arithmetic in fewer stages, and bytes instead of floats."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, version_converter

from noisec import contract, manifest
from noisec.builders.classifier import read_model
from noisec.builders.release import Release
from noisec.builders.repository import fused_passes, read_plans, read_widths, write_repository
from noisec.builders.spec import NETWORK_STAGES, GuardSpec, ServingSpec, Stage, changed
from noisec.builders.stages import in_process
from noisec.errors import NoisecError

MAX_DIFFERENCE = 1e-3
"""largest difference of a fused graph's activations from the two graphs' that still counts as rounding, relative to their scale"""
COMPARED = 4
"""rows on which they are compared"""
REMEDY = "set layout = 'staged' and leave detectors with view = 'amplified' out"
"""what serves a classifier that cannot be joined"""
LARGEST_FILE = 2**31 - 1
"""bytes that a protobuf file may have; weights beyond lie beside it"""


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


def save_model(model: ModelProto, folder: Path) -> None:
    """Write ``model.onnx``, with its weights beside it where they are too large for one file."""
    large = model.ByteSize() > LARGEST_FILE
    onnx.save(model, folder / "model.onnx", save_as_external_data=large, location="model.onnx.data" if large else None)


def fuse(autoencoder: ModelProto, classifier: ModelProto, spec: GuardSpec) -> ModelProto:
    """The autoencoder stage with the classifier behind it: one pass over the noise and the reconstruction, one below the other.

    The outputs are the autoencoder stage's own and the penultimate activations of :func:`noisec.builders.repository.fused_passes`.
    """
    passes = fused_passes(spec)
    sources = {"noise": spec.noise_source, "reconstruction": contract.RECONSTRUCTION}
    names = [contract.PASSES[one] for one in passes]
    join = helper.make_node("Concat", [sources[one] for one in passes], [f"classifier/{contract.IMAGE}"], "join", axis=0)
    part = helper.make_node("Split", [f"classifier/{contract.PENULTIMATE}"], names, "part", axis=0, num_outputs=len(names))
    return joined(autoencoder, classifier, join, [part])


def joined(autoencoder: ModelProto, classifier: ModelProto, before: NodeProto, after: Sequence[NodeProto]) -> ModelProto:
    """The autoencoder stage with a classifier in it.

    Args:
        before: makes the classifier's input, ``PREFIX/IMAGE``, of what the stage has; the prefix is that of all the classifier's names
        after: each makes classifier passes of one of its outputs, such as ``PREFIX/PENULTIMATE``

    Raises:
        NoisecError: they cannot be joined.
    """
    (fed,) = before.output
    first, second = _same_opset(autoencoder, classifier)
    first = onnx.compose.add_prefix(first, "autoencoder/", rename_inputs=False, rename_outputs=False)
    second = onnx.compose.add_prefix(second, fed.removesuffix(contract.IMAGE))
    widths = {value.name: value.type.tensor_type.shape.dim[1].dim_value for value in second.graph.output}
    made = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", widths[node.input[0]]]) for node in after for name in node.output
    ]
    graph = helper.make_graph(
        [*first.graph.node, before, *second.graph.node, *after],
        "autoencoder and classifier",
        list(first.graph.input),
        [*first.graph.output, *made],
        [*first.graph.initializer, *second.graph.initializer],
    )
    opsets = {entry.domain: entry for entry in (*second.opset_import, *first.opset_import)}
    whole: ModelProto = helper.make_model(
        graph,
        opset_imports=list(opsets.values()),
        ir_version=max(first.ir_version, second.ir_version),
        functions=[*first.functions, *second.functions],
        producer_name="noisec",
    )
    _check(whole)
    return whole


def _check(whole: ModelProto) -> None:
    """Refuse what does not hold together: names that only a branch or a loop reads are not prefixed. The checker reads nothing larger than
    one file."""
    if whole.ByteSize() > LARGEST_FILE:
        return
    try:
        onnx.checker.check_model(whole)
    except onnx.checker.ValidationError as error:
        raise NoisecError(f"the classifier cannot be joined with the autoencoder; {REMEDY}: {error}") from error


def _same_opset(*models: ModelProto) -> list[ModelProto]:
    """The models in the highest of their opsets, at least 18.

    Raises:
        NoisecError: one cannot be converted.
    """
    opsets = [next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")) for model in models]
    highest = max(18, *opsets)
    try:
        return [
            model if opset == highest else version_converter.convert_version(model, highest)
            for model, opset in zip(models, opsets, strict=True)
        ]
    except Exception as error:  # the converter raises whatever its C++ throws
        raise NoisecError(f"to be joined, both graphs need opset {highest}; converting failed; {REMEDY}: {error}") from error


def take_bytes(model: ModelProto) -> ModelProto:
    """The same graph with IMAGE uint8 in [0, 255]: cast and divided by 255 as a client of floats does, to the last bit."""
    graph, floats = model.graph, f"{contract.IMAGE}/floats"
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == contract.IMAGE:
                node.input[index] = floats
    image = next(value for value in graph.input if value.name == contract.IMAGE)
    image.type.tensor_type.elem_type = TensorProto.UINT8
    scale = helper.make_tensor("bytes/255", TensorProto.FLOAT, [], [255.0])
    cast = helper.make_node("Cast", [contract.IMAGE], ["bytes/cast"], "bytes/cast", to=TensorProto.FLOAT)
    divide = helper.make_node("Div", ["bytes/cast", "bytes/255"], [floats], "bytes/divide")
    nodes = [cast, divide, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(scale)
    return model


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
        NoisecError: the release is not there, or its graphs are of another layout or input already and cannot go back.
    """
    old, former = manifest.read_manifest(repository, guard), Release.newest(repository, guard)
    spec, release, new = former.spec, former.release, changed(former.spec, serving=serving)
    other = (fused_passes(new), serving.input) != (fused_passes(spec), spec.serving.input)
    changes = [key for key in ("layout", "input") if getattr(serving, key) != getattr(spec.serving, key)]
    if other and (spec.serving.layout, spec.serving.input) != ("staged", "float32"):
        raise NoisecError(f"{guard} release {release} is {spec.serving.layout} with {spec.serving.input} input: start from its staged twin")
    if changes and spec.runtime != "onnxruntime":
        raise NoisecError(f"{guard} release {release} holds TensorRT plans: set serving.{changes[0]} in the TOML file and build it again")
    widths, names = read_widths(repository, guard)
    with tempfile.TemporaryDirectory() as folder:
        kept: dict[Stage, Path] = {stage: shutil.copytree(former.folder(stage), Path(folder, stage)) for stage in NETWORK_STAGES}
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
