"""Published detectors, each with the property that its paper claims."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from scipy.spatial.distance import jensenshannon
from torch import nn

from noisec.benchmarks.detection.baselines import (
    Artifacts,
    IbdPsc,
    MagNet,
    Manda,
    ScaleUp,
    Strip,
    Transitions,
    divergence_alone,
    layers_of,
    reconstruction_error_alone,
)
from noisec.benchmarks.detection.baselines.artifacts import (
    ClassDensities,
    bayesian,
    choose_bandwidth,
    dropout_variance,
    matched_noise,
)
from noisec.benchmarks.detection.baselines.backdoor import amplified, entropy, normalisations
from noisec.benchmarks.detection.baselines.base import in_arrays
from noisec.benchmarks.detection.baselines.magnet import jensen_shannon
from noisec.benchmarks.detection.baselines.manda import Manifold, disagreement, dispersion
from noisec.builders.figures import auroc
from noisec.builders.images import Floats, Images
from noisec.builders.networks import ConvClassifier
from noisec.builders.protect import LogitsOnly
from noisec.builders.spec import BackdoorSpec
from noisec.builders.train import poison, stamp
from noisec.errors import NoisecError

TARGET = 7
ATTACKED = 150
SUPERVISED = ("Artifacts", "MANDA")
UNSUPERVISED = ("MagNet", "error", "divergence", "transitions", "STRIP", "IBD-PSC", "SCALE-UP")


@dataclass(frozen=True)
class Bench:
    """A small backdoored classifier, trained for a few steps, and images that it has not seen."""

    network: nn.Module
    fit: Images
    attacked_fit: Floats
    clean: Floats
    attacked: Floats
    triggered: Floats

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.network.network(images)[1]

    def layers(self, images: Floats) -> list[Floats]:
        seen: list[Floats] = []
        convolutions = [layer for layer in self.network.modules() if isinstance(layer, nn.Conv2d)]
        hooks = [
            layer.register_forward_hook(lambda _, inputs, output: seen.append(output.mean(dim=(2, 3)).numpy())) for layer in convolutions
        ]
        in_arrays(self.network)(images)
        for hook in hooks:
            hook.remove()
        return seen

    def fitted(self, name: str):
        predict = in_arrays(self.network)
        if name in SUPERVISED:
            detector = Artifacts(self.network, self.features, passes=5) if name == "Artifacts" else Manda(self.features)
            detector.fit(self.fit, predict, self.attacked_fit)
            return detector
        blur = nn.AvgPool2d(3, 1, 1)
        detector = {
            "MagNet": lambda: MagNet(blur),
            "error": lambda: reconstruction_error_alone(blur),
            "divergence": lambda: divergence_alone(blur),
            "STRIP": lambda: Strip(count=8),
            "IBD-PSC": lambda: IbdPsc(self.network),
            "SCALE-UP": ScaleUp,
            "transitions": lambda: Transitions(self.layers),
        }[name]()
        detector.fit(self.fit, predict)
        return detector


def fgsm(network: nn.Module, images: Images, eps: float) -> Floats:
    pixels = torch.from_numpy(images.floats()).requires_grad_()
    nn.functional.cross_entropy(network(pixels), torch.from_numpy(images.labels)).backward()
    return (pixels.detach() + eps * pixels.grad.sign()).clamp(0, 1).numpy()


def train(images: Images, steps: int) -> nn.Module:
    torch.manual_seed(0)
    network = ConvClassifier((1, 28, 28), 10, (8, 16, 16), (32,), layers=2, dropout=0.1)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2)
    pixels, labels = torch.from_numpy(images.floats()), torch.from_numpy(images.labels)
    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(pixels[rows])[0], labels[rows]).backward()
        optimiser.step()
    return LogitsOnly(network).eval()


@pytest.fixture(scope="module")
def bench(report) -> Bench:
    network = train(poison(report[:3000], BackdoorSpec(target=TARGET, share=0.1), seed=0), 100)
    fit, test = report[3000:3600], report[3600:3850]
    return Bench(
        network,
        fit,
        fgsm(network, fit[-ATTACKED:], 0.1),
        test.floats(),
        fgsm(network, test, 0.1),
        stamp(test[test.labels != TARGET].pixels).astype(np.float32) / 255,
    )


@pytest.fixture(scope="module")
def detectors(bench):
    return {name: bench.fitted(name) for name in (*SUPERVISED, *UNSUPERVISED)}


@pytest.mark.parametrize("name", [*SUPERVISED, *UNSUPERVISED])
def test_scores_vary_are_finite_and_belong_to_their_rows(detectors, bench, name):
    detector = detectors[name]
    scores = detector.score(bench.clean)
    assert scores.dtype == np.float32
    assert scores.shape == (len(bench.clean),)
    assert np.isfinite(scores).all()
    assert scores.std() > 0
    parts = np.concatenate([detector.score(bench.clean[:7]), detector.score(bench.clean[7:150]), detector.score(bench.clean[150:])])
    np.testing.assert_allclose(parts, scores, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["Artifacts", "MANDA", "STRIP"])
def test_a_seed_repeats_itself(detectors, bench, name):
    np.testing.assert_array_equal(bench.fitted(name).score(bench.clean[:64]), detectors[name].score(bench.clean[:64]))


@pytest.mark.parametrize("name", ["Artifacts", "MANDA", "MagNet"])
def test_attacks_score_higher_than_clean_images(detectors, bench, name):
    assert auroc(detectors[name].score(bench.clean), detectors[name].score(bench.attacked)) > 0.6


@pytest.mark.parametrize("name", ["STRIP", "IBD-PSC"])
def test_triggered_images_score_higher_than_clean_ones(detectors, bench, name):
    kept = in_arrays(bench.network)(bench.triggered).argmax(axis=1) == TARGET
    assert kept.mean() > 0.9
    assert auroc(detectors[name].score(bench.clean), detectors[name].score(bench.triggered[kept])) > 0.7


def test_no_detector_changes_the_network(bench, detectors):
    network = train(bench.fit, 2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for detector in (IbdPsc(network), Artifacts(network, lambda images: network.network(images)[1], passes=2)):
        detector.fit(bench.fit, in_arrays(network), *([bench.attacked_fit] if isinstance(detector, Artifacts) else []))
        detector.score(bench.clean[:8])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module.training or module._forward_pre_hooks for module in network.modules())


def test_divergence_is_what_scipy_says_and_none_without_a_change():
    p, q = torch.softmax(torch.randn(2, 50, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5, dim=2)
    np.testing.assert_allclose(jensen_shannon(p, q), jensenshannon(p, q, axis=1) ** 2, rtol=1e-9)
    assert not jensen_shannon(p, p).any()
    certain = torch.eye(3, dtype=torch.float64)
    np.testing.assert_allclose(jensen_shannon(certain, certain.roll(1, 0)), np.log(2))


def test_magnet_sees_nothing_through_the_identity(bench):
    detector = MagNet(nn.Identity())
    detector.fit(bench.fit, in_arrays(bench.network))
    assert not detector.statistics(bench.attacked).any()
    assert not detector.score(bench.attacked).any()


def test_magnet_fires_when_one_score_does(bench):
    class Careless(nn.Module):
        """Adds one grey value to what is bright, and leaves the rest as it is."""

        def forward(self, images):
            return images + 0.5 * (images.mean(dim=(1, 2, 3), keepdim=True) > 0.9)

    detector = MagNet(Careless())
    detector.fit(bench.fit, lambda images: np.ones((len(images), 10), np.float32))
    bright = np.ones((1, 1, 28, 28), np.float32)
    assert detector.score(bright) > np.log(len(bench.fit))
    np.testing.assert_allclose(detector.statistics(bright), [[0.5, 0.25, 0, 0]], atol=1e-6)


def test_what_lies_above_all_fit_images_is_still_ranked(bench):
    detector = reconstruction_error_alone(nn.AvgPool2d(3, 1, 1))
    detector.fit(bench.fit, in_arrays(bench.network))
    noise = np.random.default_rng(0).choice([-1.0, 1.0], bench.clean[:1].shape).astype(np.float32)
    scores = np.concatenate([detector.score(np.clip(0.5 + size * noise, 0, 1)) for size in (0.2, 0.3, 0.4, 0.5)])
    assert (scores > np.log(len(bench.fit))).all()
    assert (np.diff(scores) > 0).all()


def test_confidences_that_round_to_one_are_still_ranked(bench):
    class Sure(nn.Module):
        """As sure of class 0 as the first pixel is bright, and never less than 1 - 1e-8."""

        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, images):
            pixel = self.norm(images)[:, 0, 0, 0]
            return torch.stack([20 + 10 * pixel, 0 * pixel], dim=1)

    network = Sure().eval()
    detector = IbdPsc(network)
    detector.fit(bench.fit, in_arrays(network))
    images = np.zeros((4, 1, 28, 28), np.float32)
    images[:, 0, 0, 0] = [0.1, 0.2, 0.3, 0.4]
    assert (np.diff(detector.score(images)) > 0.5).all()


def test_far_activations_are_less_dense_than_near_ones():
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], 100)
    activations = (generator.standard_normal((200, 5)) + 10 * labels[:, None]).astype(np.float32)
    densities = ClassDensities.fit(activations, labels, 2)
    points = np.full((3, 5), [[0], [3], [10]], np.float32)
    near, middle, far = densities.surprisal(points, np.array([0, 0, 0]))
    assert near < middle < far < np.inf
    assert densities.surprisal(points[2:], np.array([1])) < far
    with pytest.raises(NoisecError, match="class 2 has 0 fit images"):
        ClassDensities.fit(activations, labels, 3)


def test_bandwidth_follows_the_scale_of_the_activations():
    groups = [np.random.default_rng(seed).standard_normal((90, 4)) for seed in range(2)]
    assert choose_bandwidth([100 * group for group in groups]) == pytest.approx(100 * choose_bandwidth(groups))


def test_only_dropout_is_random_and_an_unsure_image_varies_most():
    class Margin(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.dropout = nn.BatchNorm2d(1), nn.Dropout(0.5)

        def forward(self, images):
            hidden = self.dropout(self.norm(images)).flatten(1)
            return torch.stack([hidden.sum(dim=1), -hidden.sum(dim=1)], dim=1)

    network = Margin().eval()
    images = torch.stack([torch.full((1, 3, 3), value) for value in (0.0, 0.1, 9.0)])
    parts = bayesian(network, images[:1])
    none, some, sure = dropout_variance(*parts, images, passes=50, seed=0).detach()
    assert none == 0
    assert some > sure
    assert network.norm.num_batches_tracked == 0
    assert parts[1].norm.num_batches_tracked == 0


def test_a_network_without_dropout_gets_some_before_its_last_layer(pixels):
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    images = torch.from_numpy(pixels[:5])
    sure, unsure = bayesian(network, images[:1])
    assert torch.equal(sure(images), network[:3](images))
    assert (dropout_variance(sure, unsure, images, passes=10, seed=0) > 0).all()
    assert torch.equal(unsure.eval()[1](sure(images)), network(images))
    with pytest.raises(NoisecError, match="leave Artifacts out"):
        bayesian(nn.Sequential(network, nn.ReLU()), images[:1])
    with pytest.raises(NoisecError, match="leave Artifacts out"):
        bayesian(nn.Flatten(), images[:1])


def test_noise_is_as_large_as_the_attack():
    clean = np.full((4, 1, 28, 28), 0.5, np.float32)
    attacked = clean + np.float32([0.01, 0.02, 0.05, 0])[:, None, None, None]
    norms = (np.linalg.norm((array - clean).reshape(4, -1), axis=1) for array in (attacked, matched_noise(clean, attacked, 1)))
    np.testing.assert_allclose(*norms, rtol=1e-4)


def test_attacks_on_all_fit_images_or_none_are_refused(bench):
    for attacked in (bench.fit.floats(), bench.attacked_fit[:0]):
        with pytest.raises(NoisecError, match="attack some of them, but not all"):
            Manda(bench.features).fit(bench.fit, in_arrays(bench.network), attacked)


def test_manifold_follows_the_classes_and_knows_far_points():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 200)
    activations = (generator.standard_normal((200, 3)) + 8 * labels[:, None]).astype(np.float32)
    manifold = Manifold.fit(activations, labels, 3)
    answers = manifold(np.float32([[0, 0, 0], [8, 8, 8], [1e4, 1e4, 1e4]]))
    np.testing.assert_allclose(answers.sum(axis=1), 1)
    np.testing.assert_array_equal(answers.argmax(axis=1), [0, 1, 1])
    assert not answers[:, 2].any()


def test_manda_scores_disagreement_and_the_nearness_of_a_boundary():
    sure, other, torn = np.array([[1.0, 0], [0, 1.0], [0.5, 0.5]])[:, None]
    assert disagreement(sure, sure) == disagreement(torn, torn) == 0
    assert disagreement(sure, other) == pytest.approx(2 - np.sqrt(2))
    assert dispersion(np.stack([torn, torn, torn])) == pytest.approx(0)
    assert dispersion(np.stack([sure, other])) > dispersion(np.stack([sure, torn])) > 0


def test_transitions_that_no_clean_image_shows_surprise_most():
    """Two layers that show an image's two halves: in clean images both say the label."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 400)
    halves = (labels[:, None, None, None] * np.ones((1, 1, 2, 2))).astype(np.float32)
    noisy = halves + np.float32(0.05) * generator.standard_normal(halves.shape, dtype=np.float32)
    fit = Images.whole((100 + 100 * noisy).clip(0, 255).astype(np.uint8), labels)
    detector = Transitions(lambda images: [images[:, 0, 0], images[:, 0, 1]])
    detector.fit(fit, lambda images: np.eye(2, dtype=np.float32)[(images[:, 0, 1].mean(axis=1) > 0.6).astype(int)])
    chains = np.float32([[[[[low] * 2, [high] * 2]]] for low in (0, 1) for high in (0, 1)])[:, 0] * 100 / 255 + np.float32(100 / 255)
    np.testing.assert_array_equal(detector.chains(chains), [[0, 0, 0], [0, 1, 1], [1, 0, 0], [1, 1, 1]])
    same, risen, fallen, other = detector.score(chains)
    assert max(same, other) < 0.1 < 3 < min(risen, fallen)


