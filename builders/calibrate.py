"""Outputs of the exported stages -> fitted, calibrated scorer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from sklearn.covariance import LedoitWolf
from sklearn.mixture import GaussianMixture as SklearnMixture

from noisec import contract
from noisec.builders.images import Splits, natural
from noisec.builders.spec import DetectorSpec, GuardSpec, MemorySpec
from noisec.builders.stages import StageRunner
from noisec.errors import NoisecError
from noisec.python_backend.scorer.detectors import (
    ClassGaussian,
    Confidence,
    Dissent,
    Divergence,
    Floats,
    GaussianMixture,
    Head,
    HeadMutation,
    KernelDensity,
    LocalDimension,
    LogitGaussian,
    ReconstructionError,
    Statistic,
    View,
    squared_distances,
)
from noisec.python_backend.scorer.memory import Repeats
from noisec.python_backend.scorer.scoring import Detector, Scorer, TailScale, summed

SCALE_SHARE = 0.25
"""share of the fit images that set the detectors' scales instead of their statistics"""
SURVIVALS = np.array([0.99, 0.9, 0.75, 0.5, 0.25, 0.1, 0.02])
"""shares of clean images above each knot of a scale; the last two set the slope of the tail"""
MAX_CONDITION = 1e12
REPEATED = 0.001
"""share of clean images that may be taken for repeats of others"""
POINTS_A_CLASS, POINTS = 100, 600
"""reference points of the density, for each class, and of the local dimension"""
NEIGHBOURS = 20
BANDWIDTHS = np.array([0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5])
"""tried for the density, in units of the median distance to the nearest clean neighbour"""
MUTANTS, MUTATION = 100, 0.35
"""mutants of the last layer, and the deviation of their weights in units of its largest one"""
NO_HEAD = Head(np.empty((0, 0), np.float32), np.empty(0, np.float32), np.array(False))


def fit_mixture(vectors: Floats, components: int, seed: int) -> GaussianMixture:
    """A Gaussian mixture with covariances shrunk towards a multiple of the identity (Ledoit and Wolf 2004).

    Args:
        vectors: float32 [n, d]

    Raises:
        NoisecError: too few or constant vectors.
    """
    rows = len(vectors)
    if components == 1:
        members = np.zeros(rows, np.intp)
    else:
        unit = vectors / vectors.std(axis=0).mean()
        members = SklearnMixture(components, reg_covar=1e-3, random_state=seed).fit_predict(unit.astype(np.float64))
    counts = np.bincount(members, minlength=components)
    if counts.min() < 2:
        raise NoisecError(
            f"a mixture of {components} components has one with {counts.min()} of {rows} images; ask for fewer components or more images"
        )
    return GaussianMixture(
        weights=(counts / rows).astype(np.float32),
        means=np.stack([vectors[members == k].mean(axis=0) for k in range(components)]),
        factors=np.stack([whitening(vectors[members == k]) for k in range(components)]),
    )


def whitening(vectors: Floats) -> Floats:
    """Lower triangular factor float32 [d, d] of the inverse of the shrunk covariance of float32 [n, d].

    Raises:
        NoisecError: the covariance is singular for all practical purposes.
    """
    covariance = LedoitWolf().fit(vectors.astype(np.float64)).covariance_
    condition = float(np.linalg.cond(covariance))
    if not condition < MAX_CONDITION:
        raise NoisecError(
            f"a covariance of {vectors.shape[1]} penultimate activations has condition {condition:.1e}, at most {MAX_CONDITION:.0e} "
            "will do: are they constant?"
        )
    factor: Floats = np.linalg.cholesky(np.linalg.inv(covariance)).astype(np.float32)
    return factor


def fit_class_gaussian(view: View, kind: type[ClassGaussian] = ClassGaussian) -> ClassGaussian:
    """A mean for each class, and one covariance around them."""
    vectors, labels = kind.vectors(view), view.labels
    means = np.stack([class_rows(vectors, labels, label).mean(axis=0) for label in range(len(view.head.bias))])
    return kind(means, whitening(vectors - means[labels]))


def class_rows(vectors: Floats, labels: npt.NDArray[np.intp], label: int) -> Floats:
    """The vectors of one predicted class; all of them where it was never predicted."""
    rows = labels == label
    return vectors[rows] if rows.any() else vectors


