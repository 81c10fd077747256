"""What a detector computes of penultimate activations: the higher, the less natural.

NumPy only. ``n`` is the number of rows, ``d`` the width of the penultimate layer, ``C`` the number of classes, ``K`` the number of
Gaussian components, ``M`` of mutants and ``m`` of reference points. Every statistic gives NaN where the activations are not finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.intp]
Real = TypeVar("Real", np.float32, np.float64)


@dataclass(frozen=True)
class Head:
    """The classifier's last layer: from penultimate activations to logits without a network pass."""

    weights: Floats
    """[d, C]"""
    bias: Floats
    """[C]"""
    rectified: npt.NDArray[np.bool_]
    """[], whether a ReLU comes first: the penultimate activations are then those before it"""

    def inputs(self, activations: Floats) -> Floats:
        """What the last layer reads: float32 [..., d] from float32 [..., d]."""
        rectified: Floats = np.maximum(activations, 0) if self.rectified else activations
        return rectified

    def logits(self, activations: Floats) -> Floats:
        """float32 [..., C] from float32 [..., d]"""
        result: Floats = self.inputs(activations) @ self.weights + self.bias
        return result


@dataclass(frozen=True)
class View:
    """Rows as one detector sees them."""

    activations: tuple[Floats, ...]
    """one or two of [n, d]: one is taken as it is, of two the second is subtracted from the first, but where both are amplified; or the
    noise level alone, [n, 1]"""
    labels: Integers
    """[n], the class that the classifier gives the image"""
    head: Head
    answers: tuple[Floats, ...] = ()
    """logits of each of the activations, [n, C], where they are known already"""

    def logits(self) -> tuple[Floats, ...]:
        """What the head makes of each of the activations: float32 [n, C] each."""
        return self.answers or tuple(map(self.head.logits, self.activations))

    @property
    def vectors(self) -> Floats:
        """float32 [n, d]: F(n), F(x), the noise measured in feature space, dF = F(x) - F(A(x)), or F(x) - H(x) of a hardened copy H."""
        first, *rest = self.activations
        return first - rest[0] if rest else first

    def __getitem__(self, rows: npt.NDArray[np.bool_] | slice) -> View:
        activations, answers = (tuple(part[rows] for part in parts) for parts in (self.activations, self.answers))
        return View(activations, self.labels[rows], self.head, answers)


class Statistic(Protocol):
    """A fitted statistic: a dataclass of arrays."""

    def score(self, view: View) -> Floats:
        """float32 [n]"""


@dataclass(frozen=True)
class GaussianMixture:
    """A Gaussian mixture with full covariances (NoiSec section 4.3; the paper uses one component)."""

    weights: Floats
    """[K], summing to 1"""
    means: Floats
    """[K, d]"""
    factors: Floats
    """[K, d, d], lower triangular: ``factor @ factor.T`` is the inverse covariance"""

    def score(self, view: View) -> Floats:
        """Negative log-likelihood ``-log p(t)`` in nats."""
        vectors = view.vectors
        whitened = np.matmul(vectors[None] - self.means[:, None], self.factors)  # [K, n, d]
        squared = np.einsum("knd,knd->kn", whitened, whitened)
        log_determinants = np.log(np.diagonal(self.factors, axis1=1, axis2=2)).sum(axis=1)  # [K]
        constants = np.log(self.weights) + log_determinants - 0.5 * vectors.shape[1] * np.log(2 * np.pi)
        joint = constants[:, None] - 0.5 * squared
        peak = joint.max(axis=0)
        result: Floats = -(peak + np.log(np.exp(joint - peak).sum(axis=0))).astype(np.float32)
        return result


@dataclass(frozen=True)
class ClassGaussian:
    """Squared Mahalanobis distance from the predicted class, with one covariance for all (Lee et al. 2018, section 2.1)."""

    means: Floats
    """[C, d]"""
    factor: Floats
    """[d, d], lower triangular: ``factor @ factor.T`` is the inverse covariance"""

    @staticmethod
    def vectors(view: View) -> Floats:
        """What is measured: float32 [n, d]."""
        return view.vectors

    def score(self, view: View) -> Floats:
        return squared_lengths((self.vectors(view) - self.means[view.labels]) @ self.factor)


