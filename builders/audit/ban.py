"""BAN: backdoors activated by neuron noise (Xu et al., NeurIPS 2024, arXiv 2405.19928), with a verdict that can be calibrated.

Noise on the neurons that makes a clean network fail makes it fail in all directions; a backdoored one fails towards the backdoor's
target. The published code shows a histogram of labels and leaves the verdict to the reader. Here the verdict is ``score > threshold``,
the score being how far the share of held-out clean images with one label lies above chance, or above what clean classifiers of the
same family give that label; against such a reference the classes' largest margins and universal perturbations count too
(`noisec.builders.audit.reference`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from noisec.builders.audit.checks import check, frozen, logits_of, pieces, tensors
from noisec.builders.audit.evidence import Evidence, excess
from noisec.builders.audit.margins import largest_margins
from noisec.builders.audit.masks import SplitNetwork, feature_mask
from noisec.builders.audit.neurons import CHUNK, adversarial_noise, batch_statistics, perturbed, replaced_logits
from noisec.builders.audit.universal import universal_sizes
from noisec.builders.images import Images
from noisec.builders.progress import bar
from noisec.builders.train import DEVICE
from noisec.errors import NoisecError

MARGIN = 0.02
"""what a threshold fitted on few models lies above the largest score among them, at least"""
EDGE = 1e-3
"""places between the bounds are kept this far from 0 and 1 before they become log odds"""


@dataclass(frozen=True)
class AuditSettings:
    """The paper's settings for ResNet-18 are ``eps`` .3, ``steps`` 30, ``features`` "complement", ``repeats`` 1 (BAN section 4.1). The
    defaults are for smaller networks: a sixth of the steps finds noise that is as bad, and buys more draws. A clean network fails towards
    another class with every draw, a backdoored one mostly towards its target, so that the mean over draws tells them apart."""

    samples: int = 500
    """clean images, as equal a number of each class as there are: 1 % of CIFAR-10's training set"""
    eps: float = 0.6
    """largest relative change of a neuron"""
    steps: int = 5
    """of the noise's gradient ascent"""
    features: Literal["whole", "complement"] = "whole"
    """what the head judges: the whole last feature map, or, as published, what the feature mask leaves of it. On small networks next to
    nothing is left by the mask, and the head then gives one label to all images of a clean network too"""
    mask_weight: float = 0.75
    """lambda, the weight of the mask's norm"""
    mask_epochs: int = 20
    seed: int = 0
    repeats: int = 6
    """audits with different samples and noise, whose histograms are averaged"""
    starts: int = 2
    """images from which each class's largest margin is searched; 0 leaves it out"""
    ascents: int = 50
    """steps of that search"""
    shared: int = 16
    """images that each class's universal perturbation is searched on; 0 leaves it out"""
    growth: float = 0.15
    """how far it goes with each step: half of the L2 norm, pixels in [0, 1]"""
    shifts: int = 8
    """steps of that search"""
    threshold: float = 0.28
    """score against chance above which a classifier is called backdoored: what `calibrate` gives for clean small classifiers of three
    families, five each, at a nominal false-alarm rate of 5 % (.274); for others it has to be fitted again"""


class Balanced(nn.Module):
    """A classifier as if every class had been equally common in training (logit adjustment, Menon et al. 2021, section 4.1).

    Args:
        counts: training images of each class, above 0: [classes]
    """

    def __init__(self, network: nn.Module, counts: npt.NDArray[np.int64]) -> None:
        super().__init__()
        self.network = network
        self.shift: Tensor
        self.register_buffer("shift", torch.from_numpy(np.log(counts / counts.sum()).astype(np.float32)).to(DEVICE))

    def forward(self, images: Tensor) -> Tensor:
        """float32 [n, C, H, W] -> logits [n, classes]"""
        logits: Tensor = logits_of(self.network(images)) - self.shift
        return logits


def audit(
    network: nn.Module,
    images: Images,
    classes: int,
    settings: AuditSettings | None = None,
    counts: npt.NDArray[np.int64] | None = None,
) -> Evidence:
    """Look for a backdoor in a classifier. It is not changed.

    Args:
        network: images float32 [n, C, H, W] in [0, 1] -> logits [n, classes], or a tuple that begins with them
        images: clean and labelled; ``settings.samples`` of them are used at a time, half to find noise and mask, half to judge
        counts: training images of each class, int [classes], where they are known: a classifier of unbalanced data fails towards its
            commonest class, as a backdoored one does towards its target, unless its logits are evened out first

    Raises:
        NoisecError: counts, images or network cannot be audited (`noisec.builders.audit.checks`), or its logits overflow.
    """
    settings = settings or AuditSettings()
    started = time.perf_counter()
    check(network, images, classes)
    copied = frozen(network if counts is None else Balanced(network, checked_counts(counts, classes)))
    rounds = []
    with bar("auditing", settings.repeats) as shown:
        for number in range(settings.repeats):
            rounds.append(_round(copied, images, settings, settings.seed + number))
            shown.advance()
    pixels, truth = tensors(balanced_halves(images, settings.samples, settings.seed)[0])
    reached = largest_margins(copied, pixels, classes, settings.starts, settings.ascents, settings.seed) if settings.starts else ()
    few = slice(settings.shared)
    sizes = universal_sizes(copied, pixels[few], truth[few], classes, settings.growth, settings.shifts) if settings.shared else ()
    noisy = torch.stack([label_shares(logits, classes) for logits, _, _ in rounds]).mean(0)
    quiet = torch.stack([label_shares(logits, classes) for _, logits, _ in rounds]).mean(0)
    above = excess(noisy.tolist())
    score = max(above)
    return Evidence(
        method="ban",
        backdoored=not score <= settings.threshold,
        score=score,
        threshold=settings.threshold,
        target=above.index(score),
        top_class_share=float(noisy.max()),
        share_without_noise=float(quiet.max()),
        histogram=tuple(noisy.tolist()),
        loss=sum(nn.functional.cross_entropy(logits, labels).item() for logits, _, labels in rounds) / len(rounds),
        seconds=time.perf_counter() - started,
        margins=tuple(map(float, reached)),
        sizes=tuple(map(float, sizes)),
    )


