"""ONNX graphs from ONNX graphs: one graph of two, a part of one, what two have in common, and bytes instead of floats."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper, version_converter

from noisec import contract
from noisec.errors import NoisecError

REMEDY = "set layout = 'staged' and leave detectors with view 'amplified' or 'hardened' out"
"""what serves a classifier that cannot be joined"""
JOIN, PART = "join", "part"
"""nodes before and behind a classifier that looks at several inputs in one pass"""
FLOATS = f"{contract.IMAGE}/floats"
"""the image in [0, 1] in a graph that takes bytes"""
SMALL = 256
"""bytes; smaller tensors (shapes, axes) have to stay inside the graph"""
LARGEST_FILE = 2**31 - 1
"""bytes that a protobuf file may have; weights beyond lie beside it"""


def save_model(model: ModelProto, folder: Path) -> None:
    """Write ``model.onnx``, with its weights beside it where they are too large for one file."""
    save_graph(model, folder / "model.onnx", external=model.ByteSize() > LARGEST_FILE)


def save_graph(model: ModelProto, path: Path, *, external: bool) -> None:
    """Write a graph, and its weights, which then leave the model, into a file beside it or not. What an interrupted run left there goes."""
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    if external:  # tensor by tensor: for a whole model onnx refuses a name that the working directory happens to have
        for tensor in model.graph.initializer:
            if tensor.HasField("raw_data") and len(tensor.raw_data) >= SMALL:
                onnx.external_data_helper.set_external_data(tensor, data.name)
    onnx.save(model, path)


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
    first = _prefixed(first, "autoencoder/")
    second = onnx.compose.add_prefix(second, fed.removesuffix(contract.IMAGE))
    widths = {value.name: value.type.tensor_type.shape.dim[1].dim_value for value in second.graph.output}
    made = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", widths[node.input[0]]]) for node in after for name in node.output
    ]
    nodes = [*first.graph.node, before, *second.graph.node, *after]
    return _of_two(first, second, nodes, [*first.graph.output, *made], "autoencoder and classifier")


def _prefixed(model: ModelProto, prefix: str) -> ModelProto:
    """The model with new names inside; its inputs and outputs keep theirs."""
    options = {"rename_inputs": False, "rename_outputs": False, "rename_value_infos": False}  # shapes follow what they are of
    renamed: ModelProto = onnx.compose.add_prefix(model, prefix, **options)
    return renamed


def _of_two(first: ModelProto, second: ModelProto, nodes: Sequence[NodeProto], outputs: Sequence[ValueInfoProto], name: str) -> ModelProto:
    """A graph of two that have no name in common but their input's.

    Raises:
        NoisecError: it does not hold together.
    """
    weights = [*first.graph.initializer, *second.graph.initializer]
    opsets = {entry.domain: entry for entry in (*second.opset_import, *first.opset_import)}
    whole: ModelProto = helper.make_model(
        helper.make_graph(nodes, name, list(first.graph.input), outputs, weights),
        opset_imports=list(opsets.values()),
        ir_version=max(first.ir_version, second.ir_version),
        functions=[*first.functions, *second.functions],
        producer_name="noisec",
    )
    _check(whole)
    return whole


def apart(autoencoder: ModelProto, classifier: ModelProto) -> tuple[ModelProto, ModelProto]:
    """The same two stages with the passes of the classifier's copies on the classifier's side, which computes once what they have in common
    with its own.

    Args:
        autoencoder: a stage that makes passes of copies of the classifier

    Returns:
        the autoencoder stage without them, and a graph that answers the classifier stage's outputs and theirs
    """
    made = {contract.PASSES[one] for one in contract.COPIES}
    names = [value.name for value in autoencoder.graph.output]
    own, copies = _same_opset(classifier, only(autoencoder, [name for name in names if name in made]))
    own = _prefixed(own, "own/")
    outputs = [*own.graph.output, *copies.graph.output]
    both = _of_two(own, copies, [*own.graph.node, *copies.graph.node], outputs, "passes of the image")
    return only(autoencoder, [name for name in names if name not in made]), without_repeats(both)


def with_image_pass(fused: ModelProto) -> ModelProto:
    """A fused autoencoder stage whose one pass of the classifier takes the image as well, and gives its label.

    Args:
        fused: with the nodes `JOIN` and `PART`

    Returns:
        the stage with LOGITS and the image's penultimate activations among its outputs
    """
    result = ModelProto()
    result.CopyFrom(fused)
    graph, made = result.graph, {contract.LOGITS: contract.LOGITS, contract.PENULTIMATE: contract.PASSES["image"]}
    join, part = (next(node for node in graph.node if node.name == name) for name in (JOIN, PART))
    bytewise = any(FLOATS in node.output for node in graph.node)
    join.input.append(FLOATS if bytewise else contract.IMAGE)
    prefix, others = part.input[0].removesuffix(contract.PENULTIMATE), list(part.output)
    graph.node.remove(part)
    for output, name in made.items():
        rest = others if output == contract.PENULTIMATE else [f"{prefix}{output}/{other}" for other in others]
        graph.node.append(
            helper.make_node("Split", [f"{prefix}{output}"], [*rest, name], f"{PART}/{name}", axis=0, num_outputs=len(others) + 1)
        )
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", None]))
    _check(result)
    return result


def beside(autoencoder: ModelProto, image: ModelProto) -> ModelProto:
    """Two graphs of IMAGE as one, with the outputs of both.

    Args:
        image: answers LOGITS and PENULTIMATE, which gets the scorer's name for it, too, and maybe passes of the classifier's copies

    Raises:
        NoisecError: they do not hold together.
    """
    first, second = _same_opset(autoencoder, image)
    second = _prefixed(second, "image/")
    own = contract.PASSES["image"]
    renamed = helper.make_node("Identity", [contract.PENULTIMATE], [own], own)
    outputs = [*first.graph.output, *second.graph.output]
    entry = ValueInfoProto()
    entry.CopyFrom(next(value for value in outputs if value.name == contract.PENULTIMATE))
    entry.name = own
    return _of_two(first, second, [*first.graph.node, *second.graph.node, renamed], [*outputs, entry], "passes")


def with_scorer(passes: ModelProto, scorer: ModelProto, outputs: Sequence[str]) -> ModelProto:
    """A graph that makes everything the scorer reads, with the scorer's behind it.

    Args:
        scorer: its inputs are outputs of ``passes``
        outputs: of either, that are wanted
    """
    first, second = _same_opset(passes, scorer)
    second = _prefixed(second, "scorer/")
    nodes = [*first.graph.node, *second.graph.node]
    return only(_of_two(first, second, nodes, [*first.graph.output, *second.graph.output], "guard"), outputs)


def only(model: ModelProto, outputs: Sequence[str]) -> ModelProto:
    """As much of a graph as makes these of its outputs."""
    inputs = [value.name for value in model.graph.input]
    return onnx.utils.Extractor(model).extract_model(inputs, list(outputs))


def without_repeats(model: ModelProto) -> ModelProto:
    """The same graph with every weight kept once, and what several nodes make of the same inputs computed once.

    Args:
        model: without branches and loops, whose insides would go on reading names that are gone
    """
    outputs = {value.name for value in model.graph.output}
    stands_for: dict[str, str] = {}
    """a name that is gone -> the one that holds the same"""
    found: dict[str, Sequence[str]] = {}

    def new(what: object, names: Sequence[str]) -> bool:
        """Whether nothing before said the same; where it did, its names stand for these."""
        before = found.setdefault(repr((what, len(names))), names)
        if before is names or outputs.intersection(names):
            return True
        stands_for.update(zip(names, before, strict=True))
        return False

    result = ModelProto()
    result.CopyFrom(model)
    for part in (result.graph.node, result.graph.initializer, result.graph.value_info):
        del part[:]
    for tensor in model.graph.initializer:
        content = hashlib.sha256(numpy_helper.to_array(tensor).tobytes()).hexdigest()
        if new((tensor.data_type, tensor.dims, content), [tensor.name]):
            result.graph.initializer.append(tensor)
    for node in model.graph.node:
        inputs = [stands_for.get(name, name) for name in node.input]
        if node.op_type == "Identity" and not outputs.intersection(node.output):
            stands_for[node.output[0]] = inputs[0]
            continue
        settings = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
        if new((node.domain, node.op_type, inputs, settings), list(node.output)):
            result.graph.node.append(node)
            result.graph.node[-1].input[:] = inputs
    return result


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
    graph = model.graph
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == contract.IMAGE:
                node.input[index] = FLOATS
    image = next(value for value in graph.input if value.name == contract.IMAGE)
    image.type.tensor_type.elem_type = TensorProto.UINT8
    scale = helper.make_tensor("bytes/255", TensorProto.FLOAT, [], [255.0])
    cast = helper.make_node("Cast", [contract.IMAGE], ["bytes/cast"], "bytes/cast", to=TensorProto.FLOAT)
    divide = helper.make_node("Div", ["bytes/cast", "bytes/255"], [FLOATS], "bytes/divide")
    nodes = [cast, divide, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(scale)
    return model


def take_floats(model: ModelProto) -> ModelProto:
    """The graph that :func:`take_bytes` was given, again."""
    graph = model.graph
    image = next(value for value in graph.input if value.name == contract.IMAGE)
    image.type.tensor_type.elem_type = TensorProto.FLOAT
    scale = next(index for index, one in enumerate(graph.initializer) if one.name == "bytes/255")
    del graph.initializer[scale]
    nodes = [node for node in graph.node if node.name not in ("bytes/cast", "bytes/divide")]
    del graph.node[:]
    graph.node.extend(nodes)
    for node in graph.node:
        node.input[:] = [contract.IMAGE if name == FLOATS else name for name in node.input]
    return model
