"""A guided denoiser learns to undo what moves the classifier's features."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import GUARD, REPOSITORY

from noisec import contract
from noisec.builders import train
from noisec.builders.networks import DENOISERS
from noisec.builders.sources import fashion_mnist
from noisec.builders.spec import AutoencoderSpec
from noisec.builders.torchgraph import TorchGraph
from noisec.builders.train import along_gradient, in_blocks, load_network, train_autoencoder
from noisec.contract import stage_model

EPS = 0.1


@pytest.fixture(scope="module")
def classify():
    return TorchGraph(REPOSITORY / stage_model(GUARD, "classifier") / "1" / "model.onnx").named


@pytest.fixture(scope="module")
def images(report):
    return torch.from_numpy(report[:500].floats())


def test_the_noise_follows_the_gradient_within_its_bound(classify, images):
    torch.manual_seed(0)
    moved = along_gradient(classify, images, EPS)
    assert (moved - images).abs().max() <= EPS + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1
    random = (images + EPS * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images).sign()).clamp(0, 1)
    before = classify(images)[contract.LOGITS].argmax(dim=1)
    changed = [float((classify(other)[contract.LOGITS].argmax(dim=1) != before).float().mean()) for other in (moved, random)]
    assert changed[0] > 3 * changed[1]


def test_guided_training_brings_the_features_back_better_than_plain_training(classify, images, tmp_path):
    torch.manual_seed(1)
    moved = along_gradient(classify, images, EPS)
    wanted = classify(images)[contract.PENULTIMATE]
    left = {}
    for guidance in (0.0, 0.02):
        spec = AutoencoderSpec(network="unet-small", epochs=2, noise_sd=EPS, guidance=guidance)
        train_autoencoder(spec, fashion_mnist.load("t10k")[:2500], 0, tmp_path, classify)
        denoiser = load_network(DENOISERS["unet-small"](images.shape[1:]), tmp_path)
        with torch.no_grad():
            left[guidance] = float((classify(denoiser(moved))[contract.PENULTIMATE] - wanted).abs().mean())
    assert left[0.02] < left[0.0]


def test_noise_in_blocks_has_one_size_an_image_and_is_constant_in_rectangles():
    torch.manual_seed(0)
    noise = in_blocks(torch.full((200, 3, 28, 32), 0.5), EPS) - 0.5
    sizes = noise.abs().amax(dim=(1, 2, 3))
    assert torch.allclose(noise.abs(), sizes[:, None, None, None].expand_as(noise), atol=1e-6)
    assert sizes.max() <= EPS + 1e-6
    assert sizes.std() > EPS / 5
    changes = (noise.sign().diff(dim=2) != 0).any(dim=1).any(dim=2)
    edges = [torch.nonzero(one).flatten().diff().tolist() for one in changes]
    assert {math.gcd(*gaps) for gaps in edges if len(gaps) > 2} >= {1, 2, 4}, "edges lie a multiple of the rectangle's side apart"


def test_training_with_blocks_takes_blocks_away(images, tmp_path):
    torch.manual_seed(1)
    coarse = in_blocks(images, 3 * EPS)
    left = {}
    for blocks in (0.0, 3 * EPS):
        spec = AutoencoderSpec(network="unet-small", epochs=2, batch_size=16, learning_rate=4e-3, noise_sd=EPS / 2, blocks=blocks)
        train_autoencoder(spec, fashion_mnist.load("t10k")[:1500], 0, tmp_path)
        denoiser = load_network(DENOISERS["unet-small"](images.shape[1:]), tmp_path)
        with torch.no_grad():
            left[blocks] = float((denoiser(coarse) - images).square().mean())
    assert left[3 * EPS] < 0.95 * left[0.0]


def test_a_batch_without_a_quarter_gets_no_blocks(images, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "in_blocks", lambda batch, amplitude: seen.append(len(batch)) or batch)
    for size in (1, 8):
        spec = AutoencoderSpec(network="unet-small", epochs=1, batch_size=size, blocks=0.3)
        train_autoencoder(spec, fashion_mnist.load("t10k")[:8], 0, tmp_path)
    assert seen == [0] * 8 + [2]


def test_mixed_precision_learns_as_much(classify, images, tmp_path):
    torch.manual_seed(1)
    moved = along_gradient(classify, images, EPS)
    left = {}
    for mixed in (False, True):
        spec = AutoencoderSpec(network="unet-small", epochs=1, batch_size=16, noise_sd=EPS, guidance=0.02, mixed_precision=mixed)
        train_autoencoder(spec, fashion_mnist.load("t10k")[:800], 0, tmp_path, classify)
        denoiser = load_network(DENOISERS["unet-small"](images.shape[1:]), tmp_path)
        assert all(weight.dtype == torch.float32 for weight in denoiser.parameters())
        with torch.no_grad():
            left[mixed] = float((denoiser(moved) - images).square().mean())
    assert left[False] != left[True], "it made no difference: nothing ran in bfloat16"
    assert left[True] < 1.2 * left[False] < 1.2 * float((moved - images).square().mean())


@pytest.mark.parametrize(
    ("found", "slow"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, False),
        ({"architecture": "x86_64", "amx_bf16": True}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_mixed_precision_warns_where_it_is_slow(monkeypatch, capsys, found, slow):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(train, "DEVICE", torch.device("cpu"))
    train.lowered(lambda images, labels: images.mean())
    assert ("float32 trains about three times as fast" in " ".join(capsys.readouterr().err.split())) == slow


def test_without_guidance_the_classifier_is_not_asked(tmp_path, report):
    def never(batch):
        raise AssertionError("asked")

    train_autoencoder(AutoencoderSpec(network="unet-small", epochs=1), report[:64], 0, tmp_path, never)
    weights = load_network(DENOISERS["unet-small"](report.shape), tmp_path).state_dict()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
