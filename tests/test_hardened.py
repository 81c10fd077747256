"""A hardened copy of the classifier: what it learns, and what it may not change. That it is served is tested with the amplified ones."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from conftest import GUARD, REPOSITORY
from pydantic import ValidationError

from noisec import contract
from noisec.builders.hardened import HARDENED, Copy, export_copy, loss_of, train_copy, with_weights, worst_changes
from noisec.builders.head import read_head
from noisec.builders.spec import DetectorSpec, GuardSpec, HardenedSpec, changed
from noisec.builders.stages import in_process
from noisec.builders.torchgraph import TorchGraph
from noisec.builders.train import along_gradient, load_network
from noisec.errors import NoisecError
from noisec.python_backend.scorer.session import open_session

EPS = 0.1
STAGE = REPOSITORY / f"{GUARD}_classifier" / "1"


@pytest.fixture(scope="module")
def folder(report, tmp_path_factory):
    spec = HardenedSpec(eps=EPS, epochs=2, batch_size=32, learning_rate=2e-3)
    weights, found = tmp_path_factory.mktemp("weights"), tmp_path_factory.mktemp("hardened")
    train_copy(spec, STAGE, report[500:3000], 0, weights)
    export_copy(spec, STAGE, weights, report[:300], found)
    return found


def labels(stage, pixels):
    return in_process({"classifier": stage})("classifier", pixels, [contract.LOGITS])[contract.LOGITS].argmax(axis=1)


def test_its_own_gradient_leads_the_copy_astray_less_often_than_the_classifier(folder, report):
    images = torch.from_numpy(report[:300].floats())
    astray = {}
    for stage in (STAGE, folder):
        classify = TorchGraph(stage / "model.onnx").named
        torch.manual_seed(1)
        attacked = along_gradient(classify, images, EPS)
        astray[stage] = np.mean(labels(stage, attacked.numpy()) != labels(stage, images.numpy()))
    assert astray[folder] < 0.6 * astray[STAGE]
    agreement = json.loads((folder / HARDENED).read_text())["agreement"]
    assert agreement == np.mean(labels(folder, images.numpy()) == labels(STAGE, images.numpy()))
    assert agreement > 0.85


def test_the_last_layer_stays_and_the_others_learn(folder, report):
    own, copy = (onnx.load(one / "model.onnx") for one in (STAGE, folder))
    heads = [read_head(one / "model.onnx", report[:16].floats()) for one in (STAGE, folder)]
    assert np.array_equal(heads[0].weights, heads[1].weights)
    assert np.array_equal(heads[0].bias, heads[1].bias)
    weights = [{tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer} for model in (own, copy)]
    learned = Copy(STAGE).names
    assert len(learned) >= 8
    for name, before in weights[0].items():
        assert np.array_equal(before, weights[1][name]) == (name not in learned), name


def test_an_untrained_copy_answers_as_the_classifier_does(pixels):
    images = torch.from_numpy(pixels[:8])
    with torch.no_grad():
        assert torch.equal(Copy(STAGE)(images), TorchGraph(STAGE / "model.onnx").named(images)[contract.LOGITS])


def test_changes_are_the_worst_within_their_sizes(pixels):
    torch.manual_seed(0)
    copy, images = Copy(STAGE), torch.from_numpy(pixels)
    sizes = EPS * torch.rand(len(images), 1, 1, 1)
    wanted = copy(images).detach().softmax(dim=1)
    found = worst_changes(copy, images, wanted, sizes)
    assert ((found - images).abs() <= sizes + 1e-6).all()
    assert found.min() >= 0
    assert found.max() <= 1
    random = (images + sizes * torch.randn_like(images).sign()).clamp(0, 1)
    moved = [float((copy(other).argmax(dim=1) != wanted.argmax(dim=1)).float().mean()) for other in (found, random)]
    assert moved[0] > 3 * moved[1]


def test_mixed_precision_learns_as_much(report, pixels, tmp_path):
    images = torch.from_numpy(pixels)
    classify, left = TorchGraph(STAGE / "model.onnx").named, {}
    for mixed in (False, True):
        train_copy(HardenedSpec(eps=EPS, epochs=1, batch_size=32, mixed_precision=mixed), STAGE, report[500:1000], 0, tmp_path)
        copy = load_network(Copy(STAGE), tmp_path)
        assert all(weight.dtype == torch.float32 for weight in copy.parameters())
        torch.manual_seed(1)
        left[mixed] = float(loss_of(copy, classify, EPS, images).detach())
    torch.manual_seed(1)
    before = float(loss_of(Copy(STAGE), classify, EPS, images).detach())
    assert left[False] != left[True], "it made no difference: nothing ran in bfloat16"
    assert left[True] < 1.2 * left[False] < before


def test_one_image_alone_is_a_batch(pixels):
    loss = loss_of(Copy(STAGE), TorchGraph(STAGE / "model.onnx").named, EPS, torch.from_numpy(pixels[:1]))
    assert torch.isfinite(loss)


def test_weights_are_replaced_wherever_the_graph_holds_them():
    tensors = [onnx.numpy_helper.from_array(np.full(2, value, np.float32), name) for name, value in (("first", 1), ("second", 2))]
    constant = onnx.helper.make_node("Constant", [], ["second"], value=tensors[1])
    nodes = [constant, onnx.helper.make_node("Add", ["first", "second"], ["sum"])]
    value = onnx.helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, [2])
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "two", [], [value], tensors[:1]), ir_version=10, opset_imports=opset)
    found = with_weights(model, {name: np.full(2, 5, np.float32) for name in ("first", "second")})
    onnx.checker.check_model(found)
    assert open_session(found.SerializeToString()).run(None, {})[0].tolist() == [10, 10]
    assert [len(part) for part in (model.graph.node, model.graph.initializer)] == [2, 1], "the original is as it was"
    with pytest.raises(NoisecError, match="no weights third"):
        with_weights(model, {"third": np.ones(2, np.float32)})


@pytest.mark.parametrize(("value", "message"), [(np.nan, "weights that are not finite"), (0.0, r"for \d+\.\d % of clean images, 50 % are")])
def test_a_copy_that_says_something_else_is_refused(tmp_path, report, value, message):
    copy = Copy(STAGE)
    torch.save({name: torch.full_like(weight, value) for name, weight in copy.state_dict().items()}, tmp_path / "weights.pt")
    with pytest.raises(NoisecError, match=message):
        export_copy(HardenedSpec(eps=EPS), STAGE, tmp_path, report[:100], tmp_path)
    assert not (tmp_path / HARDENED).exists()


def test_a_classifier_of_one_layer_has_nothing_to_harden(tmp_path):
    nodes = [
        onnx.helper.make_node("Flatten", [contract.IMAGE], ["row"]),
        onnx.helper.make_node("Gemm", ["row", "weights"], [contract.LOGITS]),
    ]
    ends = {contract.IMAGE: ["batch", 1, 28, 28], contract.LOGITS: ["batch", 10]}
    image, logits = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in ends.items())
    weights = onnx.numpy_helper.from_array(np.ones((784, 10), np.float32), "weights")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "one layer", [image], [logits], [weights])), tmp_path / "model.onnx")
    with pytest.raises(NoisecError, match="no float32 weights before its penultimate .* leave detectors with view 'hardened' out"):
        Copy(tmp_path)
    nodes.insert(0, onnx.helper.make_node("Mish", [contract.IMAGE], ["odd"]))
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "odd", [image], [logits], [weights])), tmp_path / "model.onnx")
    with pytest.raises(NoisecError, match="cannot be hardened; leave detectors with view 'hardened' out: .*Mish cannot run"):
        Copy(tmp_path)


def test_section_and_detectors_go_together(spec):
    with pytest.raises(ValidationError, match="kind 'dissent' has view 'hardened'; view is 'delta'"):
        DetectorSpec(kind="dissent", view="delta")
    dissent = DetectorSpec(kind="dissent", view="hardened")
    with pytest.raises(NoisecError, match=r"a section \[hardened\] goes with .* there is no section and such a detector"):
        changed(spec, detectors=(*spec.detectors, dissent))
    with pytest.raises(NoisecError, match="there is a section and no such detector"):
        changed(spec, hardened=HardenedSpec(eps=EPS))
    both = changed(spec, detectors=(*spec.detectors, dissent), hardened=HardenedSpec(eps=EPS))
    assert GuardSpec.model_validate(both.model_dump()).copies == ("hardened",)
