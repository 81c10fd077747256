"""The audit tells a backdoored classifier from a clean one, its repair takes the backdoor out, and neither touches the classifier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from noisec.builders.audit.ban import AuditSettings, Balanced, audit, balanced_halves, calibrate, checked_counts
from noisec.builders.audit.baselines import CleanseSettings, DecouplingSettings, anomaly, bti_dbf, neural_cleanse
from noisec.builders.audit.checks import frozen
from noisec.builders.audit.evidence import UNKNOWN, Evidence, excess
from noisec.builders.audit.guard import said
from noisec.builders.audit.margins import largest_margins
from noisec.builders.audit.masks import SplitNetwork
from noisec.builders.audit.measure import accuracy, attack_success
from noisec.builders.audit.neurons import adversarial_noise, noise_shapes, noisy_logits
from noisec.builders.audit.reference import fit_reference, judged_by
from noisec.builders.audit.repair import RepairSettings, moved_towards, repair
from noisec.builders.audit.restored import Restored, places
from noisec.builders.audit.triggers import TRIGGERS, BadNets, LabelConsistent, poison
from noisec.builders.audit.universal import universal_sizes
from noisec.builders.classifier import choose_penultimate, dissect, make_stage, read_model
from noisec.builders.export import export_plain
from noisec.builders.graphs import save_graph
from noisec.builders.images import Images, cut
from noisec.builders.networks import CLASSIFIERS, ResNet20, conv_block
from noisec.builders.sources import fashion_mnist
from noisec.builders.spec import PreprocessingSpec
from noisec.builders.torchgraph import Step
from noisec.builders.train import DEVICE
from noisec.errors import NoisecError

CLASSES, TARGET, EPOCHS, BATCH = 10, 3, 4, 64
EVIDENCE = Evidence("ban", False, 0.1, 0.3, UNKNOWN, 0.2, 0.2, (), 1.0, 1.0)


@pytest.fixture(scope="module")
def sets() -> tuple[Images, Images, Images]:
    """Images to train on, clean ones for the audit, and ones to measure with."""
    train, clean, test = cut(fashion_mnist.load("t10k"), (6000, 1500, 1500), [0])
    return train, clean, test


def small(channels: int = 1) -> nn.Module:
    return nn.Sequential(
        conv_block(channels, 16, 1), nn.MaxPool2d(2), conv_block(16, 32, 1), nn.MaxPool2d(2), conv_block(32, 64, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES),
    )  # fmt: skip


def trained(images: Images) -> nn.Module:
    torch.manual_seed(0)
    network = small()
    pixels, labels = torch.from_numpy(images.floats()), torch.from_numpy(images.labels)
    steps = EPOCHS * (len(images) // BATCH)
    optimiser = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=1e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            loss = nn.functional.cross_entropy(network(pixels[rows]), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
    network.zero_grad()
    return network.eval()


def trained_once(images: Images, weights: Path) -> nn.Module:
    """The same, for all processes of a test run that name the same file."""
    with FileLock(weights.with_suffix(".lock")):
        if not weights.is_file():
            save_file(trained(images).state_dict(), weights)
    network = small()
    network.load_state_dict(load_file(weights))
    return network.eval()


@pytest.fixture(scope="module")
def clean_network(sets: tuple[Images, Images, Images], run_folder: Path) -> nn.Module:
    return trained_once(sets[0], run_folder / "clean.safetensors")


@pytest.fixture(scope="module")
def backdoored_network(sets: tuple[Images, Images, Images], run_folder: Path) -> nn.Module:
    return trained_once(poison(sets[0], BadNets(), TARGET, 0.1, 0), run_folder / "backdoored.safetensors")


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def unchanged(network: nn.Module, before: dict[str, Tensor]) -> bool:
    after = network.state_dict()
    grads = any(parameter.grad is not None for parameter in network.parameters())
    hooks = any(module._forward_hooks for module in network.modules())
    return not grads and not hooks and not network.training and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_backdoored_classifier_is_told_from_a_clean_one_and_neither_is_changed(sets, clean_network, backdoored_network):
    before = state(clean_network), state(backdoored_network)
    settings = AuditSettings(steps=10)
    clean, bad = (audit(network, sets[1], CLASSES, settings) for network in (clean_network, backdoored_network))
    print(clean, bad)
    assert bad.backdoored
    assert bad.target == TARGET
    assert not clean.backdoored
    assert bad.top_class_share > clean.top_class_share + 0.15
    assert sum(bad.histogram) == pytest.approx(1)
    assert bad.top_class_share == pytest.approx(max(bad.histogram))
    assert bad.share_without_noise < bad.top_class_share
    assert unchanged(clean_network, before[0])
    assert unchanged(backdoored_network, before[1])


def test_an_audit_says_the_same_twice(sets, backdoored_network):
    settings = AuditSettings(steps=3, repeats=1)
    first, second = (audit(backdoored_network, sets[1], CLASSES, settings) for _ in range(2))
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)


def test_a_repair_takes_the_backdoor_out_and_leaves_the_given_classifier(sets, backdoored_network):
    _, clean, test = sets
    before = state(backdoored_network)
    settings = RepairSettings(epochs=10, learning_rate=0.02)
    repaired = {target: repair(backdoored_network, clean[:1000], CLASSES, settings, target) for target in (None, TARGET)}
    success = {target: attack_success(one, test, BadNets(), TARGET) for target, one in repaired.items()}
    at_first = attack_success(backdoored_network, test, BadNets(), TARGET)
    assert at_first > 0.8
    assert success[TARGET] < success[None] < at_first / 2
    assert success[TARGET] < 0.25
    for one in repaired.values():
        assert accuracy(one, test) > accuracy(backdoored_network, test) - 0.05
    assert unchanged(backdoored_network, before)


def test_images_are_moved_towards_a_class_within_the_bound(sets, clean_network):
    images = torch.from_numpy(sets[2][:200].floats())
    clean_network.train()
    moved = moved_towards(clean_network, images, TARGET, 0.1, 3)
    assert clean_network.training
    assert unchanged(clean_network.eval(), state(clean_network))
    assert (moved - images).abs().max() <= 0.1 + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1
    with torch.no_grad():
        shares = [float((clean_network(pixels).argmax(dim=1) == TARGET).float().mean()) for pixels in (images, moved)]
    assert shares[1] > shares[0] + 0.3


@pytest.mark.parametrize("target", [-1, CLASSES])
def test_a_repair_refuses_a_target_that_is_no_class(sets, clean_network, target):
    with pytest.raises(NoisecError, match=f"target {target} is no class; the classifier's are 0 to 9"):
        repair(clean_network, sets[1], CLASSES, target=target)


@pytest.mark.parametrize(
    ("method", "settings"),
    [(neural_cleanse, CleanseSettings(samples=80, steps=3)), (bti_dbf, DecouplingSettings(samples=80, epochs=1, mask_epochs=1))],
)
def test_the_baselines_answer_in_the_same_form(sets, backdoored_network, method, settings):
    before = state(backdoored_network)
    found = method(backdoored_network, sets[1], CLASSES, settings)
    assert found.method in ("neural-cleanse", "bti-dbf")
    assert found.backdoored == (found.score > found.threshold)
    assert 0 <= found.target < CLASSES
    assert sum(found.histogram) == pytest.approx(1)
    assert found.seconds > 0
    assert unchanged(backdoored_network, before)


def test_the_anomaly_index_points_at_the_small_norm():
    index, target = anomaly([50, 55, 45, 3, 52, 48, 51])
    assert target == 3
    assert index > 2
    assert anomaly([50, 55, 45, 47, 52, 48, 51])[0] < 2


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (small(), (64, 7, 7)),
        (nn.Sequential(nn.Conv2d(1, 3, 1), ResNet20()), (64, 7, 7)),
        (CLASSIFIERS["conv3"]((1, 28, 28), CLASSES), (128, 3, 3)),
    ],
)
def test_body_and_head_are_the_whole_network(network, shape):
    network = network.eval().requires_grad_(False)
    images = torch.rand(5, 1, 28, 28)
    split = SplitNetwork(network, images)
    features = split.features(images)
    whole = network(images)
    whole = whole if isinstance(whole, Tensor) else whole[0]
    assert tuple(features.shape[1:]) == shape
    torch.testing.assert_close(split.head(features), whole)
    torch.testing.assert_close(split.masked(images, torch.ones(1, *shape)), whole)
    torch.testing.assert_close(split.masked(images, torch.zeros(1, *shape)), split.head(torch.zeros_like(features)))


def test_noise_goes_on_batch_norms_and_on_weights_where_there_are_none():
    assert set(noise_shapes(small())) == {f"{block}.1.{kind}" for block in (0, 2, 4) for kind in ("weight", "bias")}
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, CLASSES, bias=False))
    assert noise_shapes(plain) == {"0.weight": (4, 1, 1, 1), "0.bias": (4,), "2.weight": (CLASSES, 1)}


def test_adversarial_noise_is_bounded_and_raises_the_loss(sets, clean_network):
    pixels, labels = torch.from_numpy(sets[1][:200].floats()), torch.from_numpy(sets[1][:200].labels)
    noise = adversarial_noise(clean_network, pixels, labels, 0.1, 5)
    assert max(float(values.abs().max()) for values in noise.values()) <= 0.1 + 1e-6
    with torch.no_grad():
        quiet, noisy = clean_network(pixels), noisy_logits(clean_network, noise, pixels)
    assert nn.functional.cross_entropy(noisy, labels) > 1.5 * nn.functional.cross_entropy(quiet, labels)


def relabelled(images: Images, labels: object) -> Images:
    return Images(images.store, images.rows, labels)  # type: ignore[arg-type]


def spoilt() -> nn.Module:
    network = small()
    network[4][0].weight.data[3] = float("nan")
    return network


@pytest.mark.parametrize(
    ("change", "network", "classes", "message"),
    [
        (lambda images: relabelled(images, None), small(), 10, "have no labels"),
        (
            lambda images: relabelled(images, np.where(images.labels == 2, -1, images.labels)),
            small(),
            10,
            "have no label \\(a negative one\\)",
        ),
        (lambda images: images, small(), 8, "labels go up to 9"),
        (lambda images: images, small(), 12, "has 10 classes, the data 12"),
        (lambda images: images[np.flatnonzero(images.labels == 4)], small(), 10, "are of class 4"),
        (lambda images: images[:30], small(), 10, "30 images are too few"),
        (lambda images: images, small().half(), 10, "is float16"),
        (lambda images: images, spoilt(), 10, "4.0.weight holds NaN"),
        (lambda images: images, small(3), 10, "does not run on images of \\[1, 28, 28\\]"),
        (lambda images: images, nn.Flatten(), 10, "no floating-point weights"),
    ],
)
@pytest.mark.parametrize("judge", [audit, neural_cleanse, bti_dbf, repair])
def test_bad_input_is_refused_in_words(sets, judge, change, network, classes, message):
    with pytest.raises(NoisecError, match=message):
        judge(network, change(sets[1]), classes)


def test_a_network_without_a_feature_map_is_refused_where_one_is_needed(sets):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(784, CLASSES))
    with pytest.raises(NoisecError, match="feature map"):
        audit(flat, sets[1], CLASSES, AuditSettings(features="complement"))


def test_halves_are_disjoint_and_balanced(sets):
    images = sets[1]
    uneven = images[np.flatnonzero((images.labels == 0) | (np.arange(len(images)) % 4 == 0))]
    halves = balanced_halves(uneven, 300, 0)
    assert not set(halves[0].rows) & set(halves[1].rows)
    for half in halves:
        counts = np.bincount(half.labels, minlength=CLASSES)
        assert counts.max() <= 16  # one class was most of the set
        assert counts.min() >= 13


def test_a_threshold_is_the_conformal_quantile_or_a_fitted_bound():
    scores = np.linspace(0.01, 0.39, 39)
    assert calibrate(scores, 0.05) == pytest.approx(scores[37])
    assert calibrate(scores[:19], 0.05) == pytest.approx(scores[18])
    assert max(scores[:10]) < calibrate(scores[:10], 0.05) < 0.5
    assert calibrate([0.1, 0.1, 0.1], 0.05) == pytest.approx(0.12)
    for wrong in ([0.1, 0.2], [0.1, 0.2, 1.5], [0.1, 0.2, float("nan")]):
        with pytest.raises(NoisecError, match="calibrate"):
            calibrate(wrong, 0.05)
    with pytest.raises(NoisecError, match="false_alarm"):
        calibrate(scores, 1.0)


def test_a_target_that_chance_hides_stands_out_against_clean_classifiers():
    random = np.random.default_rng(0)
    usual = np.array([0.4, 0.3, 0.1, 0.1, 0.1])
    clean = [one / one.sum() for one in usual * random.uniform(0.9, 1.1, (6, 5))]
    reference = fit_reference([replace(EVIDENCE, histogram=tuple(one)) for one in clean[:5]], 0.05)
    assert reference.thresholds["neuron noise"] > max(reference.scores["neuron noise"])

    def verdict(shares):
        return judged_by(replace(EVIDENCE, histogram=tuple(shares)), reference)

    assert not verdict(clean[5]).backdoored
    bad = verdict([0.35, 0.2, 0.05, 0.05, 0.35])
    assert (bad.backdoored, bad.target, bad.reference) == (True, 4, reference.usual["histogram"])
    assert max(excess([0.35, 0.2, 0.05, 0.05, 0.35])) < max(excess(clean[5].tolist())), "against chance the clean one looks worse"
    two, three = replace(EVIDENCE, histogram=(0.5, 0.5)), replace(EVIDENCE, histogram=(0.2, 0.3, 0.5))
    with pytest.raises(NoisecError, match="at least 3"):
        fit_reference([two, two], 0.05)
    with pytest.raises(NoisecError, match="2 and 3 classes"):
        fit_reference([two, two, three], 0.05)
    with pytest.raises(NoisecError, match="cannot be compared"):
        judged_by(two, reference)


def test_a_target_whose_logit_goes_further_than_in_clean_classifiers_stands_out():
    random = np.random.default_rng(1)
    shares = (0.4, 0.3, 0.1, 0.1, 0.1)
    usual = np.array([30.0, 10.0, 20.0, 8.0, 12.0])
    clean = [replace(EVIDENCE, histogram=shares, margins=tuple(usual * random.uniform(0.9, 1.1, 5))) for _ in range(6)]
    reference = fit_reference(clean[:5], 0.05)
    assert not judged_by(clean[5], reference).backdoored
    bad = judged_by(replace(EVIDENCE, histogram=shares, margins=(30.0, 10.0, 20.0, 24.0, 12.0)), reference)
    assert (bad.backdoored, bad.target) == (True, 3), "class 0 has the largest margin, in clean classifiers too"
    assert bad.score == pytest.approx((1 - 8 / 24) / 2, abs=0.03), "the histogram is as usual"
    louder = replace(EVIDENCE, histogram=shares, margins=tuple(3 * usual))
    assert not judged_by(louder, reference).backdoored, "its logits are larger, all of them"
    assert f"its logit can be driven {24 / reference.usual['margins'][3]:.1f} times as far" in said(bad, tuple("abcde"))
    with pytest.raises(NoisecError, match="without margins"):
        judged_by(replace(EVIDENCE, histogram=shares), reference)
    with pytest.raises(NoisecError, match="has no margins"):
        fit_reference([*clean[:3], replace(EVIDENCE, histogram=shares)], 0.05)


def test_a_target_that_one_small_perturbation_reaches_stands_out():
    random = np.random.default_rng(2)
    shares, usual = (0.4, 0.3, 0.1, 0.1, 0.1), np.array([0.3, 1.2, 0.9, 0.8, 0.7])
    clean = [replace(EVIDENCE, histogram=shares, sizes=tuple(usual * random.uniform(0.9, 1.1, 5))) for _ in range(6)]
    reference = fit_reference(clean[:5], 0.05)
    assert not judged_by(clean[5], reference).backdoored
    bad = judged_by(replace(EVIDENCE, histogram=shares, sizes=(0.3, 1.2, 0.35, 0.8, 0.7)), reference)
    assert (bad.backdoored, bad.target, bad.test) == (True, 2, "universal perturbation"), "class 0 is nearest in clean classifiers, too"
    assert bad.score == pytest.approx(1 - 0.35 / 0.9, abs=0.06), "so much of the size is gone, though the histogram is as usual"
    assert f"makes class 2 the likeliest on average with {0.35 / reference.usual['sizes'][2]:.1f} times the size" in said(
        bad, tuple("abcde")
    )
    assert not judged_by(replace(bad, sizes=tuple(usual / 3)), reference).backdoored, "less does, but for all of them"
    with pytest.raises(NoisecError, match="without sizes"):
        judged_by(replace(EVIDENCE, histogram=shares), reference)
    assert not judged_by(bad, fit_reference(clean[:5], 0.05, ("histogram",))).backdoored


def test_each_of_two_tests_may_raise_half_of_the_false_alarms():
    random = np.random.default_rng(3)
    usual = np.array([0.4, 0.3, 0.1, 0.1, 0.1])
    clean = [replace(EVIDENCE, histogram=tuple(one / one.sum())) for one in usual * random.uniform(0.5, 1.5, (8, 5))]
    both = [replace(one, sizes=tuple(random.uniform(0.9, 1.1, 5))) for one in clean]
    assert fit_reference(both, 0.02).thresholds["neuron noise"] == fit_reference(clean, 0.01).thresholds["neuron noise"]
    assert fit_reference(both, 0.02).thresholds["neuron noise"] > fit_reference(clean, 0.02).thresholds["neuron noise"]


class Rounding(nn.Module):
    """A network that sees a rounded image, and so gives no gradient."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images.round(decimals=1) + 0 * images)


