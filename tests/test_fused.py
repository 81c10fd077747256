"""The fused layout and byte input: the same verdicts from fewer stages and a quarter of the bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import tritonclient.grpc as triton_grpc
from conftest import GUARD, REPOSITORY
from onnx import helper
from pydantic import ValidationError

from noisec import contract, manifest
from noisec.builders.layout import fuse, rearrange
from noisec.builders.recalibrate import stage_folders
from noisec.builders.repository import read_config
from noisec.builders.spec import GuardSpec, ServingSpec
from noisec.builders.stages import StageRunner, in_process
from noisec.builders.torchgraph import TorchGraph
from noisec.clients import GuardClient
from noisec.errors import NoisecError
from noisec.python_backend.runtimes.onnxruntime.session import open_session
from noisec.python_backend.server import EmbeddedServer


def spec_of(repository: Path) -> GuardSpec:
    return GuardSpec.model_validate(manifest.read_manifest(repository, GUARD)["spec"])


@pytest.fixture(scope="module")
def fused(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fused")
    rearrange(REPOSITORY, GUARD, ServingSpec(layout="fused"), folder)
    return folder


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    rearrange(REPOSITORY, GUARD, ServingSpec(layout="fused", input="uint8"), folder)
    return folder


@pytest.fixture(scope="module")
def fused_server(fused) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(fused) as running:
        yield running


@pytest.fixture(scope="module")
def byte_server(bytewise) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(bytewise) as running:
        yield running


@pytest.fixture(scope="module")
def staged_verdicts(server, report):
    with GuardClient(server.grpc_url, GUARD) as client:
        return client.classify(report[:200].pixels)


def same(found, wanted):
    np.testing.assert_array_equal(found.labels, wanted.labels)
    np.testing.assert_array_equal(found.is_malicious, wanted.is_malicious)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)


def executions(url: str) -> dict[str, int]:
    statistics = triton_grpc.InferenceServerClient(url).get_inference_statistics().model_stats
    return {model.name.removeprefix(f"{GUARD}_"): model.execution_count for model in statistics}


def test_other_layouts_are_whole_repositories_with_the_same_contract(fused, bytewise):
    for repository in (fused, bytewise):
        assert manifest.verify_repository(repository) == []
        assert list(read_config(repository / GUARD).output) == list(read_config(REPOSITORY / GUARD).output)
    assert spec_of(fused).serving.layout == "fused"
    steps = [step.model_name for step in read_config(fused / GUARD).ensemble_scheduling.step]
    assert steps == [f"{GUARD}_autoencoder", f"{GUARD}_classifier", f"{GUARD}_scorer"]


def test_fused_verdicts_are_the_staged_ones(fused_server, report, staged_verdicts):
    with GuardClient(fused_server.grpc_url, GUARD) as client:
        same(client.classify(report[:200].pixels), staged_verdicts)
        same(client.classify(report[:1].pixels), client.classify(report[:1].floats()))


def test_a_label_costs_only_the_classifier(fused_server, byte_server, report):
    for server in (fused_server, byte_server):
        before = executions(server.grpc_url)
        with GuardClient(server.grpc_url, GUARD) as client:
            client.classify(report[:8].pixels, labels_only=True)
        after = executions(server.grpc_url)
        assert {name for name in after if after[name] > before[name]} == {GUARD, "classifier"}


def test_bytes_give_the_verdicts_of_their_floats(byte_server, report, staged_verdicts):
    with GuardClient(byte_server.grpc_url, GUARD) as client:
        same(client.classify(report[:200].pixels), staged_verdicts)


def test_floats_for_a_guard_of_bytes_are_refused(byte_server, report):
    with GuardClient(byte_server.grpc_url, GUARD) as client, pytest.raises(NoisecError, match="takes bytes: send the pixels as uint8"):
        client.classify(report[:1].floats())
    floats = report[:1].floats()
    image = triton_grpc.InferInput(contract.IMAGE, floats.shape, "FP32").set_data_from_numpy(floats)
    with pytest.raises(triton_grpc.InferenceServerException, match="data-type is 'FP32', but model 'fashion_mnist' expects 'UINT8'"):
        triton_grpc.InferenceServerClient(byte_server.grpc_url).infer(GUARD, [image])


def test_wrong_shapes_of_bytes_are_refused(byte_server, report):
    with GuardClient(byte_server.grpc_url, GUARD) as client, pytest.raises(NoisecError, match="takes \\[n, 1, 28, 28\\]"):
        client.classify(report[:1].pixels[:, :, :27])


@pytest.mark.parametrize("name", ["fused", "bytewise"])
def test_builders_get_the_same_tensors_from_every_layout(name, pixels, request):
    repository = request.getfixturevalue(name)
    batch = pixels[:20]
    tensors = [StageRunner.of(spec_of(one), in_process(stage_folders(one, GUARD, 1), 1)).batch(batch) for one in (REPOSITORY, repository)]
    assert tensors[0].keys() == tensors[1].keys()
    for key, wanted in tensors[0].items():
        np.testing.assert_allclose(tensors[1][key], wanted, rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_a_fused_stage(fused, pixels):
    stage = stage_folders(fused, GUARD, 1)["autoencoder"] / "model.onnx"
    images = torch.from_numpy(pixels[:8]).requires_grad_(True)
    answers = TorchGraph(stage).named(images)
    session = open_session(stage)
    wanted = [output.name for output in session.get_outputs()]
    for name, expected in zip(wanted, session.run(wanted, {contract.IMAGE: pixels[:8]}), strict=True):
        np.testing.assert_allclose(answers[name].detach().numpy(), expected, rtol=1e-3, atol=1e-4)
    (slope,) = torch.autograd.grad(answers[contract.PASSES["noise"]].square().sum(), images)
    assert (slope.flatten(1).abs().amax(dim=1) > 0).all()


def test_a_stage_of_bytes_takes_no_noise(bytewise, pixels):
    infer = in_process(stage_folders(bytewise, GUARD, 1), 1)
    with pytest.raises(NoisecError, match="takes bytes"):
        infer("classifier", pixels[:2] - 0.5, [contract.PENULTIMATE])


def test_graphs_of_different_opsets_are_joined(pixels, fused, tmp_path):
    folders = stage_folders(REPOSITORY, GUARD, 1)
    autoencoder, classifier = (onnx.load(folders[stage] / "model.onnx") for stage in ("autoencoder", "classifier"))
    older = onnx.version_converter.convert_version(classifier, 16)
    onnx.save(fuse(autoencoder, older, spec_of(fused)), tmp_path / "model.onnx")
    names = [contract.PASSES["noise"], contract.PASSES["reconstruction"]]
    found = open_session(tmp_path / "model.onnx").run(names, {contract.IMAGE: pixels[:5]})
    wanted = open_session(fused / f"{GUARD}_autoencoder/1/model.onnx").run(names, {contract.IMAGE: pixels[:5]})
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_classifier_that_mixes_the_rows_of_a_batch_stays_staged(tmp_path):
    copy = tmp_path / "mixing"
    rearrange(REPOSITORY, GUARD, spec_of(REPOSITORY).serving, copy)
    path = copy / f"{GUARD}_classifier/1/model.onnx"
    model = onnx.load(path)
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == contract.PENULTIMATE:
                node.output[index] = "own"
        for index, name in enumerate(node.input):
            if name == contract.PENULTIMATE:
                node.input[index] = "own"
    axes = onnx.numpy_helper.from_array(np.array([0]), "rows")
    model.graph.initializer.append(axes)
    mean = helper.make_node("ReduceMean", ["own", "rows"], ["mean"], keepdims=1)
    model.graph.node.extend([mean, helper.make_node("Sub", ["own", "mean"], [contract.PENULTIMATE])])
    onnx.save(model, path)
    with pytest.raises(NoisecError, match="mixes the rows of a batch; serve it staged"):
        rearrange(copy, GUARD, ServingSpec(layout="fused"), tmp_path / "fused")


def test_what_does_not_go_together_is_refused(fused, tmp_path):
    content = spec_of(REPOSITORY).model_dump()
    with pytest.raises(ValidationError, match="goes with layout = 'fused'"):
        GuardSpec.model_validate({**content, "serving": {"input": "uint8"}})
    with pytest.raises(ValidationError, match="goes with runtime = 'onnxruntime'"):
        GuardSpec.model_validate({**content, "runtime": "tensorrt", "serving": {"layout": "fused", "input": "uint8"}})
    with pytest.raises(NoisecError, match="start from its staged twin"):
        rearrange(fused, GUARD, ServingSpec(layout="fused", input="uint8"), tmp_path)
