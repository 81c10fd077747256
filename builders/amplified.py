"""The amplified pass: a second look at the image by a classifier whose last layers speak too loud (IBD-PSC, Hou et al., ICML 2024,
arXiv 2405.09786, section 4).

With its last layers' outputs multiplied, a classifier gets clean images wrong, or grows unsure of them; what a trigger says survives. The
paper asks five such classifiers, amplified ever deeper; one alone, a little deeper than where clean images begin to fail, tells nearly as
much. It is a part of the autoencoder stage, so that an image is looked at once, whatever other passes a guard makes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from noisec import contract
from noisec.builders.classifier import read_model
from noisec.builders.images import Images
from noisec.builders.layout import joined, save_model
from noisec.builders.progress import console
from noisec.errors import NoisecError
from noisec.python_backend.scorer.session import open_session

AMPLIFICATION, FAILING = 1.5, 0.6
"""the paper's factor, and its clean error rate from which on a classifier has been amplified deep enough"""
DEEPER = 3
"""layers beyond that one: the fourth of the paper's five classifiers"""
SAMPLE = 500
"""clean images that choose the depth"""


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

    Raises:
        NoisecError: it has fewer such layers.
    """
    layers = amplifiable(model)
    if len(layers) < depth:
        raise NoisecError(
            f"the classifier has {len(layers)} convolutions and batch norms, and {depth} are to be amplified: leave the detector with "
            "view = 'amplified' out"
        )
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
    """
    sample, layers = images[:SAMPLE], len(amplifiable(classifier))
    pixels = sample.floats()
    for depth in range(1, layers):
        (logits,) = open_session(amplified(classifier, depth).SerializeToString()).run([contract.LOGITS], {contract.IMAGE: pixels})
        if np.mean(logits.argmax(axis=1) != sample.labels) > FAILING:
            return min(depth + DEEPER, layers)
    return max(layers, 1)


def with_amplified_pass(autoencoder: Path, classifier: Path, images: Images, folder: Path) -> None:
    """Write the autoencoder stage with an amplified copy of the classifier beside it, which answers the pass's penultimate activations.

    Args:
        autoencoder, classifier: folders with ``model.onnx``, staged and with float input
        images: clean and labelled; they choose how much is amplified
        folder: gets ``model.onnx``
    """
    own, feed = read_model(classifier / "model.onnx"), f"amplified/{contract.IMAGE}"
    before = helper.make_node("Identity", [contract.IMAGE], [feed], "amplified/feed")
    after = helper.make_node("Identity", [f"amplified/{contract.PENULTIMATE}"], [contract.PASSES["amplified"]], "amplified/answer")
    depth = chosen_depth(own, images)
    console.print(f"  amplified pass: the last {depth} of {len(amplifiable(own))} layers")
    save_model(joined(read_model(autoencoder / "model.onnx"), amplified(own, depth), before, after), folder)