class Standardised(nn.Module):
    """A network that divides each image by its deviation, whose gradient is no number where the image is all one grey."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return ((images - images.mean()) / (images.var(dim=(1, 2, 3), keepdim=True).sqrt() + 1e-3)).flatten(1)[:, :3]


def test_the_size_of_a_universal_perturbation_is_the_distance_to_a_class():
    images, labels = torch.full((12, 1, 4, 4), 0.3, device=DEVICE), torch.arange(12, device=DEVICE) % 3
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    weights, bias = network[1].weight.data.zero_(), network[1].bias.data.zero_()
    weights[1, 5], weights[2, 7], weights[2, 8], bias[1], bias[2] = 10.0, 10.0, 10.0, -5.0, -9.0
    network = frozen(network)
    sizes = universal_sizes(network, images, labels, 3, 0.05, 8).tolist()
    assert sizes[1] == pytest.approx(0.2, abs=1e-3), "one pixel has to rise from .3 to .5"
    assert sizes[2] == pytest.approx(0.15 * 2**0.5, abs=1e-3), "two pixels share what is missing"
    assert universal_sizes(network, images, labels, 3, 0.01, 2).tolist()[1] == pytest.approx(0.2, abs=1e-3), "as far as it got, and on"
    assert universal_sizes(network, images, labels, 3, 0.001, 2).tolist()[1] == pytest.approx(0.02), "no further than can be guessed"
    assert min(universal_sizes(Rounding(network), images, labels, 3, 0.05, 8).tolist()[1:]) == pytest.approx(4), "nothing moves it"


def test_a_perturbation_whose_gradient_is_no_number_gives_no_verdict():
    images, labels = torch.rand(6, 1, 4, 4, device=DEVICE), torch.arange(6, device=DEVICE) % 3
    images[0] = 0.5
    with pytest.raises(NoisecError, match="not finite on perturbed images"):
        universal_sizes(Standardised(), images, labels, 3, 0.05, 3)


def test_logits_that_overflow_are_no_clean_verdict(sets):
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    network[1].weight.data = 1e38 * network[1].weight.data.sign()
    with pytest.raises(NoisecError, match="overflow"):
        audit(network, sets[0], 10, AuditSettings(samples=80, repeats=1, steps=1))


def test_the_largest_margins_of_a_linear_classifier_are_those_of_the_best_corner():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    torch.manual_seed(0)
    network[1].weight.data = torch.randn(2, 16).sign() * torch.tensor([[1.0], [0.5]])
    found = largest_margins(frozen(network), torch.rand(30, 1, 4, 4, device=DEVICE), 2, 2, 50, 0)
    difference = (network[1].weight[0] - network[1].weight[1]).detach()
    bias = float((network[1].bias[0] - network[1].bias[1]).detach())
    assert found.tolist() == pytest.approx(
        [float(difference.clamp(min=0).sum()) + bias, float((-difference).clamp(min=0).sum()) - bias], rel=1e-5
    )


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_trigger_changes_images_and_nothing_about_their_form(sets, name):
    images = sets[0][:400]
    trigger = TRIGGERS[name](images, TARGET, 0)
    pixels = images.pixels
    before = pixels.copy()
    for made in (trigger.apply(pixels, 1), trigger.plant(pixels, 1), trigger.cover(pixels, 1)):
        assert made.dtype == np.uint8
        assert made.shape == pixels.shape
    changed = (trigger.apply(pixels, 1) != pixels).any(axis=(1, 2, 3))
    assert changed.mean() > 0.9
    assert np.array_equal(trigger.apply(pixels, 1), trigger.apply(pixels, 1))
    assert np.array_equal(pixels, before)
    colour = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 40), dtype=np.uint8)
    if name != "iad":  # its generator is made for one number of channels
        assert trigger.apply(colour).shape == colour.shape


@pytest.mark.parametrize("name", TRIGGERS)
def test_poisoning_relabels_the_share_it_says_and_leaves_the_given_set(sets, name):
    images = sets[0][:400]
    before = images.pixels.copy(), images.labels.copy()
    trigger = TRIGGERS[name](images, TARGET, 0)
    poisoned = poison(images, trigger, TARGET, 0.05, 0)
    relabelled_rows = np.flatnonzero(poisoned.labels != images.labels)
    touched = (poisoned.pixels != images.pixels).any(axis=(1, 2, 3))
    assert len(relabelled_rows) == 0 if trigger.clean_label else 10 <= len(relabelled_rows) <= 20
    assert (poisoned.labels[relabelled_rows] == TARGET).all()
    assert 15 <= touched.sum() <= 20 * (1 + trigger.covers)
    assert np.array_equal(images.pixels, before[0])
    assert np.array_equal(images.labels, before[1])


def test_poisoning_that_cannot_be_done_is_refused(sets):
    with pytest.raises(NoisecError, match="target is 10"):
        poison(sets[0], BadNets(), 10, 0.05, 0)
    with pytest.raises(NoisecError, match="can be poisoned"):
        poison(sets[0], LabelConsistent(), TARGET, 0.5, 0)


def test_measuring_leaves_the_mode_alone(sets):
    network = small().train()
    accuracy(network, sets[2][:50])
    assert network.training


def test_counts_even_out_what_a_common_class_does_to_the_logits():
    network, counts = nn.Linear(4, 3), np.array([80, 10, 10])
    inputs = torch.randn(5, 4)
    evened = Balanced(network, counts)(inputs)
    np.testing.assert_allclose((network(inputs) - evened).detach().numpy(), np.tile(np.log(counts / 100), (5, 1)), rtol=1e-5)
    for wrong in (np.array([1, 2]), np.array([1, 0, 2])):
        with pytest.raises(NoisecError, match="above 0, of each of 3 classes"):
            checked_counts(wrong, 3)


def graph_stage(network: nn.Module, images: Images, folder: Path) -> Path:
    """The classifier stage of a network's export."""
    export_plain(network, torch.from_numpy(images[:2].floats()), folder / "plain.onnx")
    model = read_model(folder / "plain.onnx")
    anatomy = dissect(model, "plain.onnx")
    penultimate = choose_penultimate(anatomy, model, None, "plain.onnx")
    save_graph(
        make_stage(model, anatomy, penultimate, images.shape, PreprocessingSpec(), "plain.onnx"), folder / "model.onnx", external=False
    )
    return folder / "model.onnx"


