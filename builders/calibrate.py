"""Outputs of the exported stages -> fitted, calibrated scorer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.covariance import LedoitWolf
from sklearn.mixture import GaussianMixture as SklearnMixture

from noisec import contract
from noisec.builders.images import BATCH, Splits, natural
from noisec.builders.progress import tracked
from noisec.builders.spec import DetectorSpec, GuardSpec
from noisec.errors import NoisecError
from noisec.python_backend.runtimes.onnxruntime.session import open_session
from noisec.python_backend.scorer.scoring import Detector, Floats, GaussianMixture, Scorer, TailScale

SCALE_SHARE = 0.25
"""share of the fit images that set the detectors' scales instead of their mixtures"""
SURVIVALS = np.array([0.99, 0.9, 0.75, 0.5, 0.25, 0.1, 0.02])
"""shares of clean images above each knot of a scale; the last two set the slope of the tail"""


class StageRunner:
    """Runs the exported network stages in this process, in the ensemble's order.

    Args:
        stages: ``autoencoder`` and ``classifier`` -> folder with the stage's ``model.onnx``
        passes: classifier passes besides the image's
    """

    def __init__(self, stages: Mapping[str, Path], passes: tuple[contract.Pass, ...], threads: int = 0) -> None:
        self._autoencoder = open_session(stages["autoencoder"] / "model.onnx", threads)
        self._classifier = open_session(stages["classifier"] / "model.onnx", threads)
        self._passes = passes

    def __call__(self, batches: Iterable[Floats], count: int, title: str = "running stages") -> dict[str, Floats]:
        """LOGITS and everything that a scorer reads.

        Args:
            batches: float32 [n, C, H, W] each
            count: images in all

        Returns:
            tensor name -> float32 [count, ...]
        """
        results = [self._batch(batch) for batch in tracked(batches, title, -(-count // BATCH))]
        return {name: np.concatenate([result[name] for result in results]) for name in results[0]}

    def _batch(self, images: Floats) -> dict[str, Floats]:
        names = (contract.NOISE, contract.RECONSTRUCTION, contract.NOISE_LEVEL, contract.IN_RANGE)
        outputs = dict(zip(names, self._autoencoder.run(names, {contract.IMAGE: images}), strict=True))
        sources = {"image": images, "noise": outputs[contract.NOISE], "reconstruction": outputs[contract.RECONSTRUCTION]}
        results = {name: outputs[name] for name in (contract.NOISE_LEVEL, contract.IN_RANGE)}
        for one in self._passes:
            logits, results[contract.PASSES[one]] = self._classifier.run(
                [contract.LOGITS, contract.PENULTIMATE], {contract.IMAGE: sources[one]}
            )
            if one == "image":
                results[contract.LOGITS] = logits
        return results


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
