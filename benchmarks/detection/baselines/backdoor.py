"""Detectors of triggered images: STRIP, IBD-PSC and SCALE-UP. All three ask whether a label survives what it should not survive."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from noisec.benchmarks.detection.baselines.base import Labels, Network, batched, in_arrays, predicted, softmax
from noisec.builders.amplified import AMPLIFICATION, FAILING
from noisec.builders.images import Floats, Images
from noisec.errors import NoisecError

OVERLAYS = 20
"""clean images that STRIP lays over each input"""
DEPTHS = 5
"""IBD-PSC's number of amplified networks"""
SAMPLE = 1000
"""clean images that choose IBD-PSC's first depth"""
MULTIPLES = (3.0, 5.0, 7.0, 9.0, 11.0)
"""SCALE-UP's factors"""
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def entropy(logits: Floats) -> Tensor:
    """Shannon entropy over the classes: float64 [n] in bits from logits [n, classes]."""
    nats: Tensor = torch.special.entr(softmax(logits)).sum(dim=1)
    return nats / float(np.log(2))


@dataclass
class Strip:
    """STRIP (Gao et al., ACSAC 2019, arXiv 1902.06531): a trigger dominates whatever is superimposed, so its label stays certain.

    The score is the negative entropy, averaged over the overlays. The entropy is the paper's, over the classes of each blend. The
    blend is ``clip(x + c)``, as the authors' image library does with both weights 1; weights of one half give the average instead.
    """

    name: str = "STRIP"
    weights: tuple[float, float] = (1.0, 1.0)
    """of the input and of the overlay"""
    count: int = OVERLAYS
    seed: int = 0
    predict: Network = field(init=False, repr=False)
    overlays: Floats = field(init=False, repr=False)
    """float32 [N, C, H, W], the same for every input"""

    def fit(self, images: Images, predict: Network) -> None:
        rows = np.random.default_rng(self.seed).choice(len(images), min(self.count, len(images)), replace=False)
        self.predict, self.overlays = predict, images[rows].floats()

    def score(self, pixels: Floats) -> Floats:
        return batched(self._score, pixels)

    def _score(self, pixels: Floats) -> Floats:
        own, other = np.float32(self.weights[0]), np.float32(self.weights[1])
        blends = (np.clip(own * pixels + other * overlay, 0, 1) for overlay in self.overlays)
        mean: Floats = torch.stack([entropy(self.predict(blend)) for blend in blends]).mean(dim=0).float().numpy()
        return -mean


def normalisations(network: nn.Module, example: Tensor) -> list[str]:
    """Names of the batch norms that have parameters, in the order in which an image passes them.

    Args:
        example: float32 [1, C, H, W]

    Raises:
        NoisecError: there are none.
    """
    passed: list[str] = []
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, BATCH_NORMS) and layer.affine]
    hooks = [layer.register_forward_pre_hook(partial(lambda name, *_: passed.append(name), name)) for name, layer in layers]
    with torch.no_grad():
        network(example)
    for hook in hooks:
        hook.remove()
    if not passed:
        raise NoisecError("the classifier has no batch norm with parameters; IBD-PSC has nothing to amplify, leave it out")
    return list(dict.fromkeys(passed))


def amplified(network: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy of a network in which the named batch norms' scales and shifts are ``AMPLIFICATION`` times as large."""
    result = copy.deepcopy(network)
    with torch.no_grad():
        for name in names:
            for parameter in result.get_submodule(name).parameters():
                parameter.mul_(AMPLIFICATION)
    return result


def first_depth(network: nn.Module, names: Sequence[str], pixels: Floats, labels: Labels) -> int:
    """The smallest number of amplified last batch norms with which clean images fail (the paper's adaptive selection of layers); all of
    them where they never do."""
    for depth in range(1, len(names)):
        if np.mean(predicted(in_arrays(amplified(network, names[-depth:])), pixels) != labels) > FAILING:
            return depth
    return len(names)


@dataclass
class IbdPsc:
    """IBD-PSC (Hou et al., ICML 2024, arXiv 2405.09786): a triggered image's label stays confident while the weights are amplified.

    The last ``k, k + 1, ..., k + 4`` batch norms are amplified, ``k`` where clean images begin to fail; the score is the mean confidence
    in the original label, as ``-log`` of what it lacks of 1: so close to 1 confidences themselves would tie. In a
    network with fewer batch norms than that asks for, ``k`` moves up, to ``1`` at most.
    """

    network: nn.Module
    """images -> logits; copied, never changed"""
    name: str = "IBD-PSC"
    predict: Network = field(init=False, repr=False)
    amplified: tuple[Network, ...] = field(init=False, repr=False)

    def fit(self, images: Images, predict: Network) -> None:
        self.predict = predict
        sample = images[:SAMPLE]
        pixels = sample.floats()
        network = copy.deepcopy(self.network).eval()
        names = normalisations(network, torch.from_numpy(pixels[:1]))
        start = min(first_depth(network, names, pixels, sample.labels), max(1, len(names) - DEPTHS + 1))
        depths = range(start, min(start + DEPTHS, len(names) + 1))
        self.amplified = tuple(in_arrays(amplified(network, names[-depth:])) for depth in depths)

    def score(self, pixels: Floats) -> Floats:
        return batched(self._score, pixels)

    def _score(self, pixels: Floats) -> Floats:
        rows, labels = np.arange(len(pixels)), self.predict(pixels).argmax(axis=1)
        others = [softmax(network(pixels)).numpy() for network in self.amplified]
        for probabilities in others:
            probabilities[rows, labels] = 0
        lacking = np.mean([probabilities.sum(axis=1) for probabilities in others], axis=0)
        score: Floats = -np.log(np.maximum(lacking, np.finfo(np.float64).tiny)).astype(np.float32)
        return score


@dataclass
class ScaleUp:
    """SCALE-UP (Guo et al., ICLR 2023, arXiv 2302.03251): a triggered image keeps its label while its pixels are multiplied.

    The score is the share of ``clip(k x)`` that keep it, the paper's scaled prediction consistency without clean images: fitting
    learns nothing.
    """

    name: str = "SCALE-UP"
    multiples: tuple[float, ...] = MULTIPLES
    predict: Network = field(init=False, repr=False)

    def fit(self, images: Images, predict: Network) -> None:
        self.predict = predict

    def score(self, pixels: Floats) -> Floats:
        return batched(self._score, pixels)

    def _score(self, pixels: Floats) -> Floats:
        label = self.predict(pixels).argmax(axis=1)
        kept = [self.predict(np.clip(np.float32(k) * pixels, 0, 1)).argmax(axis=1) == label for k in self.multiples]
        share: Floats = np.mean(kept, axis=0).astype(np.float32)
        return share
