"""The scorer's maths, against other implementations of the same formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.distance import cdist, jensenshannon
from scipy.special import log_softmax, softmax
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture as SklearnMixture
from sklearn.neighbors import KernelDensity as SklearnDensity

from noisec.builders.calibrate import (
    MUTANTS,
    NO_HEAD,
    SURVIVALS,
    fit_class_gaussian,
    fit_density,
    fit_dimension,
    fit_mixture,
    fit_mutation,
    fit_scale,
)
from noisec.builders.scorergraph import scorer_graph, verdict_graph
from noisec.errors import NoisecError
from noisec.python_backend.scorer.detectors import (
    Confidence,
    Dissent,
    Divergence,
    GaussianMixture,
    Head,
    LogitGaussian,
    ReconstructionError,
    View,
)
from noisec.python_backend.scorer.scoring import Detector, Scorer, TailScale, conformal_p_values, conformal_threshold
from noisec.python_backend.scorer.session import open_session


@pytest.fixture
def vectors():
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((8, 8))
    return (generator.standard_normal((2000, 8)) @ mixing + generator.integers(0, 2, (2000, 1)) * 5).astype(np.float32)


def seen(*activations, head=NO_HEAD):
    """Rows as a detector sees them; the head gives the first activations' classes."""
    labels = head.logits(activations[0]).argmax(axis=1) if head is not NO_HEAD else np.zeros(len(activations[0]), np.intp)
    return View(activations, labels, head)


def a_scorer(vectors, alpha=0.05, fusion="fisher"):
    statistics = (fit_mixture(vectors, 1, 0), fit_mixture(vectors + 1, 1, 0))
    scales = tuple(fit_scale(statistic.score(seen(vectors))) for statistic in statistics)
    inputs = {"noise-mixture": ("NOISE_PENULTIMATE",), "delta-mixture": ("IMAGE_PENULTIMATE", "RECONSTRUCTION_PENULTIMATE")}
    detectors = tuple(Detector(name, "mixture", names, statistics, scales) for name, names in inputs.items())
    return Scorer(3, alpha, fusion, np.array([0.1], np.float32), NO_HEAD, detectors, np.sort(vectors[:, 0]))


def some_tensors(vectors, level=0.05):
    names = ("NOISE_PENULTIMATE", "IMAGE_PENULTIMATE", "RECONSTRUCTION_PENULTIMATE")
    column = np.ones((len(vectors), 1), np.float32)
    return {
        **{name: np.roll(vectors, shift, axis=0) for shift, name in enumerate(names)},
        "NOISE_LEVEL": level * column,
        "IN_RANGE": column,
    }


def graph_score(scorer, tensors):
    """What the scorer's graph makes of the same tensors: float32 [n]."""
    (score,) = open_session(scorer_graph(scorer).SerializeToString(), 1).run(None, {name: tensors[name] for name in scorer.inputs})
    return score[:, 0]


def assert_same_in_graph(scorer, tensors):
    np.testing.assert_allclose(graph_score(scorer, tensors), scorer.score(tensors), rtol=1e-3, atol=1e-3)


def test_one_component_is_the_gaussian_of_the_paper(vectors):
    covariance = np.cov(vectors.T)
    factor = np.linalg.cholesky(np.linalg.inv(covariance))
    mixture = GaussianMixture(np.ones(1, np.float32), vectors.mean(axis=0)[None], factor[None].astype(np.float32))
    expected = -multivariate_normal(vectors.mean(axis=0), covariance).logpdf(vectors)
    assert np.allclose(mixture.score(seen(vectors)), expected, rtol=1e-4, atol=1e-3)


def test_a_mixture_scores_like_scikit_learns(vectors):
    fitted = SklearnMixture(3, random_state=0).fit(vectors.astype(np.float64))
    mixture = GaussianMixture(
        fitted.weights_.astype(np.float32), fitted.means_.astype(np.float32), fitted.precisions_cholesky_.astype(np.float32)
    )
    assert np.allclose(mixture.score(seen(vectors)), -fitted.score_samples(vectors), rtol=1e-3, atol=2e-3)