def fit_density(view: View, seed: int) -> KernelDensity:
    """Reference points of each class, and the bandwidth under which other clean rows are likeliest."""
    generator = np.random.default_rng(seed)
    held = np.arange(len(view.labels)) % 4 == 0
    known = view[~held]
    chosen = [generator.choice(class_rows(known.vectors, known.labels, label), POINTS_A_CLASS) for label in range(len(view.head.bias))]
    points = np.stack(chosen).astype(np.float32)
    flat = points.reshape(-1, points.shape[2])
    nearest = np.sqrt(np.median(np.sort(squared_distances(view[held].vectors, flat), axis=1)[:, 0]))
    dimensions = points.shape[2]
    tried = [KernelDensity(points, np.array(width * nearest, np.float32)) for width in BANDWIDTHS]
    surprise = [one.score(view[held]).mean() + dimensions * np.log(float(one.bandwidth)) for one in tried]
    return tried[int(np.argmin(surprise))]


def fit_dimension(view: View, seed: int) -> LocalDimension:
    """Reference points among all classes."""
    points = np.random.default_rng(seed).choice(view.vectors, min(POINTS, len(view.labels)), replace=False)
    return LocalDimension(points.astype(np.float32), np.array(min(NEIGHBOURS, len(points) - 1)))


def fit_mutation(view: View, seed: int) -> HeadMutation:
    """Mutants ``W + N(0, (MUTATION max |W|)^2)`` of the last layer's weights, and how clean rows usually fare among them."""
    generator = np.random.default_rng(seed)
    weights = view.head.weights
    noise = generator.standard_normal((weights.shape[0], MUTANTS, weights.shape[1]))
    mutants = weights[:, None] + MUTATION * np.abs(weights).max() * noise
    bias = np.tile(view.head.bias, MUTANTS)
    flat = mutants.reshape(len(weights), -1).astype(np.float32)
    rates = HeadMutation(flat, bias, np.zeros((), np.float32), np.ones(2, np.float32)).rate(view)
    low, centre, high = np.quantile(rates, [0.05, 0.5, 0.95]).astype(np.float32)
    return HeadMutation(flat, bias, centre, np.maximum([centre - low, high - centre], np.float32(1e-6)).astype(np.float32))


def fit_statistic(spec: DetectorSpec, view: View, seed: int) -> Statistic:
    """The statistic of one detector at one noise level, on clean rows of that level."""
    fits: dict[str, Callable[[], Statistic]] = {
        "mixture": lambda: fit_mixture(view.vectors, spec.components, seed),
        "class-gaussian": lambda: fit_class_gaussian(view),
        "logit-gaussian": lambda: fit_class_gaussian(view, LogitGaussian),
        "divergence": lambda: Divergence(np.array(spec.temperature, np.float32)),
        "density": lambda: fit_density(view, seed),
        "dimension": lambda: fit_dimension(view, seed),
        "mutation": lambda: fit_mutation(view, seed),
        "reconstruction-error": ReconstructionError,
        "confidence": Confidence,
        "dissent": Dissent,
    }
    return fits[spec.kind]()


def fit_scale(raw: Floats) -> TailScale:
    """Knots at quantiles of clean raw scores, float32 [n].

    Raises:
        NoisecError: the scores do not vary.
    """
    knots = np.quantile(raw.astype(np.float64), 1 - SURVIVALS).astype(np.float32)
    if not (np.diff(knots) > 0).all():
        raise NoisecError(f"scores of {len(raw)} clean images do not vary enough to set a scale ({knots}); give more or other images")
    return TailScale(knots, (-np.log(SURVIVALS)).astype(np.float32))


def fit_detector(spec: DetectorSpec, view: View, levels: npt.NDArray[np.intp], count: int, seed: int) -> Detector:
    """Fit one detector's statistics, one for each of ``count`` levels, and their scales, on disjoint parts of the rows.

    Args:
        view: of natural images
        levels: int [n], in [0, count)
    """
    for_scale = sets_scales(len(levels))
    statistics = tuple(fit_statistic(spec, view[~for_scale & (levels == level)], seed) for level in range(count))
    scales = tuple(fit_scale(statistics[level].score(view[for_scale & (levels == level)])) for level in range(count))
    return Detector(spec.name, spec.kind, spec.inputs, statistics, scales)


def sets_scales(count: int) -> npt.NDArray[np.bool_]:
    """Which of the fit images set scales: every fourth, bool [count]."""
    chosen: npt.NDArray[np.bool_] = np.arange(count) % round(1 / SCALE_SHARE) == 0
    return chosen


