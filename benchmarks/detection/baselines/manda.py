"""MANDA (Wang et al., INFOCOM 2021): do image manifold and classifier disagree, and is the decision boundary near?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.semi_supervised import LabelSpreading

from noisec.benchmarks.detection.baselines.base import (
    BATCH,
    Doubles,
    Features,
    Labels,
    Network,
    batched,
    decision,
    in_arrays,
    part,
    softmax,
)
from noisec.builders.images import Floats, Images

COPIES, DEVIATION = 3, 0.015
"""noisy copies of an image and the standard deviation of their noise, in the pixel scale [0, 1]"""
NODES, HELD_OUT = 2000, 500
"""images in the graph, and images beside it that choose the kernel's width"""
GRID = np.logspace(0, 2, 5)
"""kernel widths to try: inverse squared widths, in units of the median squared distance"""


@dataclass(frozen=True)
class Manifold:
    """Classes spread over a graph of penultimate activations (Zhou et al. 2004)."""

    nodes: Doubles
    """[m, d]"""
    classes: Doubles
    """[m, classes], each row a distribution"""
    gamma: float
    """of the kernel ``exp(-gamma |a - b|^2)``"""

    @classmethod
    def fit(cls, activations: Floats, labels: Labels, classes: int) -> Manifold:
        """The graph whose kernel gives held-out images their labels with the largest likelihood.

        Args:
            activations: float32 [n, d]; at most ``NODES`` of them become the graph, at most ``HELD_OUT`` others choose the kernel
            labels: int64 [n]
        """
        beside = min(HELD_OUT, len(activations) // 4)
        held_out, truth = activations[:beside], labels[:beside]
        nodes = activations[beside : beside + NODES].astype(np.float64)
        spread = float(np.median(_squared_distances(nodes, nodes)))
        graphs = [cls._spread(nodes, labels[beside : beside + NODES], classes, factor / spread) for factor in GRID]
        return max(graphs, key=lambda graph: np.log(graph(held_out)[np.arange(beside), truth] + 1e-6).mean())

    @classmethod
    def _spread(cls, nodes: Doubles, labels: Labels, classes: int, gamma: float) -> Manifold:
        spreading = LabelSpreading(kernel="rbf", gamma=gamma, max_iter=100).fit(nodes, labels)
        distributions = np.zeros((len(nodes), classes))
        distributions[:, spreading.classes_] = spreading.label_distributions_
        return cls(nodes, distributions, gamma)

    def __call__(self, activations: Floats) -> Doubles:
        """Class probabilities of new points, the nodes' weighted by the kernel: float64 [n, classes] from float32 [n, d].

        scikit-learn's own rule, with weights that are normalised before the exponential, so that a point far from all nodes gets its
        nearest one's classes and not 0 / 0.
        """
        weights = torch.softmax(torch.from_numpy(-self.gamma * _squared_distances(activations, self.nodes)), dim=1)
        probabilities: Doubles = weights.numpy() @ self.classes
        return probabilities


def _squared_distances(left: Floats | Doubles, right: Doubles) -> Doubles:
    distances: Doubles = torch.cdist(torch.from_numpy(left.astype(np.float64)), torch.from_numpy(right)).square().numpy()
    return distances


def disagreement(manifold: Doubles, classifier: Doubles) -> Doubles:
    """Manifold score ``|p| + |q| - |p + q|``, 0 where both say the same: float64 [n] from two of [n, classes]."""
    p, q, both = (np.linalg.norm(array, axis=1) for array in (manifold, classifier, manifold + classifier))
    score: Doubles = p + q - both
    return score


def dispersion(answers: Doubles) -> Doubles:
    """Decision-boundary score ``mean_i |F(x_i)| - |sum_i F(x_i)| / N``, 0 where noise changes nothing: float64 [n] from the
    probabilities of the noisy copies [N, n, classes]."""
    score: Doubles = np.linalg.norm(answers, axis=2).mean(axis=0) - np.linalg.norm(answers.mean(axis=0), axis=1)
    return score


@dataclass
class Manda:
    """Logistic regression on both scores, each standardised: attacks against clean images."""

    features: Features
    name: str = "MANDA (supervised)"
    copies: int = COPIES
    deviation: float = DEVIATION
    seed: int = 0
    predict: Network = field(init=False, repr=False)
    manifold: Manifold = field(init=False, repr=False)
    rule: Any = field(init=False, repr=False)

    def fit(self, images: Images, predict: Network, attacked: Floats) -> None:
        self.predict = predict
        rest, tried = part(images, attacked)
        rest = rest[: NODES + HELD_OUT]
        clean = tried.floats()
        classes = predict(clean[:BATCH]).shape[1]
        self.manifold = Manifold.fit(batched(in_arrays(self.features), rest.floats()), rest.labels, classes)
        statistics = np.concatenate([self.statistics(clean), self.statistics(attacked)])
        truth = np.repeat([0, 1], [len(clean), len(attacked)])
        self.rule = make_pipeline(StandardScaler(), LogisticRegression()).fit(statistics, truth)

    def score(self, pixels: Floats) -> Floats:
        return decision(self.rule, self.statistics(pixels))

    def statistics(self, pixels: Floats) -> Doubles:
        """Manifold score and decision-boundary score: float64 [n, 2]."""
        manifold = batched(self.manifold, batched(in_arrays(self.features), pixels))
        answers = np.stack([self._probabilities(pixels + noise) for noise in self._noises(pixels.shape[1:])])
        return np.stack([disagreement(manifold, self._probabilities(pixels)), dispersion(answers)], axis=1)

    def _probabilities(self, pixels: Floats) -> Doubles:
        answer: Doubles = softmax(batched(self.predict, np.clip(pixels, 0, 1))).numpy()
        return answer

    def _noises(self, shape: tuple[int, ...]) -> Floats:
        """The same draws for every image: float32 [N, C, H, W]."""
        drawn = np.random.default_rng(self.seed).standard_normal((self.copies, *shape), dtype=np.float32)
        return np.float32(self.deviation) * drawn