@dataclass(frozen=True)
class LogitGaussian(ClassGaussian):
    """The same of the logits' change from reconstruction to image: of all that the noise does to the features, what moves the answer; or
    from the hardened copy's logits to the classifier's."""

    @staticmethod
    def vectors(view: View) -> Floats:
        """float32 [n, C]"""
        first, second = view.logits()
        return first - second


@dataclass(frozen=True)
class Divergence:
    """Jensen-Shannon divergence of the classifier's answers to the image and to its reconstruction (MagNet, section 4.2), or of its own and
    its hardened copy's."""

    temperature: Floats
    """[]; both logits are divided by it"""

    def score(self, view: View) -> Floats:
        """In nats, between 0 and log 2; in float64, as what two alike answers differ by is below float32's rounding of either."""
        answers = softmax(np.stack(view.logits()).astype(np.float64) / self.temperature)
        tiny = 1e-30
        entropy = answers * np.log((answers + tiny) / (answers.mean(axis=0) + tiny))
        result: Floats = entropy.sum(axis=(0, 2)).astype(np.float32) / 2
        return result


@dataclass(frozen=True)
class KernelDensity:
    """Negative log density of Gaussian kernels on clean activations of the predicted class (Feinman et al. 2017, section 5.1)."""

    points: Floats
    """[C, m, d]"""
    bandwidth: Floats
    """[], the kernels' standard deviation"""

    def score(self, view: View) -> Floats:
        """In nats, up to a constant. Of ``|v - p|^2 = |v|^2 - 2 v.p + |p|^2`` the first term is the same for every point."""
        vectors, labels = view.vectors / self.bandwidth, view.labels
        exponents = np.empty((len(vectors), self.points.shape[1]), np.float32)
        for label in set(labels.tolist()):
            rows = np.flatnonzero(labels == label)
            exponents[rows] = vectors[rows] @ self._points[label].T
        exponents -= self._halves[labels]
        peak = exponents.max(axis=1)
        result: Floats = squared_lengths(vectors) / 2 - peak - np.log(np.exp(exponents - peak[:, None]).mean(axis=1))
        return result

    @cached_property
    def _points(self) -> Floats:
        """[C, m, d], in units of the bandwidth"""
        points: Floats = self.points / self.bandwidth
        return points

    @cached_property
    def _halves(self) -> Floats:
        """[C, m], half of their squared lengths"""
        return squared_lengths(self._points) / 2


@dataclass(frozen=True)
class LocalDimension:
    """Local intrinsic dimensionality around the activations among clean ones (Ma et al. 2018, equation 4)."""

    points: Floats
    """[m, d]"""
    neighbours: Integers
    """[], how many count"""

    def score(self, view: View) -> Floats:
        """``-1 / mean(log(r_i / r_k))`` over the k nearest distances."""
        squared = squared_distances(view.vectors, self.points)
        nearest = np.sort(np.partition(squared, int(self.neighbours) - 1, axis=1)[:, : int(self.neighbours)], axis=1)
        ratios = np.log(np.maximum(nearest, np.float32(1e-12)) / np.maximum(nearest[:, -1:], np.float32(1e-12))) / 2
        result: Floats = -1 / np.minimum(ratios.mean(axis=1), np.float32(-1e-6))
        return result


@dataclass(frozen=True)
class HeadMutation:
    """How often the label changes when the last layer is mutated, against what is usual (model sensitivity, arXiv 2006.14871).

    Adversarial inputs change label more often than clean ones, backdoored inputs less often: both sides count. The rate is the mutants'
    mean probability of another label, which unlike a count of labels takes every value.
    """

    weights: Floats
    """[d, M * C], all mutants beside each other"""
    bias: Floats
    """[M * C]"""
    centre: Floats
    """[], the clean images' median logit of the rate"""
    spreads: Floats
    """[2], their usual deviation below and above it"""

    def rate(self, view: View) -> Floats:
        """Logit of the mean probability of another label: float32 [n]."""
        logits = view.head.inputs(view.activations[0]) @ self.weights + self.bias
        classes = view.head.bias.shape[0]
        probabilities = softmax(logits.reshape(len(logits), -1, classes))
        kept = np.take_along_axis(probabilities, view.labels[:, None, None], axis=2)[:, :, 0].mean(axis=1)
        tiny = np.float32(1e-7)
        result: Floats = np.log((1 - kept + tiny) / (kept + tiny))
        return result

    def score(self, view: View) -> Floats:
        difference = self.rate(view) - self.centre
        result: Floats = np.abs(difference) / np.where(difference < 0, self.spreads[0], self.spreads[1])
        return result


