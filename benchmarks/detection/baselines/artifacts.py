"""Artifacts (Feinman et al. 2017, arXiv 1703.00410): how dense is the predicted class there, and how sure is a Bayesian network?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from noisec.benchmarks.detection.baselines.base import (
    Doubles,
    Features,
    Labels,
    Network,
    batched,
    decision,
    in_arrays,
    part,
    predicted,
)
from noisec.builders.images import Floats, Images
from noisec.errors import NoisecError

PASSES = 50
"""dropout masks; the paper's"""
INSERTED = 0.5
"""rate of the dropout that a network without any gets"""
FOLDS = 3
SAMPLE = 500
"""images of one class that choose the bandwidth; all of them make the density"""
GRID = np.logspace(-1, 0.5, 10)
"""bandwidths to try, in units of the activations' standard deviation within a class"""
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class ClassDensities:
    """A Gaussian kernel density of each class's penultimate activations ("Density Estimates")."""

    kernels: tuple[Any, ...]
    """[classes], fitted ``KernelDensity``"""

    @classmethod
    def fit(cls, activations: Floats, labels: Labels, classes: int) -> ClassDensities:
        """From float32 [n, d] and the true labels int64 [n].

        Raises:
            NoisecError: a class has too few images.
        """
        groups = [activations[labels == label].astype(np.float64) for label in range(classes)]
        for label, group in enumerate(groups):
            if len(group) < FOLDS:
                raise NoisecError(f"class {label} has {len(group)} fit images, at least {FOLDS} are needed; give more")
        bandwidth = choose_bandwidth(groups)
        return cls(tuple(KernelDensity(bandwidth=bandwidth).fit(group) for group in groups))

    def surprisal(self, activations: Floats, labels: Labels) -> Doubles:
        """``-log`` density under the labels' classes: float64 [n] in nats from float32 [n, d] and int64 [n]."""
        result = np.empty(len(activations))
        for label in np.unique(labels):
            rows = labels == label
            result[rows] = -self.kernels[label].score_samples(activations[rows].astype(np.float64))
        return result


def choose_bandwidth(groups: Sequence[Doubles]) -> float:
    """One bandwidth for all classes, that of the largest held-out log likelihood on a logarithmic grid.

    The paper tunes it likewise and prints the outcome for its own networks (1.2 on MNIST, .26 on CIFAR-10), which means nothing for
    another network's activations.

    Args:
        groups: activations [n_c, d] of each class
    """
    samples = [group[:SAMPLE] for group in groups]
    spread = float(np.sqrt(np.mean([group.var(axis=0).mean() for group in samples])))
    if not spread > 0:
        raise NoisecError("the penultimate activations do not vary within a class; there is no density to fit")
    search = GridSearchCV(KernelDensity(), {"bandwidth": spread * GRID}, cv=FOLDS, refit=False)
    likelihood = np.sum([search.fit(group).cv_results_["mean_test_score"] for group in samples], axis=0)
    return float(spread * GRID[likelihood.argmax()])


class SharedDropout(nn.Module):
    """Dropout with one mask for all rows of a batch, so that an image's uncertainty does not depend on its neighbours."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        self.layer.train()
        kept: Tensor = hidden * self.layer(torch.ones_like(hidden[:1]))
        return kept


class HeadInput(nn.Module):
    """A network up to one of its layers: images -> that layer's input."""

    def __init__(self, network: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, images: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        self.network(images)
        hook.remove()
        return seen[-1]


def bayesian(network: nn.Module, example: Tensor) -> tuple[nn.Module, nn.Module]:
    """A network as a sure part and an unsure part, both copies; batch norm and all else stay in evaluation mode.

    Dropout layers become active where they stand. A network without any, as residual networks are, gets dropout at ``INSERTED`` on the
    penultimate activations before its last linear layer; it was not trained with it, so that the variance is only a stand-in for the
    paper's.

    Args:
        example: float32 [1, C, H, W]

    Raises:
        NoisecError: there is neither a dropout layer, nor a last linear one that gives the logits.
    """
    network = copy.deepcopy(network).eval()
    dropouts = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, DROPOUTS) and layer.p > 0]
    if dropouts:
        for name, layer in dropouts:
            network.set_submodule(name, SharedDropout(layer))
        return nn.Identity(), network
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    if linear:
        sure, head = HeadInput(network, linear[-1]), linear[-1]
        with torch.no_grad():
            if torch.equal(head(sure(example)), network(example)):
                return sure, nn.Sequential(SharedDropout(nn.Dropout(INSERTED)), head)
    raise NoisecError("the classifier has no dropout layer, and its logits are not those of its last linear layer; leave Artifacts out")