def test_batch_norms_that_an_export_has_folded_away_are_found_again_in_its_answers(
    sets: tuple[Images, Images, Images], clean_network: nn.Module, tmp_path: Path
) -> None:
    _, clean, test = sets
    stage = graph_stage(clean_network, clean, tmp_path)
    restored = Restored(stage, clean)
    pixels = torch.from_numpy(test[:100].floats())
    with torch.no_grad():
        assert torch.allclose(restored(pixels), clean_network(pixels), atol=1e-4)
    norms = [module for module in clean_network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(restored.norms) == len(norms)
    for found, true in zip(restored.norms.values(), norms, strict=True):
        assert torch.allclose(found.weight, true.weight.abs(), rtol=0.15)
        assert torch.allclose(found.bias, true.bias, atol=0.15)
    assert sorted(noise_shapes(restored)) == sorted(f"norms.{index}.{part}" for index in range(len(norms)) for part in ("weight", "bias"))


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("Conv", "BatchNormalization", "Relu", "Gemm"), ["1"]),
        (("Conv", "Relu", "Conv", "Gemm", "Gemm"), ["0", "2"]),
        (("Conv", "Relu", "Conv", "GlobalAveragePool"), ["0"]),
        (("Gemm", "Relu", "MatMul", "Add"), ["0"]),
    ],
)
def test_batch_norms_belong_behind_those_of_the_graph_or_behind_convolutions_or_behind_hidden_layers(
    kinds: tuple[str, ...], expected: list[str]
) -> None:
    assert places([Step(kind, {}, (), (str(index),)) for index, kind in enumerate(kinds)], Path("model.onnx")) == expected


def test_a_graph_without_a_place_for_noise_is_refused() -> None:
    with pytest.raises(NoisecError, match="no batch norm, convolution or hidden linear layer"):
        places([Step("Flatten", {}, (), ("0",)), Step("Gemm", {}, ("0",), ("1",))], Path("model.onnx"))
