"""The guard as one differentiable function: what an attacker who holds its weights attacks.

``n`` is the number of rows, ``d`` the width of the penultimate layer, ``C`` the number of classes; the other letters are those of
:mod:`noisec.python_backend.scorer.detectors`, whose formulas these are, operation by operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from noisec import contract
from noisec.benchmarks.detection.subject import Subject
from noisec.builders.torchgraph import TorchGraph
from noisec.errors import NoisecError
from noisec.python_backend.scorer import detectors
from noisec.python_backend.scorer.scoring import Detector, Scorer, TailScale

Whole = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images float32 [n, C, H, W] in [0, 1] -> logits [n, C] and fused score [n] in nats, with gradients"""


def _tensor(array: npt.NDArray[np.generic], device: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


class TorchHead:
    """The classifier's last layer."""

    def __init__(self, head: detectors.Head, device: str) -> None:
        self.weights, self.bias = _tensor(head.weights, device), _tensor(head.bias, device)
        self._rectified = bool(head.rectified)

    def inputs(self, activations: Tensor) -> Tensor:
        """What the last layer reads: [n, d] from [n, d]."""
        return activations.relu() if self._rectified else activations

    def logits(self, activations: Tensor) -> Tensor:
        """[n, C] from [n, d]"""
        return self.inputs(activations) @ self.weights + self.bias


@dataclass(frozen=True)
class TorchView:
    """Rows as one detector sees them."""

    activations: tuple[Tensor, ...]
    """one or two of [n, d]"""
    labels: Tensor
    """int64 [n]"""
    head: TorchHead

    @property
    def vectors(self) -> Tensor:
        """[n, d]"""
        first, *rest = self.activations
        return first - rest[0] if rest else first

    def __getitem__(self, rows: Tensor) -> TorchView:
        return TorchView(tuple(part[rows] for part in self.activations), self.labels[rows], self.head)


Raw = Callable[[TorchView], Tensor]
"""rows -> raw scores [n]"""


def _mixture(fitted: detectors.GaussianMixture, device: str) -> Raw:
    means, factors = _tensor(fitted.means, device), _tensor(fitted.factors, device)
    determinants = factors.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    constants = _tensor(fitted.weights, device).log() + determinants - 0.5 * means.shape[1] * math.log(2 * math.pi)

    def raw(view: TorchView) -> Tensor:
        whitened = torch.matmul(view.vectors[None] - means[:, None], factors)  # [K, n, d]
        return -torch.logsumexp(constants[:, None] - 0.5 * whitened.square().sum(dim=2), dim=0)

    return raw


def _mahalanobis(fitted: detectors.ClassGaussian, vectors: Callable[[TorchView], Tensor], device: str) -> Raw:
    means, factor = _tensor(fitted.means, device), _tensor(fitted.factor, device)
    return lambda view: ((vectors(view) - means[view.labels]) @ factor).square().sum(dim=1)


def _class_gaussian(fitted: detectors.ClassGaussian, device: str) -> Raw:
    return _mahalanobis(fitted, lambda view: view.vectors, device)


def _logit_gaussian(fitted: detectors.LogitGaussian, device: str) -> Raw:
    return _mahalanobis(fitted, lambda view: view.head.logits(view.activations[0]) - view.head.logits(view.activations[1]), device)


def _divergence(fitted: detectors.Divergence, device: str) -> Raw:
    def entropy(first: Tensor, second: Tensor) -> Tensor:
        return (first * ((first + 1e-30) / (second + 1e-30)).log()).sum(dim=1)

    def raw(view: TorchView) -> Tensor:
        first, second = ((view.head.logits(part) / float(fitted.temperature)).softmax(dim=1) for part in view.activations)
        middle = (first + second) / 2
        return (entropy(first, middle) + entropy(second, middle)) / 2

    return raw


def _density(fitted: detectors.KernelDensity, device: str) -> Raw:
    points, bandwidth = _tensor(fitted.points, device), float(fitted.bandwidth)
    squared = points.square().sum(dim=2)  # [C, m]

    def raw(view: TorchView) -> Tensor:
        vectors, labels = view.vectors, view.labels
        products = torch.einsum("nd,nmd->nm", vectors, points[labels])
        distances = (vectors.square().sum(dim=1, keepdim=True) - 2 * products + squared[labels]).clamp(min=0)
        return math.log(points.shape[1]) - torch.logsumexp(-distances / (2 * bandwidth**2), dim=1)

    return raw


def _dimension(fitted: detectors.LocalDimension, device: str) -> Raw:
    points = _tensor(fitted.points, device)

    def raw(view: TorchView) -> Tensor:
        vectors = view.vectors
        distances = vectors.square().sum(dim=1, keepdim=True) - 2 * vectors @ points.T + points.square().sum(dim=1)
        nearest = distances.topk(int(fitted.neighbours), dim=1, largest=False).values.clamp(min=1e-12)
        ratios = (nearest / nearest[:, -1:]).log() / 2
        return -1 / ratios.mean(dim=1).clamp(max=-1e-6)

    return raw


def _mutation(fitted: detectors.HeadMutation, device: str) -> Raw:
    weights, bias = _tensor(fitted.weights, device), _tensor(fitted.bias, device)
    below, above = fitted.spreads.tolist()

    def raw(view: TorchView) -> Tensor:
        logits = view.head.inputs(view.activations[0]) @ weights + bias
        answers = logits.reshape(len(logits), -1, len(view.head.bias)).softmax(dim=2)
        kept = answers[torch.arange(len(answers), device=answers.device), :, view.labels].mean(dim=1)
        difference = ((1 - kept + 1e-7) / (kept + 1e-7)).log() - float(fitted.centre)
        return torch.where(difference < 0, -difference / below, difference / above)

    return raw


def _confidence(view: TorchView) -> Tensor:
    logits = torch.stack([view.head.logits(part) for part in view.activations])
    label = view.labels.expand(len(logits), -1)[..., None]
    others = logits.scatter(2, label, -torch.inf)
    return (logits.gather(2, label)[..., 0] - torch.logsumexp(others, dim=2)).mean(dim=0)


def _dissent(view: TorchView) -> Tensor:
    logits = view.head.logits(view.activations[1])
    label = view.labels[:, None]
    return logits.scatter(1, label, -torch.inf).amax(dim=1) - logits.gather(1, label)[:, 0]


STATISTICS: dict[str, Callable[..., Raw]] = {
    "mixture": _mixture,
    "class-gaussian": _class_gaussian,
    "logit-gaussian": _logit_gaussian,
    "divergence": _divergence,
    "density": _density,
    "dimension": _dimension,
    "mutation": _mutation,
    "reconstruction-error": lambda fitted, device: lambda view: view.activations[0][:, 0],
    "confidence": lambda fitted, device: _confidence,
    "dissent": lambda fitted, device: _dissent,
}
"""kind of a detector -> (fitted statistic, device) -> its formula in torch"""


class TorchScale:
    """Raw scores [n] -> surprisals [n] in nats: piecewise linear, with straight tails."""

    def __init__(self, scale: TailScale, device: str) -> None:
        self._scores, self._surprisals = _tensor(scale.scores, device), _tensor(scale.surprisals, device)
        self._slopes = self._surprisals.diff() / self._scores.diff()

    def __call__(self, raw: Tensor) -> Tensor:
        left = (torch.searchsorted(self._scores, raw.detach()) - 1).clamp(0, len(self._slopes) - 1)
        return self._surprisals[left] + (raw - self._scores[left]) * self._slopes[left]


class TorchDetector:
    """One detector, at all noise levels.

    Raises:
        NoisecError: its kind has no formula in torch.
    """

    def __init__(self, detector: Detector, device: str) -> None:
        if detector.kind not in STATISTICS:
            raise NoisecError(f"detectors of kind {detector.kind!r} have no gradients here; known are {', '.join(STATISTICS)}")
        self._inputs = detector.inputs
        self._raw = [STATISTICS[detector.kind](one, device) for one in detector.statistics]
        self._scales = [TorchScale(scale, device) for scale in detector.scales]

    def __call__(self, tensors: Mapping[str, Tensor], labels: Tensor, levels: Tensor, head: TorchHead) -> Tensor:
        """Surprisal [n] in nats."""
        view = TorchView(tuple(tensors[name] for name in self._inputs), labels, head)
        result = torch.zeros_like(view.activations[0][:, 0])
        for level in sorted(set(levels.tolist())):
            rows = levels == level
            result[rows] = self._scales[level](self._raw[level](view[rows]))
        return result


class TorchScorer:
    """A fitted scorer as a differentiable function.

    Noise level and predicted class choose the statistics, as they do in the scorer; no gradient flows through the choice.

    Args:
        scorer: the artefact that serves

    Raises:
        NoisecError: a detector's kind has no formula in torch.
    """

    def __init__(self, scorer: Scorer, device: str = "cpu") -> None:
        self._edges = _tensor(scorer.edges, device)
        self._head = TorchHead(scorer.head, device)
        self._needs_head = scorer.needs_head
        self._detectors = [TorchDetector(detector, device) for detector in scorer.detectors]
        self._in_sum, self._apart, self._independent = (_tensor(rows, device) for rows in (scorer.in_sum, scorer.apart, scorer.independent))
        self._together = TorchScale(scorer.together, device) if scorer.together else None
        self._fusion = scorer.fusion

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The fused score.

        Args:
            tensors: name -> float32 [n, d] or [n, 1], as the scorer's ``inputs`` list them

        Returns:
            float32 [n] in nats, NaN where the input is no image
        """
        levels = torch.searchsorted(self._edges, tensors[contract.NOISE_LEVEL][:, 0].detach().contiguous(), right=True)
        labels = self._labels(tensors, levels)
        each = torch.stack([detector(tensors, labels, levels, self._head) for detector in self._detectors])
        if self._fusion == "fisher" and len(each) > 1:
            each = self._fused(each)
        return torch.where(tensors[contract.IN_RANGE][:, 0] == 1, each.amax(dim=0), torch.nan)

    def _fused(self, each: Tensor) -> Tensor:
        """Fisher's method: surprisals [number of detectors, n] -> [1, n], or more rows of which the largest counts."""
        rivals = [*each[self._apart]]
        if self._in_sum.any():
            total = each[self._in_sum].clamp(min=0).sum(dim=0)
            rivals.append(self._together(total) if self._together else total)
        if not self._independent.any():
            return torch.stack(rivals)
        strongest = [torch.stack(rivals).amax(dim=0)] if rivals else []
        return torch.stack([*strongest, *each[self._independent]]).clamp(min=0).sum(dim=0, keepdim=True)

    def _labels(self, tensors: Mapping[str, Tensor], levels: Tensor) -> Tensor:
        if not self._needs_head:
            return torch.zeros_like(levels)
        return self._head.logits(tensors[contract.PASSES["image"]].detach()).argmax(dim=1)


def compose(stages: Mapping[str, Path], scorer: Scorer, noise_source: str, device: str = "cpu") -> Whole:
    """Network stages and scorer as one function: the classifier passes are those that the scorer reads, and the image's for the logits.

    Args:
        stages: ``autoencoder`` and ``classifier`` -> folder with ``model.onnx``
        noise_source: the autoencoder stage's output that the noise pass feeds to the classifier stage
        device: where everything is computed; images and answers stay on the images' own

    Raises:
        NoisecError: a stage has an operation, or the scorer a detector, that has no gradients here.
    """
    graphs = {stage: TorchGraph(folder / "model.onnx", device) for stage, folder in stages.items()}
    score = TorchScorer(scorer, device)
    passes = [one for one, name in contract.PASSES.items() if one not in contract.COPIES and (name in scorer.inputs or one == "image")]

    def run(stage: str, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(graphs[stage].outputs, graphs[stage](images), strict=True))

    def whole(images: Tensor) -> tuple[Tensor, Tensor]:
        moved = images.to(device)
        made = run("autoencoder", moved)
        sources = {"image": moved, "noise": made[noise_source], "reconstruction": made[contract.RECONSTRUCTION]}
        answers = {one: run("classifier", sources[one]) for one in passes}
        activations = {contract.PASSES[one]: answer[contract.PENULTIMATE] for one, answer in answers.items()}
        return answers["image"][contract.LOGITS].to(images.device), score({**made, **activations}).to(images.device)

    return whole


def whole(subject: Subject, device: str = "cpu") -> Whole:
    """A guard under test, from image to logits and score, with gradients."""
    return compose(subject.stages, subject.scorer, subject.spec.noise_source, device)
