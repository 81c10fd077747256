"""The scorer's maths, against other implementations of the same formulas."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture as SklearnMixture

from noisec.builders.calibrate import SURVIVALS, fit_mixture, fit_scale
from noisec.errors import NoisecError
from noisec.python_backend.scorer.scoring import Detector, GaussianMixture, Scorer, conformal_p_values, conformal_threshold


@pytest.fixture
def vectors():
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((8, 8))
    return (generator.standard_normal((2000, 8)) @ mixing + generator.integers(0, 2, (2000, 1)) * 5).astype(np.float32)


def a_scorer(vectors, alpha=0.05):
    detectors = tuple(
        Detector(
            name, inputs, (fit_mixture(vectors, 1, 0), fit_mixture(vectors + 1, 1, 0)), (fit_scale(vectors[:, 0]), fit_scale(vectors[:, 1]))
        )
        for name, inputs in {"noise-1": ("NOISE_PENULTIMATE",), "delta-1": ("IMAGE_PENULTIMATE", "RECONSTRUCTION_PENULTIMATE")}.items()
    )
    return Scorer(3, alpha, np.array([0.1], np.float32), detectors, np.sort(vectors[:, 0]))


def some_tensors(vectors, level=0.05):
    names = ("NOISE_PENULTIMATE", "IMAGE_PENULTIMATE", "RECONSTRUCTION_PENULTIMATE")
    column = np.ones((len(vectors), 1), np.float32)
    return {
        **{name: np.roll(vectors, shift, axis=0) for shift, name in enumerate(names)},
        "NOISE_LEVEL": level * column,
        "IN_RANGE": column,
    }


def test_one_component_is_the_gaussian_of_the_paper(vectors):
    covariance = np.cov(vectors.T)
    factor = np.linalg.cholesky(np.linalg.inv(covariance))
    mixture = GaussianMixture(np.ones(1, np.float32), vectors.mean(axis=0)[None], factor[None].astype(np.float32))
    expected = -multivariate_normal(vectors.mean(axis=0), covariance).logpdf(vectors)
    assert np.allclose(mixture.score(vectors), expected, rtol=1e-4, atol=1e-3)


def test_a_mixture_scores_like_scikit_learns(vectors):
    fitted = SklearnMixture(3, random_state=0).fit(vectors.astype(np.float64))
    mixture = GaussianMixture(
        fitted.weights_.astype(np.float32), fitted.means_.astype(np.float32), fitted.precisions_cholesky_.astype(np.float32)
    )
    assert np.allclose(mixture.score(vectors), -fitted.score_samples(vectors), rtol=1e-3, atol=2e-3)


def test_a_fitted_mixture_covers_what_it_was_fitted_on(vectors):
    one, two = fit_mixture(vectors, 1, 0), fit_mixture(vectors, 2, 0)
    assert two.weights.sum() == pytest.approx(1)
    assert two.score(vectors).mean() < one.score(vectors).mean() < one.score(vectors + 20).mean()


def test_a_scale_is_strictly_increasing_and_reads_off_clean_shares():
    raw = np.random.default_rng(0).gamma(2.0, size=20000).astype(np.float32)
    scale = fit_scale(raw)
    grid = np.linspace(-5, 200, 4000, dtype=np.float32)
    assert (np.diff(scale(grid)) > 0).all()
    for survival in SURVIVALS:
        assert np.mean(scale(raw) >= -np.log(survival)) == pytest.approx(survival, abs=0.002)


def test_constant_scores_and_activations_are_refused(vectors):
    with pytest.raises(NoisecError, match="do not vary enough"):
        fit_scale(np.ones(100, np.float32))
    with pytest.raises(NoisecError, match="condition .* constant"):
        fit_mixture(np.ones_like(vectors), 1, 0)
    with pytest.raises(NoisecError, match="a mixture of 2 components has one with"):
        fit_mixture(vectors[:2], 2, 0)


def test_conformal_p_values_count_calibration_scores_at_least_as_high():
    calibration = np.array([1, 2, 2, 3], np.float32)
    scores = np.array([0, 1, 2, 2.5, 3, 4, np.nan, np.inf], np.float32)
    assert np.allclose(conformal_p_values(calibration, scores), np.array([5, 5, 4, 2, 2, 1, 1, 1]) / 5)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("count", [99, 100, 137, 1000])
def test_the_threshold_is_where_the_p_value_reaches_alpha(alpha, count):
    generator = np.random.default_rng(count)
    calibration = np.sort(generator.standard_normal(count).astype(np.float32))
    scores = np.concatenate([generator.standard_normal(5000).astype(np.float32), calibration])
    assert np.array_equal(
        scores > conformal_threshold(calibration, alpha), conformal_p_values(calibration, scores).astype(np.float64) <= alpha
    )


def test_too_few_calibration_scores_are_refused():
    with pytest.raises(ValueError, match="98 calibration scores cannot promise a false-positive rate of 0.01"):
        conformal_threshold(np.arange(98, dtype=np.float32), 0.01)


@pytest.mark.parametrize("spoiled", ["NOISE_PENULTIMATE", "IMAGE_PENULTIMATE", "RECONSTRUCTION_PENULTIMATE"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_a_broken_activation_is_malicious_and_its_neighbours_are_not_touched(vectors, spoiled, value):
    scorer, tensors = a_scorer(vectors), some_tensors(vectors[:10])
    before = scorer.verdict(tensors)
    tensors[spoiled] = tensors[spoiled].copy()
    tensors[spoiled][4, 2] = value
    after = scorer.verdict(tensors)
    rest = np.arange(10) != 4
    assert after.is_malicious[4]
    assert np.array_equal(after.score[rest], before.score[rest])


@pytest.mark.parametrize("flag", [0.0, 0.5, np.nan])
def test_what_is_out_of_range_is_malicious(vectors, flag):
    scorer, tensors = a_scorer(vectors), some_tensors(vectors[:10])
    tensors["IN_RANGE"][7] = flag
    verdict = scorer.verdict(tensors)
    assert verdict.is_malicious[7]
    assert np.isnan(verdict.score[7])


def test_each_row_is_scored_by_its_own_noise_level(vectors):
    scorer = a_scorer(vectors)
    quiet, loud = some_tensors(vectors[:10], 0.05), some_tensors(vectors[:10], 0.2)
    mixed = {name: np.concatenate([quiet[name][:5], loud[name][5:]]) for name in quiet}
    assert np.allclose(scorer.score(mixed), np.concatenate([scorer.score(quiet)[:5], scorer.score(loud)[5:]]), rtol=1e-5)
    assert not np.allclose(scorer.score(quiet), scorer.score(loud))


def test_an_artefact_is_read_back_as_it_was_written_and_holds_no_pickle(tmp_path, vectors):
    scorer, tensors = a_scorer(vectors), some_tensors(vectors)
    scorer.save(tmp_path / "scorer.npz")
    loaded = Scorer.load(tmp_path / "scorer.npz")
    assert np.array_equal(loaded.score(tensors), scorer.score(tensors))
    assert (loaded.release, loaded.alpha, loaded.inputs, loaded.threshold) == (3, 0.05, scorer.inputs, scorer.threshold)
    with np.load(tmp_path / "scorer.npz", allow_pickle=False) as archive:
        assert all(archive[name].dtype != object for name in archive.files)