def fit_repeats(spec: MemorySpec, fit: View, calibration: View, seed: int) -> Repeats:
    """How near inputs have to be for one to repeat the others.

    Each calibration image meets a memory that is full of fit images of its own predicted class, as if nothing else had been sent for a
    while: the radius is that within which a share `REPEATED` of them, or one where they are fewer than its inverse, has enough neighbours.
    Few fit images of a class make it small, and the memory blind to all but the nearest repeats.

    Args:
        fit: of natural images, the view ``image``
        calibration: of others

    Raises:
        NoisecError: the images repeat each other.
    """
    centre = fit.vectors.mean(axis=0)
    generator = np.random.default_rng(seed)
    nearest = []
    for label in np.unique(calibration.labels):
        known = class_rows(fit.vectors, fit.labels, label) - centre
        known = known[generator.permutation(len(known))[: spec.size]]
        rank = max(1, round(spec.neighbours * len(known) / spec.size))  # a memory that they do not fill has fewer neighbours
        distances = squared_distances(calibration.vectors[calibration.labels == label] - centre, known)
        nearest.append(np.partition(distances, rank - 1, axis=1)[:, rank - 1])
    radii = np.sqrt(np.sort(np.concatenate(nearest)))
    radius = radii[max(0, int(REPEATED * (1 + len(radii))) - 1)]
    if not radius > 0:
        raise NoisecError("memory: clean images repeat each other, they are the same to the classifier; leave [memory] out")
    return Repeats(centre, radius, np.array(spec.neighbours), np.array(spec.size))


def fit_scorer(spec: GuardSpec, run: StageRunner, splits: Splits, head: Head = NO_HEAD) -> Scorer:
    """Fit the detectors on the fit images and calibrate the threshold on the calibration images, both with natural noise.

    The activations are those of the exported stages that will serve, never the training framework's own.
    """
    fit = run(natural(splits.fit, spec.natural_noise_sd, spec.seed), len(splits.fit), "fitting detectors")
    calibration = run(natural(splits.calibrate, spec.natural_noise_sd, spec.seed + 1), len(splits.calibrate), "calibrating threshold")
    return fit_tensors(spec, fit, calibration, head)


def fit_tensors(spec: GuardSpec, fit: Mapping[str, Floats], calibration: Mapping[str, Floats], head: Head) -> Scorer:
    """The same from what the stages answered: name -> float32 [n, ...].

    Raises:
        NoisecError: the stages answer clean images with what is no number, or there are too few images for a detector.
    """
    for what, tensors in (("fit", fit), ("calibration", calibration)):
        finite = [np.isfinite(rows).reshape(len(rows), -1).all(axis=1) for rows in tensors.values()]
        _refuse_unanswered(what, np.logical_and.reduce(finite))
    level = fit[contract.NOISE_LEVEL][:, 0]
    edges = np.quantile(level, np.arange(1, spec.noise_levels) / spec.noise_levels).astype(np.float32)
    levels = np.searchsorted(edges, level, side="right")
    labels = fit[contract.LOGITS].argmax(axis=1)
    detectors = tuple(
        fit_detector(one, View(tuple(fit[name] for name in one.inputs), labels, head), levels, spec.noise_levels, spec.seed)
        for one in spec.detectors
    )
    repeats = fit_repeats(spec.memory, image_view(fit, head), image_view(calibration, head), spec.seed) if spec.memory else None
    scorer = Scorer(spec.release, spec.target_fpr, spec.fusion, edges, head, detectors, np.empty(0, np.float32), repeats=repeats)
    if scorer.needs_together:
        sums = summed(scorer.score_each(fit)[scorer.in_sum][:, sets_scales(len(levels))])
        scorer = replace(scorer, together=fit_scale(sums))
    scores = scorer.score(calibration)
    _refuse_unanswered("calibration", np.isfinite(scores))
    return replace(scorer, calibration=np.sort(scores))


def _refuse_unanswered(what: str, finite: npt.NDArray[np.bool_]) -> None:
    """Refuse images, bool [n], that a threshold would call malicious whatever it is, or that would make it infinite."""
    if not finite.all():
        raise NoisecError(
            f"{np.count_nonzero(~finite)} of {len(finite)} {what} images have activations or scores that are not finite, the first is "
            f"image {np.flatnonzero(~finite)[0]}: the networks overflow on them, as low precisions may; set stage_precision to 'fp32', or "
            "leave such images out"
        )


def image_view(tensors: Mapping[str, Floats], head: Head) -> View:
    """The view ``image`` of what the stages answered."""
    return View((tensors[contract.PASSES["image"]],), tensors[contract.LOGITS].argmax(axis=1), head)
