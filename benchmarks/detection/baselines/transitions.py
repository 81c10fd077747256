"""Transitions between activation spaces (Katzir and Elovici 2018, arXiv 1811.09043; the unified framework's activation space): does an
input change its class from layer to layer as others do?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import ModelProto, helper
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline

from noisec import contract
from noisec.benchmarks.detection.baselines.base import BATCH, Doubles, Labels, Network, batched, predicted
from noisec.builders.amplified import amplifiable
from noisec.builders.classifier import read_model
from noisec.builders.images import Floats, Images
from noisec.python_backend.scorer.session import open_session

NEIGHBOURS, VARIANCE = 5, 0.95
"""of the label in each layer, and the share of the activations' variance in which they are looked for"""
SMOOTHING = 1.0
"""transitions that each pair of labels is taken to have shown before any was counted"""
Layers = Callable[[Floats], list[Floats]]
"""images float32 [n, C, H, W] in [0, 1] -> activations [n, width of the layer], from the first layer to the last"""


def layers_of(classifier: Path) -> Layers:
    """The outputs of a classifier stage's convolutions and batch norms, each channel as its mean over the image.

    Args:
        classifier: folder with ``model.onnx``, with float input
    """
    model = ModelProto()
    model.CopyFrom(read_model(classifier / "model.onnx"))
    names = amplifiable(model)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    session = open_session(model.SerializeToString())

    def run(pixels: Floats) -> list[Floats]:
        return [answer.mean(axis=tuple(range(2, answer.ndim))) for answer in session.run(names, {contract.IMAGE: pixels})]

    return run


@dataclass
class Transitions:
    """How unlikely the labels are that an input's nearest neighbours have from layer to layer.

    In each layer, behind principal components, an input gets the label of its neighbours. All layers' labels, and the classifier's own as
    the last, make a chain, whose transitions between each two layers are counted on other clean images. The score is the surprisal of
    an input's chain in nats.
    """

    layers: Layers
    name: str = "transitions"
    seed: int = 0
    predict: Network = field(init=False, repr=False)
    nearest: list[Pipeline] = field(init=False, repr=False)
    surprisals: Doubles = field(init=False, repr=False)
    """[layers, labels before, labels after], in nats"""

    def fit(self, images: Images, predict: Network) -> None:
        self.predict = predict
        middle = len(images) // 2
        known, counted = images[:middle].floats(), images[middle:].floats()
        labels = predicted(predict, known)
        self.nearest = [
            make_pipeline(PCA(VARIANCE, random_state=self.seed), KNeighborsClassifier(NEIGHBOURS)).fit(activations, labels)
            for activations in _all(self.layers, known)
        ]
        chains, classes = self.chains(counted), batched(predict, counted[:1]).shape[1]
        counts = np.full((len(self.nearest), classes, classes), SMOOTHING)
        for count, before, after in zip(counts, chains.T, chains.T[1:], strict=False):
            np.add.at(count, (before, after), 1)
        self.surprisals = -np.log(counts / counts.sum(axis=2, keepdims=True))

    def score(self, pixels: Floats) -> Floats:
        chains = self.chains(pixels)
        pairs = np.arange(len(self.surprisals)), chains[:, :-1], chains[:, 1:]
        total: Floats = self.surprisals[pairs].sum(axis=1).astype(np.float32)
        return total

    def chains(self, pixels: Floats) -> Labels:
        """The neighbours' label in each layer, then the classifier's: int64 [n, layers + 1]."""
        each = zip(self.nearest, _all(self.layers, pixels), strict=True)
        return np.stack([*(nearest.predict(activations) for nearest, activations in each), predicted(self.predict, pixels)], axis=1)


def _all(layers: Layers, pixels: Floats) -> list[Floats]:
    """Each layer's activations of all images, asked for a batch at a time."""
    batches = [layers(pixels[start : start + BATCH]) for start in range(0, max(len(pixels), 1), BATCH)]
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]
