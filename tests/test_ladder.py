"""Attackers who know of the guard: what they promise, and that the guard they attack is the one that serves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import GUARD, REPOSITORY

from noisec import contract, manifest
from noisec.benchmarks.detection import ladder
from noisec.benchmarks.detection.remembering import as_markdown, false_alarms, search
from noisec.benchmarks.detection.subject import Subject
from noisec.benchmarks.detection.torchscore import differentiable, whole
from noisec.builders.attacks import AttackSpec, attack
from noisec.builders.calibrate import fit_repeats, fit_tensors, image_view
from noisec.builders.figures import percent
from noisec.builders.images import Floats, Images, Splits
from noisec.builders.scorergraph import scorer_graph
from noisec.builders.spec import DetectorSpec, GuardSpec, MemorySpec
from noisec.errors import NoisecError
from noisec.python_backend.scorer.detectors import STATISTICS
from noisec.python_backend.scorer.session import open_session

EPS = 0.05
VIEWS = {"mixture": "noise", "class-gaussian": "image", "density": "noise", "dimension": "image", "mutation": "image"}
VIEWS |= {"reconstruction-error": "pixels", "confidence": "amplified", "dissent": "hardened"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def subject(report) -> Subject:
    content = manifest.read_manifest(REPOSITORY, GUARD)
    splits = Splits(report[2000:2128], report[2200:2800], report[2800:3400], report[:300], tuple("0123456789"))
    return Subject(REPOSITORY, GUARD, content["release"], GuardSpec.model_validate(content["spec"]), splits)


@pytest.fixture(scope="module")
def images(subject) -> Images:
    return subject.splits.report[:64]


@pytest.fixture(scope="module")
def threshold(subject) -> float:
    return float(subject.scorer.threshold)


@pytest.fixture(scope="module")
def pgd(subject, images) -> Floats:
    return attack(subject.protected, images, AttackSpec("pgd", EPS), 0).pixels


@pytest.fixture(scope="module")
def adapted(subject, images, threshold) -> Floats:
    return ladder.adaptive(whole(subject), images.floats(), images.labels, EPS, threshold=threshold, steps=12, penalties=(0, 1))


@pytest.fixture(scope="module")
def answers(subject, pgd):
    """What the stages answer to fit images, and to clean and to attacked ones."""
    fit, pixels = noisy(subject.splits.fit.floats(), 0.02), np.concatenate([subject.splits.report[64:128].floats(), noisy(pgd, 0.02)])
    sets = subject.tensors(fit, len(fit)), subject.tensors(pixels, len(pixels))
    for tensors in sets:  # the reference guard asks no copies; other passes are as good for a formula
        others = ("noise", "image", "reconstruction")
        tensors |= {contract.PASSES[one]: tensors[contract.PASSES[other]] for one, other in zip(contract.COPIES, others, strict=True)}
    return sets


def noisy(pixels: Floats, deviation: float) -> Floats:
    noise = np.random.default_rng(0).standard_normal(pixels.shape).astype(np.float32)
    return np.clip(pixels + deviation * noise, 0, 1)


def in_torch(tensors):
    return {name: torch.from_numpy(array) for name, array in tensors.items()}


@pytest.mark.parametrize("kind", STATISTICS)
def test_every_statistic_is_that_of_the_scorer(subject, answers, kind):
    fit, tensors = answers
    spec = subject.spec.model_copy(
        update={"detectors": (DetectorSpec(kind=kind, view=VIEWS.get(kind, "delta")),), "noise_levels": 2, "target_fpr": 0.05}
    )
    scorer = fit_tensors(spec, fit, fit, subject.head)
    expected = scorer.score(tensors)
    assert expected.std() > 0.1
    np.testing.assert_allclose(differentiable(scorer)(in_torch(tensors)).numpy(), expected, rtol=1e-3, atol=1e-3)
    (served,) = open_session(scorer_graph(scorer).SerializeToString(), 1).run(None, {name: tensors[name] for name in scorer.inputs})
    np.testing.assert_allclose(served[:, 0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fusion", ["fisher", "tippett"])
def test_the_torch_guard_answers_what_the_stages_answer(subject, images, pgd, fusion):
    scorer = replace(subject.scorer, fusion=fusion)
    pixels = np.concatenate([images.floats(), noisy(images.floats(), 0.05), pgd])
    tensors = subject.tensors(pixels, len(pixels))
    assert len(np.unique(np.searchsorted(scorer.edges, tensors[contract.NOISE_LEVEL][:, 0]))) > 1
    expected = scorer.score(tensors)
    np.testing.assert_allclose(differentiable(scorer)(in_torch(tensors)).numpy(), expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        logits, score = whole(replace(subject))(torch.from_numpy(pixels))
    np.testing.assert_allclose(logits.numpy(), tensors[contract.LOGITS], rtol=1e-3, atol=1e-3)
    if fusion == scorer.fusion == subject.scorer.fusion:
        np.testing.assert_allclose(score.numpy(), expected, rtol=1e-3, atol=1e-3)


def test_an_unknown_kind_is_named(subject):
    detector = replace(subject.scorer.detectors[0], kind="oracle")
    with pytest.raises(NoisecError, match="'oracle'"):
        differentiable(replace(subject.scorer, detectors=(detector,)))


def test_pixels_out_of_range_have_no_score(subject, pixels):
    with torch.no_grad():
        _, score = whole(subject)(torch.from_numpy(pixels[:2] + np.float32([0, 0.5])[:, None, None, None]))
    assert torch.isfinite(score[0])
    assert torch.isnan(score[1])


def test_gradients_are_finite_and_point_uphill(subject, images):
    guard = whole(subject)
    # A clean image lies on the scales' flat side of 0 here and there; a noisy one does not.
    pixels = torch.from_numpy(noisy(images.floats(), 0.08)).requires_grad_()
    _, before = guard(pixels)
    (slope,) = torch.autograd.grad(before.sum(), pixels)
    assert torch.isfinite(slope).all()
    assert (slope.flatten(1).abs().amax(dim=1) > 0).all()
    with torch.no_grad():
        _, after = guard((pixels - 2e-3 * slope.sign()).clamp(0, 1))
    assert (after < before).float().mean() > 0.9


def test_adaptive_stays_within_its_bounds(images, adapted):
    assert adapted.dtype == np.float32
    assert np.abs(adapted - images.floats()).max() <= EPS + 1e-6
    assert adapted.min() >= 0
    assert adapted.max() <= 1
    assert (np.abs(adapted - images.floats()).reshape(len(images), -1).max(axis=1) > EPS / 2).all()


def test_adaptive_beats_an_attacker_who_ignores_the_guard(subject, images, pgd, adapted):
    (blind, unseen), (knowing, missed) = (wrong_and_missed(subject, pixels, images.labels) for pixels in (pgd, adapted))
    assert blind > 0.7
    assert unseen <= blind
    assert missed <= knowing
    assert missed > unseen + 0.1


def wrong_and_missed(subject, pixels, labels):
    """Shares of images that are mislabelled, and mislabelled without an alarm."""
    logits, _, flagged = ladder.ask(subject, None, pixels)
    wrong = logits.argmax(axis=1) != labels
    return wrong.mean(), (wrong & ~flagged).mean()


def test_adaptive_keeps_the_least_suspicious_mislabelled_step():
    """A guard of one pixel: the label turns at 0.5, the alarm goes off from 0.7 on."""

    def guard(pixels):
        value = pixels[:, 0, 0, 0]
        return torch.stack([0.5 - value, value - 0.5], dim=1), 10 * value

    clean = np.float32([0.4, 0.1]).reshape(2, 1, 1, 1)
    found = ladder.adaptive(guard, clean, np.zeros(2, np.int64), 0.35, threshold=7, steps=20, penalties=(0, 1), safety=1).ravel()
    assert 0.5 < found[0] <= 0.6
    assert found[1] <= 0.45 + 1e-6


def test_samples_average_a_guard_that_draws_at_random():
    asked = 0

    def guard(pixels):
        nonlocal asked
        asked += 1
        value = pixels[:, 0, 0, 0] * (1 if asked % 2 else -3)
        return torch.stack([value, -value], dim=1), torch.zeros_like(value)

    clean = np.full((1, 1, 1, 1), 0.5, np.float32)
    # On average the first logit falls as the pixel rises; one draw alone would say the contrary.
    rising = ladder.adaptive(guard, clean, np.ones(1, np.int64), 0.2, threshold=1, steps=20, penalties=(0,), samples=2)
    assert asked == 42
    assert rising.item() == pytest.approx(0.3, abs=1e-6)


class Counting:
    """The guard, and what it was asked."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.rounds = subject, []

    def __call__(self, pixels: Floats):
        self.rounds.append(len(pixels))
        return ladder.ask(self.subject, None, pixels)


