"""What the reference guard catches, attacked afresh and asked over gRPC."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from conftest import GUARD, REPOSITORY
from torch import nn

from noisec.builders.attacks import AttackSpec, attack
from noisec.builders.figures import Answers, attack_figures
from noisec.builders.networks import CLASSIFIERS
from noisec.builders.protect import LogitsOnly, Protected
from noisec.contract import stage_model
from noisec.manifest import read_manifest


def answers(client, images) -> Answers:
    verdicts = client.classify(images)
    return Answers(verdicts.labels, verdicts.scores, verdicts.is_malicious)


@pytest.fixture(scope="module")
def protected() -> Protected:
    """The served classifier as a torch module, from the weights in its ONNX graph (batch norms are folded there)."""
    graph = onnx.load(REPOSITORY / stage_model(GUARD, "classifier") / "1" / "model.onnx").graph
    weights = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    network = CLASSIFIERS["conv3"]((1, 28, 28), 10)
    for name, module in network.named_modules():
        if isinstance(module, nn.Sequential) and len(module) == 3 and isinstance(module[1], nn.BatchNorm2d):
            module[0].bias = nn.Parameter(weights[f"{name}.0.weight_bias"])
            module[1] = nn.Identity()
    network.load_state_dict({name: weights.get(name, value) for name, value in network.state_dict().items()})
    logits = LogitsOnly(network.eval())
    stage = REPOSITORY / stage_model(GUARD, "classifier") / "1"
    return Protected(stage, logits, lambda images: logits(torch.from_numpy(images)).detach().numpy(), 10, 128, "conv3")


def test_accuracy_is_as_promised(client, report):
    accuracy = np.mean(client.classify(report.pixels).labels == report.labels)
    assert accuracy >= 0.92
    assert accuracy == pytest.approx(read_manifest(REPOSITORY, GUARD)["figures"]["accuracy"], abs=0.001)


def test_pgd_is_caught(client, report, protected):
    images = report[:200]
    attacked = attack(protected, images, AttackSpec("pgd", 0.1), seed=1)
    assert np.abs(attacked.pixels - images.floats()).max() <= 0.1 + 1e-6
    clean, malicious = answers(client, report.pixels), answers(client, attacked.pixels)
    figures = attack_figures(clean, malicious, attacked.succeeded(malicious.labels))
    assert figures["success"] >= 0.9
    assert figures["auroc"] >= 0.99
    assert figures["tpr_at_1pct"] >= 0.9