@dataclass(frozen=True)
class ReconstructionError:
    """What the autoencoder takes from an image, n = x - A(x) (MagNet, section 4.1). It needs no pass of the classifier, and finds what is
    large and moves no features."""

    def score(self, view: View) -> Floats:
        """Root mean square, of pixels in [0, 1]."""
        result: Floats = view.activations[0][:, 0]
        return result


@dataclass(frozen=True)
class Confidence:
    """How sure of the label amplified classifiers stay (IBD-PSC, section 4.1): clean images lose theirs, triggered ones do not."""

    def score(self, view: View) -> Floats:
        """Logit of the label's probability, which unlike the probability never reaches its bound, on average over the classifiers."""
        label, others = parted(np.stack(view.logits()), view.labels)
        peak = others.max(axis=2)
        result: Floats = (label - peak - np.log(np.exp(others - peak[..., None]).sum(axis=2))).mean(axis=0)
        return result


@dataclass(frozen=True)
class Dissent:
    """How far a hardened copy of the classifier prefers another label: small changes that lead the classifier astray lead it less (decision
    mismatch of two models, Monteiro et al. 2018, arXiv 1802.07770)."""

    def score(self, view: View) -> Floats:
        """The copy's largest other logit minus the label's: above 0 where it gives another label."""
        label, others = parted(view.logits()[1], view.labels)
        result: Floats = others.max(axis=1) - label
        return result


def parted(logits: Floats, labels: Integers) -> tuple[Floats, Floats]:
    """The labels' logits [..., n] of [..., n, C], and the others', with minus infinity in the labels' places: [..., n, C]."""
    rows = np.arange(len(labels))
    others = logits.copy()
    others[..., rows, labels] = -np.inf
    return logits[..., rows, labels], others


def softmax(logits: npt.NDArray[Real]) -> npt.NDArray[Real]:
    """Along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: npt.NDArray[Real] = powers / powers.sum(axis=-1, keepdims=True)
    return result


def squared_lengths(vectors: Floats) -> Floats:
    """float32 [...] from float32 [..., d]"""
    result: Floats = np.einsum("...d,...d->...", vectors, vectors)
    return result


def squared_distances(vectors: Floats, points: Floats) -> Floats:
    """float32 [n, m] from float32 [n, d] and [m, d]"""
    # A NaN must stay one: np.maximum keeps it.
    result: Floats = np.maximum(squared_lengths(vectors)[:, None] - 2 * (vectors @ points.T) + squared_lengths(points), 0)
    return result


STATISTICS: MappingProxyType[str, type] = MappingProxyType(
    {
        "mixture": GaussianMixture,
        "class-gaussian": ClassGaussian,
        "logit-gaussian": LogitGaussian,
        "divergence": Divergence,
        "density": KernelDensity,
        "dimension": LocalDimension,
        "mutation": HeadMutation,
        "reconstruction-error": ReconstructionError,
        "confidence": Confidence,
        "dissent": Dissent,
    }
)
"""kind of a detector -> its statistic"""
WITH_HEAD = frozenset({"class-gaussian", "logit-gaussian", "divergence", "density", "mutation", "confidence", "dissent"})
"""kinds that need the predicted class, and so the image's activations and the classifier's head"""
OF_LOGITS = frozenset({"logit-gaussian", "divergence", "confidence", "dissent"})
"""kinds that need the logits of all their activations"""
APART = "confidence"
"""kind whose detectors' evidence adds nothing to the others': what they find looks natural otherwise"""
INDEPENDENT = "HARDENED_PENULTIMATE"
"""activations whose detectors' evidence is another network's own word: it counts as much as all of the others' together"""