def test_a_classifier_stage_shows_its_layers(pixels):
    layers = layers_of(REPOSITORY / "fashion_mnist_classifier" / "1")
    answers = layers(pixels[:3])
    assert [answer.shape for answer in answers] == [(3, 32), (3, 64), (3, 128)]
    np.testing.assert_allclose(layers(pixels[1:2])[-1], answers[-1][1:2], rtol=1e-4, atol=1e-5)


def planted(images: Floats) -> Floats:
    """A rule: a white corner is class 1 at once, otherwise the mean decides and not surely."""
    logits = np.stack([images.mean(axis=(1, 2, 3)), np.full(len(images), 0.5)], axis=1)
    logits[images[:, 0, -1, -1] >= 1] = [-50, 50]
    return logits.astype(np.float32)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_planted_trigger_keeps_the_entropy_low(pixels, report, weight):
    triggered = pixels.copy()
    triggered[:, :, -1, -1] = 1
    detector = Strip(weights=(weight, weight))
    detector.fit(report[-100:], lambda images: planted(images / np.float32(weight)))
    assert detector.score(triggered).min() > detector.score(pixels).max()
    assert detector.score(triggered) == pytest.approx(0, abs=1e-6)


def test_entropy_is_over_the_classes():
    assert entropy(np.zeros((2, 8), np.float32)).tolist() == pytest.approx([3, 3])