def checked_counts(counts: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.int64]:
    """The training images of each class.

    Raises:
        NoisecError: there is not one number above 0 for each class.
    """
    if counts.shape != (classes,) or not (counts > 0).all():
        raise NoisecError(f"audit: counts are {counts.tolist()}; give the number of training images, above 0, of each of {classes} classes")
    return counts


def _round(network: nn.Module, images: Images, settings: AuditSettings, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, classes] of held-out images with noise and without, and their labels [n]."""
    found, judged = balanced_halves(images, settings.samples, seed)
    (finding, truth), (held_out, labels) = tensors(found), tensors(judged)
    if settings.features == "complement":
        split = SplitNetwork(network, finding)
        rest = 1 - feature_mask(split, finding, truth, settings.mask_weight, settings.mask_epochs, seed)
        answer = partial(split.masked, mask=rest)
    else:
        answer = partial(replaced_logits, network)
    with batch_statistics(network), torch.no_grad():
        with torch.enable_grad():
            noise = adversarial_noise(network, finding, truth, settings.eps, settings.steps, seed)
        noisy, quiet = (
            torch.cat([answer(chunk, replacing=perturbed(network, used)) for chunk in pieces(held_out, CHUNK)]) for used in (noise, {})
        )
    return noisy, quiet, labels


def label_shares(logits: Tensor, classes: int) -> Tensor:
    """Share of the rows [n, classes] that gets each label: float32 [classes] on the CPU."""
    return torch.bincount(logits.argmax(1).cpu(), minlength=classes).float() / len(logits)


def balanced_halves(images: Images, samples: int, seed: int) -> tuple[Images, Images]:
    """Two disjoint random halves of at most ``samples`` images, the classes as even as the images allow.

    A set in which one class prevails would let a clean classifier look collapsed.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(images))
    labels = images.labels[order]
    turn = np.empty(len(order), dtype=np.int64)
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    rows = order[np.argsort(turn, kind="stable")][:samples]  # every class's first image, then every class's second, ...
    halves = [np.concatenate([mine[start::2] for mine in _by_class(rows, images)]) for start in (0, 1)]
    found, judged = (generator.permutation(half) for half in halves)  # every batch sees all classes
    return images[found], images[judged]


def _by_class(rows: npt.NDArray[np.intp], images: Images) -> list[npt.NDArray[np.intp]]:
    """The rows of each class; odd classes begin with their second image, so that odd counts even out between the halves."""
    labels = images.labels[rows]
    return [np.roll(rows[labels == label], index % 2) for index, label in enumerate(np.unique(labels))]


def calibrate(scores: Sequence[float], false_alarm: float, lowest: float = 0.0) -> float:
    """The threshold at which at most a share ``false_alarm`` of clean classifiers of one family is called backdoored.

    With n scores of clean classifiers, n >= 1 / false_alarm - 1, it is the conformal quantile, the ceil((n + 1) (1 - false_alarm))-th
    smallest: a further clean classifier, exchangeable with these, lies above it with probability at most ``false_alarm``, whatever the
    distribution. With fewer there is no such quantile; it is then the prediction bound of a normal distribution fitted to the log odds
    of the scores between their bounds (Student's t), at least `MARGIN` above the largest score: an assumption, not a guarantee.

    Args:
        scores: `Evidence.score` of clean classifiers that were trained and audited alike, each in [``lowest``, 1]
        lowest: 0 for shares under neuron noise alone, else -1

    Raises:
        NoisecError: fewer than three scores, scores out of their bounds, or a rate outside (0, 1).
    """
    values = np.sort(np.asarray(scores, dtype=np.float64))
    if not 0 < false_alarm < 1:
        raise NoisecError(f"calibrate: false_alarm is {false_alarm}; expected a rate between 0 and 1, such as 0.05")
    if len(values) < 3 or not ((values >= lowest) & (values <= 1)).all():
        raise NoisecError(f"calibrate: {len(values)} scores; expected those of at least 3 clean classifiers, each in [{lowest:g}, 1]")
    rank = math.ceil(round((len(values) + 1) * (1 - false_alarm), 9))
    return float(values[rank - 1]) if rank <= len(values) else _fitted_bound(values, false_alarm, lowest)


def _fitted_bound(scores: npt.NDArray[np.float64], false_alarm: float, lowest: float) -> float:
    from scipy.stats import t  # type: ignore[import-untyped, unused-ignore]

    places = np.clip((scores - lowest) / (1 - lowest), EDGE, 1 - EDGE)
    odds = np.log(places / (1 - places))
    width = t.ppf(1 - false_alarm, len(odds) - 1) * odds.std(ddof=1) * math.sqrt(1 + 1 / len(odds))
    bound = lowest + (1 - lowest) / (1 + math.exp(-(odds.mean() + width)))
    return float(min(max(bound, scores.max() + MARGIN), 1 - EDGE))