def test_a_fitted_mixture_covers_what_it_was_fitted_on(vectors):
    one, two = fit_mixture(vectors, 1, 0), fit_mixture(vectors, 2, 0)
    assert two.weights.sum() == pytest.approx(1)
    assert two.score(seen(vectors)).mean() < one.score(seen(vectors)).mean() < one.score(seen(vectors + 20)).mean()


@pytest.fixture(params=[False, True], ids=["linear", "rectified"])
def head(request):
    generator = np.random.default_rng(1)
    return Head(generator.standard_normal((8, 3)).astype(np.float32), np.array([0, 0.5, 1], np.float32), np.array(request.param))


def test_the_distance_from_the_predicted_class_is_mahalanobis(vectors, head):
    view = seen(vectors, head=head)
    fitted = fit_class_gaussian(view)
    assert len(set(view.labels)) == 3
    means = np.stack([vectors[view.labels == label].mean(axis=0) for label in range(3)])
    inverse = fitted.factor @ fitted.factor.T
    expected = [(row - means[label]) @ inverse @ (row - means[label]) for row, label in zip(vectors, view.labels, strict=True)]
    assert np.allclose(fitted.score(view), expected, rtol=1e-3)
    moved = fitted.score(View((vectors,), (view.labels + 1) % 3, head))
    assert moved.mean() > 1.1 * np.mean(expected)


def test_the_divergence_is_jensen_and_shannons(vectors, head):
    first, second = vectors[:200], vectors[200:400]
    found = Divergence(np.array(2.0, np.float32)).score(seen(first, second, head=head))
    answers = [softmax(head.logits(part).astype(np.float64) / 2, axis=1) for part in (first, second)]
    assert np.allclose(found, jensenshannon(*answers, axis=1) ** 2, atol=1e-5)
    assert np.abs(Divergence(np.array(1.0, np.float32)).score(seen(first, first, head=head))).max() < 1e-12


def test_the_density_is_that_of_kernels_on_the_predicted_class(vectors, head):
    view = seen(vectors, head=head)
    fitted = fit_density(view, 0)
    width = float(fitted.bandwidth)
    normalise = 8 * np.log(width) + 4 * np.log(2 * np.pi)
    for label in range(3):
        rows = view.labels == label
        exact = SklearnDensity(bandwidth=width).fit(fitted.points[label].astype(np.float64))
        assert np.allclose(fitted.score(view[rows]) + normalise, -exact.score_samples(vectors[rows]), rtol=1e-3, atol=1e-2)


def test_the_local_dimension_follows_its_formula_and_finds_a_plane(vectors):
    fitted = fit_dimension(seen(vectors), 0)
    away = vectors[:50] + np.float32(0.3)
    distances = np.sort(cdist(away, fitted.points), axis=1)[:, :20]
    assert np.allclose(fitted.score(seen(away)), -1 / np.log(distances / distances[:, -1:]).mean(axis=1), rtol=5e-3)
    flat = np.random.default_rng(0).standard_normal((2000, 8)).astype(np.float32) * np.array([1, 1] + [1e-3] * 6, np.float32)
    plane = fit_dimension(seen(flat), 0)
    assert plane.score(seen(flat[:300] + np.float32(1e-4))).mean() < 3 < 5 < fitted.score(seen(away)).mean()


def test_mutants_of_the_head_are_one_product_and_both_sides_count(vectors, head):
    view = seen(vectors, head=head)
    fitted = fit_mutation(view, 0)
    inputs = head.inputs(vectors).astype(np.float64)
    kept = np.zeros(len(vectors))
    for mutant in range(MUTANTS):
        columns = slice(3 * mutant, 3 * mutant + 3)
        probabilities = np.exp(log_softmax(inputs @ fitted.weights[:, columns] + fitted.bias[columns], axis=1))
        kept += probabilities[np.arange(len(vectors)), view.labels] / MUTANTS
    assert np.allclose(1 / (1 + np.exp(fitted.rate(view))), kept, atol=1e-5)
    rates, scores = fitted.rate(view), fitted.score(view)
    middle = scores[np.abs(rates - np.median(rates)).argsort()[:100]].max()
    assert scores[rates.argmin()] > middle
    assert scores[rates.argmax()] > middle


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


