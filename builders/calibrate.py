"""Outputs of the exported stages -> fitted, calibrated scorer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from sklearn.covariance import LedoitWolf
from sklearn.mixture import GaussianMixture as SklearnMixture

from noisec import contract
from noisec.builders.images import Splits, natural
from noisec.builders.spec import DetectorSpec, GuardSpec
from noisec.builders.stages import StageRunner
from noisec.errors import NoisecError
from noisec.python_backend.scorer.scoring import Detector, Floats, GaussianMixture, Scorer, TailScale

SCALE_SHARE = 0.25
"""share of the fit images that set the detectors' scales instead of their mixtures"""
SURVIVALS = np.array([0.99, 0.9, 0.75, 0.5, 0.25, 0.1, 0.02])
"""shares of clean images above each knot of a scale; the last two set the slope of the tail"""


def fit_mixture(vectors: Floats, components: int, seed: int) -> GaussianMixture:
    """A Gaussian mixture with covariances shrunk towards a multiple of the identity (Ledoit and Wolf 2004).

    Args:
        vectors: float32 [n, d]

    Raises:
        NoisecError: too few or constant vectors.
    """
    rows, width = vectors.shape
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
    covariances = [LedoitWolf().fit(vectors[members == k].astype(np.float64)).covariance_ for k in range(components)]
    conditions = [float(np.linalg.cond(covariance)) for covariance in covariances]
    if not max(conditions) < 1e12:
        raise NoisecError(
            f"a covariance of {width} penultimate activations has condition {max(conditions):.1e}, at most 1e12 will do: are they constant?"
        )
    return GaussianMixture(
        weights=(counts / rows).astype(np.float32),
        means=np.stack([vectors[members == k].mean(axis=0) for k in range(components)]),
        factors=np.stack([np.linalg.cholesky(np.linalg.inv(covariance)) for covariance in covariances]).astype(np.float32),
    )


def fit_scale(raw: Floats) -> TailScale:
    """Knots at quantiles of clean raw scores, float32 [n].

    Raises:
        NoisecError: the scores do not vary.
    """
    knots = np.quantile(raw.astype(np.float64), 1 - SURVIVALS).astype(np.float32)
    if not (np.diff(knots) > 0).all():
        raise NoisecError(f"scores of {len(raw)} clean images do not vary enough to set a scale ({knots}); give more or other images")
    return TailScale(knots, (-np.log(SURVIVALS)).astype(np.float32))


def fit_detector(spec: DetectorSpec, tensors: Mapping[str, Floats], levels: npt.NDArray[np.intp], count: int, seed: int) -> Detector:
    """Fit one detector's mixtures, one for each of ``count`` levels, and their scales, on disjoint parts of the rows.

    Args:
        tensors: name -> float32 [n, d], of natural images
        levels: int [n], in [0, count)
    """
    inputs = tuple(contract.PASSES[name] for name in contract.VIEWS[spec.view])
    vectors = Detector(spec.name, inputs, (), ()).view(tensors)
    for_scale = np.arange(len(vectors)) % round(1 / SCALE_SHARE) == 0
    mixtures = tuple(fit_mixture(vectors[~for_scale & (levels == level)], spec.components, seed) for level in range(count))
    scales = tuple(fit_scale(mixtures[level].score(vectors[for_scale & (levels == level)])) for level in range(count))
    return Detector(spec.name, inputs, mixtures, scales)


def fit_scorer(spec: GuardSpec, run: StageRunner, splits: Splits) -> Scorer:
    """Fit the detectors on the fit images and calibrate the threshold on the calibration images, both with natural noise.

    The activations are those of the exported stages that will serve, never the training framework's own.
    """
    fit = run(natural(splits.fit, spec.natural_noise_sd, spec.seed), len(splits.fit), "fitting detectors")
    level = fit[contract.NOISE_LEVEL][:, 0]
    edges = np.quantile(level, np.arange(1, spec.noise_levels) / spec.noise_levels).astype(np.float32)
    levels = np.searchsorted(edges, level, side="right")
    detectors = tuple(fit_detector(detector, fit, levels, spec.noise_levels, spec.seed) for detector in spec.detectors)
    scorer = Scorer(spec.release, spec.target_fpr, edges, detectors, np.empty(0, np.float32))
    calibration = run(natural(splits.calibrate, spec.natural_noise_sd, spec.seed + 1), len(splits.calibrate), "calibrating threshold")
    return Scorer(spec.release, spec.target_fpr, edges, detectors, np.sort(scorer.score(calibration)))
