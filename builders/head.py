"""The classifier's last layer, read from its stage graph: some detectors go from activations to probabilities with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import NodeProto

from noisec import contract
from noisec.builders.classifier import Graph, find_head, read_model
from noisec.builders.images import Floats
from noisec.errors import NoisecError
from noisec.python_backend.scorer.detectors import Head
from noisec.python_backend.scorer.session import open_session

MAX_DIFFERENCE = 1e-2
"""largest difference of the head's logits from the graph's that still counts as rounding, relative to the logits' scale"""


def read_head(stage: Path, images: Floats) -> Head:
    """The last linear layer of a classifier stage, and whether a ReLU lies between PENULTIMATE and it.

    Args:
        stage: ``model.onnx`` in fp32
        images: float32 [n, C, H, W], on which the head is compared with the graph

    Raises:
        NoisecError: the graph does more between PENULTIMATE and LOGITS than a ReLU and one linear layer.
    """
    weights, bias = _parameters(stage)
    logits, activations = open_session(stage).run(list(contract.CLASSIFIER_OUTPUTS), {contract.IMAGE: images})
    for rectified in (False, True):
        head = Head(weights, bias, np.array(rectified))
        if weights.shape[0] == activations.shape[1] and _close(head.logits(activations), logits):
            return head
    raise NoisecError(
        f"{stage.name}: LOGITS are not a linear layer of PENULTIMATE [{activations.shape[1]}], with or without a ReLU before it: detectors "
        "that read the predicted class need that; choose the last layer's input as classifier.penultimate, or detectors of kind 'mixture'"
    )


def _parameters(stage: Path) -> tuple[Floats, Floats]:
    """Weights [d, C] and bias [C] of the last linear layer."""
    graph = Graph(read_model(stage))
    node = find_head(graph, contract.LOGITS)
    if node is None:
        raise NoisecError(f"{stage.name}: no linear layer makes LOGITS: detectors that read the predicted class need one")
    values = _values(graph, node)
    weights = values[0].reshape(values[0].shape[:2]).astype(np.float32)
    if node.op_type == "Conv" or (node.op_type == "Gemm" and any(part.name == "transB" and part.i for part in node.attribute)):
        weights = weights.T
    return np.ascontiguousarray(weights), _bias(graph, node, values, weights.shape[1])


def _values(graph: Graph, node: NodeProto) -> list[Floats]:
    """The weights among a node's inputs."""
    return [np.asarray(graph.value(name), np.float32) for name in node.input if name and graph.is_constant(name)]


def _bias(graph: Graph, node: NodeProto, values: list[Floats], classes: int) -> Floats:
    """The layer's own bias, or the constant that is added to its output."""
    if len(values) > 1:
        return values[1].reshape(-1).astype(np.float32)
    for later in graph.nodes:
        if later.op_type == "Add" and node.output[0] in later.input:
            constants = _values(graph, later)
            if constants:
                return np.broadcast_to(constants[0].reshape(-1), classes).astype(np.float32)
    return np.zeros(classes, np.float32)


def _close(found: Floats, wanted: Floats) -> bool:
    return bool(np.abs(found - wanted).max() <= MAX_DIFFERENCE * np.abs(wanted).max())