@pytest.mark.parametrize("count", [20, 99, 100, 101, 700])
def test_a_graph_judges_as_the_scorer_does(vectors, count):
    """At every score that a calibration image has, between them, past both ends, and where there is none."""
    tensors = some_tensors(vectors[:1500])
    tensors["IN_RANGE"][7], tensors["NOISE_PENULTIMATE"][8] = 0, np.nan
    scores = graph_score(a_scorer(vectors), tensors)
    calibration = np.sort(scores[10 : 10 + 2 * count : 2])
    scorer = replace(a_scorer(vectors), calibration=np.sort(np.append(calibration[1:], calibration[3])))
    session = open_session(verdict_graph(scorer).SerializeToString(), 1)
    found = session.run(None, {name: tensors[name] for name in scorer.inputs})
    expected = scorer.outputs(tensors, score=scores)
    assert len(np.unique(expected["P_VALUE"])) > 0.9 * count
    for output, rows in zip(session.get_outputs(), found, strict=True):
        assert rows.dtype == expected[output.name].dtype
        np.testing.assert_array_equal(rows, expected[output.name])


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
    served = graph_score(scorer, tensors)
    assert scorer.judged(served).is_malicious[4]
    np.testing.assert_allclose(served[rest], before.score[rest], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_rectified_head_hides_no_broken_activation(vectors, value):
    head = Head(np.random.default_rng(1).standard_normal((8, 3)).astype(np.float32), np.zeros(3, np.float32), np.array(True))
    divergence = Divergence(np.array(1.0, np.float32))
    scale = fit_scale(divergence.score(seen(vectors[:1000], vectors[1000:], head=head)))
    inputs = ("IMAGE_PENULTIMATE", "RECONSTRUCTION_PENULTIMATE")
    detector = Detector("delta-divergence", "divergence", inputs, (divergence,), (scale,))
    scorer = Scorer(3, 0.05, "fisher", np.empty(0, np.float32), head, (detector,), np.sort(vectors[:, 0]))
    tensors = some_tensors(vectors[:10])
    tensors["IMAGE_PENULTIMATE"] = tensors["IMAGE_PENULTIMATE"].copy()
    tensors["IMAGE_PENULTIMATE"][4] = value
    verdict = scorer.verdict(tensors)
    assert verdict.is_malicious[4]
    assert np.isnan(verdict.score).tolist() == [row == 4 for row in range(10)]
    assert_same_in_graph(scorer, tensors)


@pytest.mark.parametrize("flag", [0.0, 0.5, np.nan])
def test_what_is_out_of_range_is_malicious(vectors, flag):
    scorer, tensors = a_scorer(vectors), some_tensors(vectors[:10])
    tensors["IN_RANGE"][7] = flag
    verdict = scorer.verdict(tensors)
    assert verdict.is_malicious[7]
    assert np.isnan(verdict.score[7])
    assert_same_in_graph(scorer, tensors)


def test_fusion_adds_surprisals_or_takes_the_largest(vectors):
    middle = vectors.mean(axis=0, keepdims=True)
    tensors = some_tensors(np.concatenate([middle, vectors, middle]))
    scorer = a_scorer(vectors)
    each = scorer.score_each(tensors)
    assert len(each) == 2
    assert (each[0] < 0).any()  # no detector's calm makes up for another's alarm
    assert np.allclose(scorer.score(tensors), np.maximum(each, 0).sum(axis=0))
    assert np.array_equal(a_scorer(vectors, fusion="tippett").score(tensors), each.max(axis=0))
    for fusion in ("fisher", "tippett"):
        assert_same_in_graph(a_scorer(vectors, fusion=fusion), tensors)


def with_confidence(vectors, head):
    """A scorer with one detector more, which stands apart from the others' sum."""
    own, confidence = a_scorer(vectors), Confidence()
    scale = fit_scale(confidence.score(seen(vectors, head=head)))
    apart = Detector("amplified-confidence", "confidence", ("AMPLIFIED_PENULTIMATE",), (confidence,) * 2, (scale,) * 2)
    tensors = {**some_tensors(vectors), "AMPLIFIED_PENULTIMATE": np.roll(vectors, 5, axis=0)}
    return replace(own, head=head, detectors=(*own.detectors, apart), together=fit_scale(own.score(tensors))), tensors


def test_a_detector_that_stands_apart_is_in_no_sum(vectors, head):
    scorer, tensors = with_confidence(vectors, head)
    found, each = scorer.score(tensors), scorer.score_each(tensors)
    sums = scorer.together(np.maximum(each[:2], 0).sum(axis=0))
    assert np.allclose(found, np.maximum(sums, each[2]))
    assert (found > sums).any(), "what it finds alone counts"
    assert (found == sums).any()
    assert_same_in_graph(scorer, tensors)
    scorer.check()
    with pytest.raises(ValueError, match="no scale for the sum"):
        replace(scorer, together=None).check()
    with pytest.raises(ValueError, match="sum does not ascend"):
        replace(scorer, together=TailScale(scorer.together.scores[::-1], scorer.together.surprisals)).check()


@pytest.mark.parametrize("kinds", [("confidence", "dissent"), ("dissent",), ("dissent", "dissent")])
def test_an_independent_detector_is_added_to_all_others_together(vectors, head, kinds):
    scorer, tensors = with_confidence(vectors, head)
    copy = np.roll(vectors, 7, axis=0)
    dissent = Dissent()
    scale = fit_scale(dissent.score(seen(vectors, copy, head=head)))
    added = Detector("hardened-dissent", "dissent", ("IMAGE_PENULTIMATE", "HARDENED_PENULTIMATE"), (dissent,) * 2, (scale,) * 2)
    tensors |= {"IMAGE_PENULTIMATE": vectors, "HARDENED_PENULTIMATE": copy}
    known = {"confidence": scorer.detectors[-1], "dissent": added}
    own = scorer.detectors[:2] if len(set(kinds)) == len(kinds) else ()
    scorer = replace(scorer, detectors=(*own, *(known[kind] for kind in kinds)), together=scorer.together if own else None)
    scorer.check()
    each = scorer.score_each(tensors)
    dissents = np.maximum(each[[len(own) + place for place, kind in enumerate(kinds) if kind == "dissent"]], 0).sum(axis=0)
    others = np.zeros_like(dissents)
    if own:
        others = scorer.together(np.maximum(each[:2], 0).sum(axis=0))
    if "confidence" in kinds:
        others = np.maximum(others, each[2])
    assert np.allclose(scorer.score(tensors), np.maximum(others, 0) + dissents, atol=1e-5)
    assert_same_in_graph(scorer, tensors)
    assert (dissents > 0.5).any()
    assert (dissents == 0).any()
    divergence = replace(
        scorer, detectors=tuple(replace(one, kind="divergence") if one.kind == "dissent" else one for one in scorer.detectors)
    )
    assert np.array_equal(divergence.independent, scorer.independent), "whatever it makes of the copy's answer"


def test_confidence_is_the_mean_logit_of_the_labels_probabilities(vectors, head):
    amplified = np.roll(vectors, 5, axis=0), np.roll(vectors, 6, axis=0)
    labels = head.logits(vectors).argmax(axis=1)
    found = Confidence().score(View(amplified, labels, head))
    probabilities = [softmax(head.logits(one).astype(np.float64), axis=1) for one in amplified]
    wanted = np.arange(3) == labels[:, None]
    odds = [one[wanted] / np.where(wanted, 0, one).sum(axis=1) for one in probabilities]
    assert np.allclose(found, np.mean(np.log(odds), axis=0), rtol=1e-3, atol=1e-3)


def test_dissent_is_how_far_the_copy_prefers_another_label(vectors, head):
    copy = np.roll(vectors, 5, axis=0)
    labels = head.logits(vectors).argmax(axis=1)
    found = Dissent().score(seen(vectors, copy, head=head))
    for row, logits in enumerate(head.logits(copy)[:50]):
        assert found[row] == pytest.approx(np.delete(logits, labels[row]).max() - logits[labels[row]], abs=1e-5)
    agrees = head.logits(copy).argmax(axis=1) == labels
    assert 0 < agrees.sum() < len(agrees)
    assert ((found < 0) == agrees).all()


def test_the_change_in_logits_is_measured_from_the_predicted_class(vectors, head):
    first, second = vectors[:1000], vectors[1000:]
    view = seen(first, second, head=head)
    fitted = fit_class_gaussian(view, LogitGaussian)
    change = head.logits(first) - head.logits(second)
    assert fitted.means.shape == (3, 3)
    centred = change - fitted.means[view.labels]
    expected = np.einsum("nd,de,ne->n", centred, fitted.factor @ fitted.factor.T, centred)
    assert np.allclose(fitted.score(view), expected, rtol=1e-3)


def test_the_reconstruction_error_is_the_noise_level_on_its_scale(vectors):
    levels = np.abs(vectors[:, :1])
    statistic = ReconstructionError()
    scale = fit_scale(statistic.score(seen(levels)))
    detector = Detector("pixels-reconstruction-error", "reconstruction-error", ("NOISE_LEVEL",), (statistic,), (scale,))
    scorer = Scorer(3, 0.05, "fisher", np.empty(0, np.float32), NO_HEAD, (detector,), np.sort(scale(levels[:, 0])))
    assert scorer.inputs == ("NOISE_LEVEL", "IN_RANGE")
    verdict = scorer.verdict({"NOISE_LEVEL": levels, "IN_RANGE": np.ones_like(levels)})
    assert (np.argsort(verdict.score, kind="stable") == np.argsort(levels[:, 0], kind="stable")).all()
    assert 0.04 < verdict.is_malicious.mean() <= 0.05
    assert_same_in_graph(scorer, {"NOISE_LEVEL": levels, "IN_RANGE": np.ones_like(levels)})


def test_each_row_is_scored_by_its_own_noise_level(vectors):
    scorer = a_scorer(vectors)
    quiet, loud = some_tensors(vectors[:10], 0.05), some_tensors(vectors[:10], 0.2)
    loudly = np.arange(10) % 3 == 1
    mixed = {name: np.where(loudly[:, None], loud[name], quiet[name]) for name in quiet}
    assert np.allclose(scorer.score(mixed), np.where(loudly, scorer.score(loud), scorer.score(quiet)), rtol=1e-5)
    assert not np.allclose(scorer.score(quiet), scorer.score(loud))
    assert scorer.score({name: rows[:0] for name, rows in quiet.items()}).shape == (0,), "no attack succeeded"
    assert_same_in_graph(scorer, mixed)


def of_two_levels(first, second, vectors, kind):
    """A scorer with one detector, of F(n), whose statistics differ between two noise levels."""
    scales = tuple(fit_scale(one.score(seen(vectors))) for one in (first, second))
    detector = Detector("one", kind, ("NOISE_PENULTIMATE",), (first, second), scales)
    return replace(a_scorer(vectors), detectors=(detector,))


def of_both_levels(vectors):
    quiet, loud = some_tensors(vectors[:100], 0.05), some_tensors(vectors[100:200], 0.2)
    return {name: np.concatenate([quiet[name], loud[name]]) for name in quiet}


def test_several_components_are_the_same_in_the_graph(vectors):
    scorer = of_two_levels(fit_mixture(vectors, 3, 0), fit_mixture(vectors * 2, 3, 0), vectors, "mixture")
    assert_same_in_graph(scorer, of_both_levels(vectors))


def test_levels_with_other_numbers_of_points_are_the_same_in_the_graph(vectors):
    fewer, more = (fit_dimension(seen(vectors[1000 : 1000 + count]), 0) for count in (30, 50))
    assert len(fewer.points) < len(more.points)
    assert_same_in_graph(of_two_levels(fewer, more, vectors, "dimension"), of_both_levels(vectors))
    tiny = fit_dimension(seen(vectors[1000:1012]), 0)
    with pytest.raises(NoisecError, match="11 neighbours at one noise level and 20 at another"):
        scorer_graph(of_two_levels(tiny, more, vectors, "dimension"))


@pytest.mark.parametrize("apart", [False, True])
def test_an_artefact_is_read_back_as_it_was_written_and_holds_no_pickle(tmp_path, vectors, head, apart):
    scorer, tensors = with_confidence(vectors, head) if apart else (a_scorer(vectors), some_tensors(vectors))
    scorer.save(tmp_path / "scorer.npz")
    loaded = Scorer.load(tmp_path / "scorer.npz")
    assert np.array_equal(loaded.score(tensors), scorer.score(tensors))
    assert (loaded.release, loaded.alpha, loaded.inputs, loaded.threshold) == (3, 0.05, scorer.inputs, scorer.threshold)
    with np.load(tmp_path / "scorer.npz", allow_pickle=False) as archive:
        assert all(archive[name].dtype != object for name in archive.files)