@pytest.mark.parametrize("with_score", [True, False])
def test_queries_stay_within_the_budget_and_claims_are_the_guards(subject, images, threshold, with_score):
    ask, chosen = Counting(subject), images[:32]
    found = ladder.query(ask, chosen.floats(), chosen.labels, 0.1, queries=40, with_score=with_score, threshold=threshold)
    assert found.used.sum() == sum(ask.rounds)
    assert found.used.max() <= 40
    assert (found.used[~found.reached] == 40).all()
    logits, _, flagged = ladder.ask(subject, None, found.pixels)
    np.testing.assert_array_equal((logits.argmax(axis=1) != chosen.labels) & ~flagged, found.reached)
    assert np.abs(found.pixels - chosen.floats()).max() <= 0.1 + 1e-6
    assert found.pixels.min() >= 0
    assert found.pixels.max() <= 1


def test_a_guard_that_remembers_its_questions_ends_the_search(subject, images):
    chosen, remembering = images[:32], replace(subject)
    clean = subject.tensors(subject.splits.fit.floats(), len(subject.splits.fit))
    first, last = ({name: rows[half] for name, rows in clean.items()} for half in (slice(300), slice(300, None)))
    memory = MemorySpec(size=600, neighbours=6)
    repeats = fit_repeats(memory, image_view(first, subject.head), image_view(last, subject.head), 0)
    remembering.__dict__["scorer"] = replace(subject.scorer, repeats=repeats)
    natural = clean[contract.PASSES["image"]]
    free, watched, crowded = (search(remembering, chosen, 0.1, 120, 0, *others) for others in ((None, 0), (natural, 0), (natural, 600)))
    assert free.reached > 0.2
    assert watched.reached < free.reached
    assert crowded.reached == free.reached  # whatever was asked is forgotten before it is asked again
    assert free.later == free.reached
    page = as_markdown([free, watched, crowded], {"32 clean images": 0.03125}, memory, GUARD, 0.1, 32, 120)
    assert f"| yes | 31 | {percent(watched.reached)} | {percent(watched.later)} |" in page
    assert "32 clean images: 3.12 %" in page
    assert false_alarms(remembering, natural) < 0.05
    assert false_alarms(remembering, natural[:1] + np.linspace(0, 0.5, 40, dtype=np.float32)[:, None]) > 0.5