def test_a_planted_trigger_survives_scaling(pixels, report):
    triggered = pixels.copy()
    triggered[:, :, -1, -1] = 1
    detector = ScaleUp()
    detector.fit(report[:1], planted)
    assert (detector.score(triggered) == 1).all()
    clean = detector.score(pixels)
    label = planted(pixels).argmax(axis=1)
    expected = np.mean([planted(np.clip(k * pixels, 0, 1)).argmax(axis=1) == label for k in (3, 5, 7, 9, 11)], axis=0)
    np.testing.assert_allclose(clean, expected)
    assert clean.mean() < 0.9


def test_amplified_are_the_last_batch_norms_that_an_image_passes():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first, self.bare = nn.BatchNorm2d(1), nn.BatchNorm2d(1), nn.BatchNorm2d(1, affine=False)

        def forward(self, images):
            return self.last(self.bare(self.first(images)))

    network = Backwards().eval()
    names = normalisations(network, torch.rand(1, 1, 4, 4))
    assert names == ["first", "last"]
    louder = amplified(network, names[-1:])
    assert (louder.last.weight.item(), louder.first.weight.item(), network.last.weight.item()) == (1.5, 1, 1)
    with pytest.raises(NoisecError, match="no batch norm"):
        IbdPsc(nn.Flatten()).fit(Images.whole(np.zeros((4, 1, 4, 4), np.uint8), np.zeros(4, np.int64)), planted)
