"""The amplified pass: a second look at the image by a classifier whose last layers speak too loud (IBD-PSC, Hou et al., ICML 2024,
arXiv 2405.09786, section 4).

With its last layers' outputs multiplied, a classifier gets clean images wrong, or grows unsure of them; what a trigger says survives. The
paper asks five such classifiers, amplified ever deeper; one alone, a little deeper than where clean images begin to fail, tells nearly as
much. It is a part of the autoencoder stage, so that an image is looked at once, whatever other passes a guard makes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from noisec import contract
from noisec.builders.classifier import read_model
from noisec.builders.images import Images
from noisec.builders.layout import joined, save_model
from noisec.builders.progress import console
from noisec.builders.workbench import DONE
from noisec.errors import NoisecError
from noisec.python_backend.scorer.session import open_session

AMPLIFICATION, FAILING = 1.5, 0.6
"""the paper's factor, and its clean error rate from which on a classifier has been amplified deep enough"""
DEEPER = 3
"""layers beyond that one: the fourth of the paper's five classifiers"""
SAMPLE = 500
"""clean images that choose the depth"""
DEPTH = "amplified.json"


def amplifiable(model: ModelProto) -> list[str]:
    """Outputs of the layers that can be amplified, from the first to the last: of each batch norm, and of each convolution without one."""
    normalised = {node.input[0] for node in model.graph.node if node.op_type == "BatchNormalization"}
    return [
        node.output[0]
        for node in model.graph.node
        if node.op_type == "BatchNormalization" or (node.op_type == "Conv" and node.output[0] not in normalised)
    ]


def amplified(model: ModelProto, depth: int) -> ModelProto:
    """A copy of a classifier stage in which the last ``depth`` layers' outputs are `AMPLIFICATION` times as large.

    Args:
        depth: from 1 to all of them
    """
    layers = amplifiable(model)
    kinds = {value.name: value.type.tensor_type.elem_type for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    for node in model.graph.node:
        result.graph.node.append(node)
        name = node.output[0]
        if name in layers[-depth:]:
            result.graph.node[-1].output[0] = f"{name}/quiet"
            result.graph.node.append(helper.make_node("Mul", [f"{name}/quiet", f"{name}/factor"], [name], f"{name}/amplify"))
            factor = helper.make_tensor(f"{name}/factor", kinds.get(name, TensorProto.FLOAT), [], [AMPLIFICATION])
            result.graph.initializer.append(factor)
    return result


def chosen_depth(classifier: ModelProto, images: Images) -> int:
    """How many of a classifier stage's last layers to amplify: `DEEPER` more than the fewest with which it gets clean images wrong; at most
    all of them.

    Args:
        images: clean and labelled, the classifier was not trained on

    Raises:
        NoisecError: clean images bear all of them: what survives that tells nothing.
    """
    sample, layers = images[:SAMPLE], len(amplifiable(classifier))
    rates = [0.0]
    for depth in range(1, layers + 1):
        session = open_session(amplified(classifier, depth).SerializeToString())
        answers = [session.run([contract.LOGITS], {contract.IMAGE: batch.floats()})[0] for batch in sample.batches()]
        rates.append(float(np.mean(np.concatenate(answers).argmax(axis=1) != sample.labels)))
        if rates[-1] > FAILING:
            return min(depth + DEEPER, layers)
    raise NoisecError(
        f"however many of the classifier's {layers} convolutions and batch norms are amplified, at most {100 * max(rates):.0f} % of clean "
        f"images get a wrong label; {100 * FAILING:.0f} % have to, for triggers to stand out: leave the detector of view 'amplified' out"
    )


def amplify(classifier: Path, images: Images, folder: Path) -> None:
    """Write a classifier stage's amplified copy, and how many of its layers that are.

    Args:
        classifier: folder with ``model.onnx``, with float input
        images: clean and labelled; they choose how much is amplified
        folder: gets ``model.onnx`` and ``amplified.json``

    Raises:
        NoisecError: the classifier has no layers to amplify, or clean images bear it.
    """
    own = read_model(classifier / "model.onnx")
    depth, layers = chosen_depth(own, images), len(amplifiable(own))
    console.print(f"  amplified pass: the last {depth} of {layers} layers")
    (folder / DEPTH).write_text(json.dumps({"amplified": depth, "layers": layers}))
    save_model(amplified(own, depth), folder)


def with_amplified_pass(autoencoder: Path, loud: Path, folder: Path) -> None:
    """Write the autoencoder stage with the amplified classifier in it, which answers the pass's penultimate activations.

    Args:
        autoencoder: folder with ``model.onnx``, staged and with float input
        loud: folder of :func:`amplify`
        folder: gets ``model.onnx``, and what else lies beside the two graphs

    Raises:
        NoisecError: the graphs cannot be joined.
    """
    for path in (*autoencoder.glob("*.json"), loud / DEPTH):
        if path.name != DONE:
            shutil.copyfile(path, folder / path.name)
    before = helper.make_node("Identity", [contract.IMAGE], [f"amplified/{contract.IMAGE}"], "amplified/feed")
    after = helper.make_node("Identity", [f"amplified/{contract.PENULTIMATE}"], [contract.PASSES["amplified"]], "amplified/answer")
    save_model(joined(read_model(autoencoder / "model.onnx"), read_model(loud / "model.onnx"), before, after), folder)