def a_guard_of_two_halves(pixels):
    """The label turns where the image is bright on the whole, the alarm goes off where its left half is."""
    mean, score = pixels.mean(axis=(1, 2, 3)), 20 * pixels[..., :4].mean(axis=(1, 2, 3))
    return np.stack([0.5 - mean, mean - 0.5], axis=1), score, score > 10


@pytest.mark.parametrize("with_score", [True, False])
def test_a_longer_search_reaches_more(with_score):
    clean, labels = np.full((100, 1, 8, 8), 0.45, np.float32), np.zeros(100, np.int64)
    short, long = (
        ladder.query(a_guard_of_two_halves, clean, labels, 0.2, queries=queries, with_score=with_score, threshold=10)
        for queries in (3, 200)
    )
    assert short.reached.mean() < 0.3
    assert long.reached.mean() > 0.9
    pixels = long.pixels[long.reached]
    assert (pixels.mean(axis=(1, 2, 3)) > 0.5).all()
    assert (pixels[..., :4].mean(axis=(1, 2, 3)) <= 0.5).all()


def test_a_score_that_is_no_number_never_counts(images):
    def broken(pixels):
        return (
            np.eye(10, dtype=np.float32)[np.full(len(pixels), 3)],
            np.full(len(pixels), np.nan, np.float32),
            np.ones(len(pixels), np.bool_),
        )

    found = ladder.query(broken, images[:8].floats(), np.zeros(8, np.int64), 0.1, queries=5, with_score=True, threshold=1.0)
    assert not found.reached.any()


def test_gray_box_trains_a_guard_of_its_own_once(subject, images, threshold, tmp_path):
    surrogate = ladder.gray_box(subject, tmp_path, seed=1, epochs=1)
    made = sorted(path.name for path in tmp_path.iterdir())
    again, repeated = ladder.gray_box(subject, tmp_path, seed=1, epochs=1)
    assert repeated == surrogate.threshold
    assert sorted(path.name for path in tmp_path.iterdir()) == made
    pixels = torch.from_numpy(images.floats())
    with torch.no_grad():
        (logits, score), (real_logits, real_score) = again(pixels), whole(subject)(pixels)
    torch.testing.assert_close(logits, real_logits)
    assert (score <= surrogate.threshold).float().mean() > 0.9
    assert not torch.allclose(score, real_score, rtol=0.1)


def test_an_attackers_halves_are_disjoint_and_complete(subject):
    first, second = ladder.random_half(subject.splits.calibrate, 3)
    assert abs(len(first) - len(second)) <= 1
    assert sorted([*first.rows, *second.rows]) == sorted(subject.splits.calibrate.rows)
