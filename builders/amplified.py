"""Amplified passes: a second look at the image by a classifier whose last layers speak too loud (IBD-PSC, Hou et al., ICML 2024,
arXiv 2405.09786, section 4).

With its last layers' outputs multiplied, a classifier gets clean images wrong, or grows unsure of them; what a trigger says survives. The
paper asks five such classifiers, amplified ever deeper, how sure they are; the logits of two that are far enough apart tell more, and those
two have their first layers in common. They are a part of the autoencoder stage, whatever other passes a guard makes; a guard in one process
makes them with the image's own pass (:func:`noisec.builders.graphs.apart`).
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper

from noisec import contract
from noisec.builders.classifier import read_model
from noisec.builders.copies import with_copies
from noisec.builders.graphs import save_model
from noisec.builders.images import Images
from noisec.builders.progress import console
from noisec.errors import NoisecError
from noisec.python_backend.scorer.session import open_session

AMPLIFICATION, FAILING = 1.5, 0.6
"""the paper's factor, and its clean error rate from which on a classifier has been amplified deep enough"""
DEEPER = 5
"""layers by which the second classifier is amplified further: one beyond the last of the paper's five"""
SAMPLE = 500
"""clean images that choose the depths"""
DEPTHS = "amplified.json"


def amplifiable(model: ModelProto) -> list[str]:
    """Outputs of the layers that can be amplified, from the first to the last that PENULTIMATE is made of: of each batch norm, and of each
    convolution without one."""
    before = {output.name for output in model.graph.output if output.name.endswith(contract.PENULTIMATE)}
    for node in reversed(model.graph.node):
        if before & set(node.output):
            before |= set(node.input)
    normalised = {node.input[0] for node in model.graph.node if node.op_type == "BatchNormalization"}
    return [
        node.output[0]
        for node in model.graph.node
        if node.output[0] in before
        and (node.op_type == "BatchNormalization" or (node.op_type == "Conv" and node.output[0] not in normalised))
    ]


def amplified(model: ModelProto, depths: Collection[int]) -> ModelProto:
    """Copies of a classifier stage in one graph, in which the last layers' outputs are `AMPLIFICATION` times as large.

    Args:
        depths: of each copy, how many layers: from 1 to all of them

    Returns:
        a graph that answers ``DEPTH/LOGITS`` and ``DEPTH/PENULTIMATE`` for each depth, and computes once what the copies have in common

    Raises:
        NoisecError: the classifier has branches or loops, whose insides are no layers.
    """
    if any(attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for node in model.graph.node for attribute in node.attribute):
        raise NoisecError("a classifier with branches or loops cannot be amplified: leave the detector of view 'amplified' out")
    layers = amplifiable(model)
    kinds = {value.name: value.type.tensor_type.elem_type for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    renamed: dict[int, dict[str, str]] = {depth: {} for depth in depths}  # of what differs from the classifier: its name in the copy
    result = ModelProto()
    result.CopyFrom(model)
    for part in (result.graph.node, result.graph.output, result.graph.value_info):
        del part[:]
    for node in model.graph.node:
        common = False
        for depth, names in renamed.items():
            name = node.output[0]
            loud, apart = name in layers[-depth:], bool(names.keys() & set(node.input))
            if apart:
                result.graph.node.append(_renamed(node, depth, names, loud))
            elif not common:
                result.graph.node.append(node)
                common = True
            if loud:
                quiet, factor, names[name] = f"{depth}/{name}/quiet" if apart else name, f"{depth}/{name}/factor", f"{depth}/{name}"
                result.graph.node.append(helper.make_node("Mul", [quiet, factor], [names[name]], f"{depth}/{name}/amplify"))
                result.graph.initializer.append(helper.make_tensor(factor, kinds.get(name, TensorProto.FLOAT), [], [AMPLIFICATION]))
    for names in renamed.values():
        for value in model.graph.output:
            result.graph.output.append(value)
            result.graph.output[-1].name = names[value.name]
    return result


def _renamed(node: NodeProto, depth: int, names: dict[str, str], loud: bool) -> NodeProto:
    """A copy's own node; its outputs' names there are added to ``names``. What amplifies a loud one comes after it."""
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.name = f"{depth}/{node.name}"
    copy.input[:] = [names.get(name, name) for name in node.input]
    names |= {name: f"{depth}/{name}" for name in node.output if name}  # an optional output that is left out has no name
    copy.output[:] = [names.get(name, name) for name in node.output]
    if loud:
        copy.output[0] += "/quiet"
    return copy


def chosen_depths(classifier: ModelProto, images: Images) -> tuple[int, int]:
    """How many of a classifier stage's last layers to amplify: the fewest with which it gets clean images wrong, and `DEEPER` more; at most
    all of them.

    Args:
        images: clean and labelled, the classifier was not trained on

    Raises:
        NoisecError: clean images bear all of them, what survives that tells nothing; or the classifier cannot be amplified.
    """
    sample, layers = images[:SAMPLE], len(amplifiable(classifier))
    rates = [0.0]
    for depth in range(1, layers + 1):
        session = open_session(amplified(classifier, [depth]).SerializeToString())
        answers = [session.run([f"{depth}/{contract.LOGITS}"], {contract.IMAGE: batch.floats()})[0] for batch in sample.batches()]
        rates.append(float(np.mean(np.concatenate(answers).argmax(axis=1) != sample.labels)))
        if rates[-1] > FAILING:
            return depth, min(depth + DEEPER, layers)
    raise NoisecError(
        f"however many of the classifier's {layers} convolutions and batch norms are amplified, at most {100 * max(rates):.0f} % of clean "
        f"images get a wrong label; {100 * FAILING:.0f} % have to, for triggers to stand out: leave the detector of view 'amplified' out"
    )


def amplify(classifier: Path, images: Images, folder: Path) -> None:
    """Write a classifier stage's amplified copies, and how many of its layers that are.

    Args:
        classifier: folder with ``model.onnx``, with float input
        images: clean and labelled; they choose how much is amplified
        folder: gets ``model.onnx`` and ``amplified.json``

    Raises:
        NoisecError: the classifier has no layers to amplify, or clean images bear it.
    """
    own = read_model(classifier / "model.onnx")
    depths, layers = chosen_depths(own, images), len(amplifiable(own))
    console.print(f"  amplified passes: the last {depths[0]} and {depths[1]} of {layers} layers")
    (folder / DEPTHS).write_text(json.dumps({"amplified": depths, "layers": layers}))
    save_model(amplified(own, depths), folder)


def with_amplified_passes(autoencoder: Path, loud: Path, folder: Path) -> None:
    """Write the autoencoder stage with the amplified classifiers in it, which answers their passes' penultimate activations.

    Args:
        autoencoder: folder with ``model.onnx``, staged and with float input
        loud: folder of :func:`amplify`
        folder: gets ``model.onnx``, and what else lies beside the two graphs

    Raises:
        NoisecError: the graphs cannot be joined.
    """
    depths = json.loads((loud / DEPTHS).read_text())["amplified"]
    passes = {one: f"{depth}/{contract.PENULTIMATE}" for one, depth in zip(contract.AMPLIFIED, depths, strict=True)}
    with_copies(autoencoder, loud, passes, folder)