def dropout_variance(sure: nn.Module, unsure: nn.Module, images: Tensor, passes: int, seed: int) -> Tensor:
    """Variance of the probabilities over dropout masks, averaged over classes ("Bayesian Neural Network Uncertainty"): float32 [n] from
    float32 [n, C, H, W]."""
    hidden = sure(images)
    answers = []
    with torch.random.fork_rng(devices=[]):
        for mask in range(passes):
            torch.manual_seed(seed + mask)
            answers.append(torch.softmax(unsure(hidden), dim=1))
    return torch.stack(answers).var(dim=0, correction=0).mean(dim=1)


def matched_noise(clean: Floats, attacked: Floats, seed: int) -> Floats:
    """Clean images with Gaussian noise of each attack's own L2 norm, clipped to [0, 1]: float32 [m, C, H, W] from two of them."""
    noise = np.random.default_rng(seed).standard_normal(clean.shape, dtype=np.float32)
    wanted, drawn = (np.linalg.norm(array.reshape(len(array), -1), axis=1) for array in (attacked - clean, noise))
    noisy: Floats = np.clip(clean + noise * (wanted / drawn)[:, None, None, None], 0, 1)
    return noisy


@dataclass
class Artifacts:
    """Logistic regression on both statistics, each standardised: attacks against clean and noisy images, the noise as large as the
    attack. As in the paper, images that the classifier gets wrong without an attack are left out of it."""

    network: nn.Module
    """images -> logits; copied, never changed"""
    features: Features
    name: str = "Artifacts (supervised)"
    passes: int = PASSES
    seed: int = 0
    predict: Network = field(init=False, repr=False)
    parts: tuple[nn.Module, nn.Module] = field(init=False, repr=False)
    densities: ClassDensities = field(init=False, repr=False)
    rule: Any = field(init=False, repr=False)

    def fit(self, images: Images, predict: Network, attacked: Floats) -> None:
        self.predict = predict
        dense, tried = part(images, attacked)
        clean = tried.floats()
        self.parts = bayesian(self.network, torch.from_numpy(clean[:1]))
        logits = batched(predict, clean)
        self.densities = ClassDensities.fit(batched(in_arrays(self.features), dense.floats()), dense.labels, logits.shape[1])
        right = logits.argmax(axis=1) == tried.labels
        clean, attacked = clean[right], attacked[right]
        kinds = [self.statistics(pixels) for pixels in (clean, matched_noise(clean, attacked, self.seed), attacked)]
        truth = np.repeat([0, 0, 1], len(clean))
        self.rule = make_pipeline(StandardScaler(), LogisticRegression()).fit(np.concatenate(kinds), truth)

    def score(self, pixels: Floats) -> Floats:
        return decision(self.rule, self.statistics(pixels))

    def statistics(self, pixels: Floats) -> Doubles:
        """Surprisal under the predicted class and dropout variance: float64 [n, 2]."""
        activations = batched(in_arrays(self.features), pixels)
        surprisal = self.densities.surprisal(activations, predicted(self.predict, pixels))
        return np.stack([surprisal, batched(in_arrays(self._variance), pixels)], axis=1)

    def _variance(self, images: Tensor) -> Tensor:
        return dropout_variance(*self.parts, images, self.passes, self.seed)
