"""Fewer stages, one process, one graph, a quarter of the bytes: the same verdicts."""

from __future__ import annotations

import asyncio
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import tritonclient.grpc as triton_grpc
from conftest import GUARD, REPOSITORY, images_answered
from onnx import helper
from pydantic import ValidationError
from tritonclient.utils import InferenceServerException

from noisec import contract, manifest
from noisec.builders.compiling import compile_with
from noisec.builders.layout import fuse, rearrange
from noisec.builders.onegraph import guard_graph
from noisec.builders.passes import fused_passes
from noisec.builders.release import Release
from noisec.builders.repository import read_config
from noisec.builders.spec import EngineOptions, GuardSpec, ServingSpec, changed
from noisec.builders.stages import StageRunner, in_process
from noisec.builders.torchgraph import TorchGraph
from noisec.clients import AsyncGuardClient, GuardClient
from noisec.contract import stage_model
from noisec.errors import NoisecError
from noisec.manifest import read_manifest, releases, write_manifest
from noisec.python_backend.scorer.guard import Guard
from noisec.python_backend.scorer.session import open_session
from noisec.python_backend.server import EmbeddedServer, ended_by_the_impatient


def spec_of(repository: Path) -> GuardSpec:
    return GuardSpec.model_validate(manifest.read_manifest(repository, GUARD)["spec"])


def arranged(tmp_path_factory: pytest.TempPathFactory, **serving: Any) -> Path:
    """The reference guard with other serving settings, in a repository of its own."""
    folder = tmp_path_factory.mktemp("arranged")
    rearrange(REPOSITORY, GUARD, ServingSpec(**serving), folder)
    return folder


@pytest.fixture(scope="module")
def staged(tmp_path_factory) -> Path:
    return arranged(tmp_path_factory, layout="staged")


@pytest.fixture(scope="module")
def fused() -> Path:
    """The reference guard as it is shipped."""
    return REPOSITORY


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory) -> Path:
    return arranged(tmp_path_factory, layout="fused", input="uint8")


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    return arranged(tmp_path_factory, layout="single", instances=2)


@pytest.fixture(scope="module")
def single_bytes(tmp_path_factory) -> Path:
    return arranged(tmp_path_factory, layout="single", input="uint8")


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Path:
    return arranged(tmp_path_factory, layout="graph")


@pytest.fixture(scope="module")
def graph_bytes(tmp_path_factory) -> Path:
    return arranged(tmp_path_factory, layout="graph", input="uint8")


@pytest.fixture(scope="module")
def graph_server(graph) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(graph) as running:
        yield running


@pytest.fixture(scope="module")
def byte_server(bytewise) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(bytewise) as running:
        yield running


@pytest.fixture(scope="module")
def single_server(single) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(single) as running:
        yield running


@pytest.fixture(scope="module")
def blind_server(single, tmp_path_factory) -> Iterator[EmbeddedServer]:
    """A guard in one process whose autoencoder fails on every image."""
    copy = tmp_path_factory.mktemp("blind") / "copy"
    shutil.copytree(single, copy)
    path = copy / GUARD / "1" / "autoencoder" / "model.onnx"
    graph = onnx.load(path).graph
    nodes = [helper.make_node("Reshape", [contract.IMAGE, "shape"], [output.name]) for output in graph.output]
    shape = onnx.numpy_helper.from_array(np.array([5, 7]), "shape")
    opset = [helper.make_opsetid("", 18)]
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "blind", graph.input, graph.output, [shape]), opset_imports=opset, ir_version=9), path
    )
    with EmbeddedServer(copy, check=False) as running:
        yield running


@pytest.fixture(scope="module")
def staged_verdicts(staged, report):
    with EmbeddedServer(staged) as running, GuardClient(running.grpc_url, GUARD) as client:
        return client.classify(report[:200].pixels)


def same(found, wanted):
    np.testing.assert_array_equal(found.labels, wanted.labels)
    np.testing.assert_array_equal(found.is_malicious, wanted.is_malicious)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)


def test_other_layouts_are_whole_repositories_with_the_same_contract(staged, fused, bytewise, single, single_bytes, graph, graph_bytes):
    for repository in (staged, bytewise, single, single_bytes, graph, graph_bytes):
        assert manifest.verify_repository(repository) == []
        assert list(read_config(repository / GUARD).output) == list(read_config(REPOSITORY / GUARD).output)
    assert spec_of(fused).serving.layout == "fused"
    for repository, passes in ((fused, 1), (staged, 3)):
        steps = [step.model_name for step in read_config(repository / GUARD).ensemble_scheduling.step]
        assert steps == [f"{GUARD}_autoencoder", *[f"{GUARD}_classifier"] * passes, f"{GUARD}_scorer"]
    alone = read_config(single / GUARD)
    assert (alone.platform, alone.backend, alone.instance_group[0].count) == ("", "python", 2)
    one = read_config(graph / stage_model(GUARD, "scorer"))
    assert (one.backend, one.default_model_filename) == ("onnxruntime", "model.onnx")
    assert not list(graph.rglob("*.py"))


def test_one_process_gives_the_staged_verdicts(single_server, report, staged_verdicts):
    before = images_answered(single_server.grpc_url)
    with GuardClient(single_server.grpc_url, GUARD) as client:
        same(client.classify(report[:200].pixels), staged_verdicts)
        alone = [client.classify(report[row : row + 1].pixels) for row in range(20)]
        labels = client.classify(report[:200].pixels, labels_only=True)
    np.testing.assert_allclose(np.concatenate([one.scores for one in alone]), staged_verdicts.scores[:20], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(labels.labels, staged_verdicts.labels)
    after = images_answered(single_server.grpc_url)
    assert {name for name in after if after[name] > before[name]} == {GUARD}


@pytest.mark.parametrize("kind", ["floats", "bytes"])
def test_one_graph_gives_the_staged_verdicts(kind, graph_server, graph_bytes, report, staged_verdicts):
    with ExitStack() as stack:
        server = graph_server if kind == "floats" else stack.enter_context(EmbeddedServer(graph_bytes))
        before = images_answered(server.grpc_url)
        client = stack.enter_context(GuardClient(server.grpc_url, GUARD))
        found = client.classify(report[:200].pixels)
        after = images_answered(server.grpc_url)
    same(found, staged_verdicts)
    # a score that differs in its last digits may pass some of the calibration images'
    np.testing.assert_allclose(found.p_values, staged_verdicts.p_values, atol=1e-3)
    assert found.releases.tolist() == [1] * 200
    assert {name for name in after if after[name] > before[name]} == {GUARD, stage_model(GUARD, "scorer")}


def test_who_wants_labels_of_one_graph_asks_the_classifier(graph_server, report, staged_verdicts):
    before = images_answered(graph_server.grpc_url)
    with GuardClient(graph_server.grpc_url, GUARD) as client:
        labels = client.classify(report[:200].pixels, labels_only=True)

    async def ask():
        async with AsyncGuardClient(graph_server.grpc_url, GUARD) as client:
            return await client.classify(report[:200].pixels, labels_only=True)

    assert labels.labels.tolist() == asyncio.run(ask()).labels.tolist() == staged_verdicts.labels.tolist()
    after = images_answered(graph_server.grpc_url)
    assert {name for name in after if after[name] > before[name]} == {stage_model(GUARD, "classifier")}
    image = triton_grpc.InferInput(contract.IMAGE, (1, 1, 28, 28), "FP32").set_data_from_numpy(report[:1].floats())
    with triton_grpc.InferenceServerClient(graph_server.grpc_url) as raw:
        asked = raw.infer(GUARD, [image], outputs=[triton_grpc.InferRequestedOutput(contract.LOGITS)])
    np.testing.assert_allclose(asked.as_numpy(contract.LOGITS), labels.logits[:1], rtol=1e-4, atol=1e-4)


def test_one_graph_of_a_guard_that_looks_at_the_image_alone(staged, pixels):
    release = Release.newest(staged, GUARD)
    chosen = [place for place, detector in enumerate(release.spec.detectors) if detector.view == "image"]
    spec = changed(release.spec, detectors=[release.spec.detectors[place] for place in chosen], serving=ServingSpec(layout="graph"))
    scorer = replace(release.scorer, detectors=tuple(release.scorer.detectors[place] for place in chosen))
    assert len(chosen) == 2
    assert fused_passes(spec) == ()
    session = open_session(guard_graph(spec, release.stages, scorer).SerializeToString())
    found = dict(zip(contract.OUTPUTS, session.run(contract.OUTPUTS, {contract.IMAGE: pixels}), strict=True))
    tensors = tensors_of(staged, pixels)
    np.testing.assert_allclose(found[contract.LOGITS], tensors[contract.LOGITS], rtol=1e-4, atol=1e-4)
    for name, rows in scorer.outputs(tensors).items():
        np.testing.assert_allclose(found[name], rows, rtol=1e-3, atol=1e-3)


def test_an_image_alone_gets_the_same_verdict_on_two_cores(single, pixels):
    guard = Guard(single / GUARD / "1", 1, hurries=True)
    assert guard._hurried.get_session_options().intra_op_num_threads == 2
    for image in pixels[:5, None]:
        calm, hurried = guard.verdict(image), guard.verdict(image, hurry=True)
        assert calm.keys() == hurried.keys() == {contract.LOGITS, *contract.VERDICT}
        for name in calm:
            np.testing.assert_allclose(hurried[name], calm[name], rtol=1e-4, atol=1e-4)


def test_one_process_takes_bytes(single_bytes, report, staged_verdicts):
    with EmbeddedServer(single_bytes) as server, GuardClient(server.grpc_url, GUARD) as client:
        same(client.classify(report[:200].pixels), staged_verdicts)
        assert client.classify(report[:64].pixels, labels_only=True).labels.tolist() == staged_verdicts.labels[:64].tolist()


def test_a_request_without_an_answer_in_time_says_how_long_that_was(single_server, pixels):
    late = "no answer to 64 images within timeout = 0.0001 s: give a longer one, or send fewer images"
    with GuardClient(single_server.grpc_url, GUARD) as hasty:
        hasty._timeout = 1e-4
        with pytest.raises(NoisecError, match=late):
            hasty.classify(pixels)

    async def ask():
        async with AsyncGuardClient(single_server.grpc_url, GUARD) as hasty:
            hasty._timeout = 1e-4
            with pytest.raises(NoisecError, match=late):
                await hasty.classify(pixels)

    asyncio.run(ask())


def test_guards_that_impatient_clients_can_end_are_told(staged, fused, single, graph):
    assert ended_by_the_impatient(staged) == [GUARD]
    assert [ended_by_the_impatient(one) for one in (fused, single, graph)] == [[], [], []]


@pytest.mark.parametrize("name", ["started", "single_server", "graph_server"])
def test_impatient_clients_do_not_end_a_server(name, pixels, request):
    """As they end the embedded server with a staged guard after some dozens of requests: Triton before 26.05."""
    server = request.getfixturevalue(name)
    image = triton_grpc.InferInput(contract.IMAGE, (64, 1, 28, 28), "FP32").set_data_from_numpy(pixels[:64])
    with triton_grpc.InferenceServerClient(server.grpc_url) as raw, GuardClient(server.grpc_url, GUARD) as patient:
        expected = patient.classify(pixels[:20])
        for turn in range(200):
            with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
                raw.infer(GUARD, [image], client_timeout=0.001 + 0.0001 * (turn % 50))
        same(patient.classify(pixels[:20]), expected)


def test_a_full_queue_refuses_requests_and_answers_the_others(tmp_path_factory, pixels):
    repository = arranged(tmp_path_factory, layout="single", max_queue_size=2)
    with EmbeddedServer(repository) as running, GuardClient(running.grpc_url, GUARD) as client, ThreadPoolExecutor(12) as many:

        def ask(turn):
            try:
                return client.classify(pixels[:64])
            except NoisecError as error:
                return error

        expected, found = ask(0), list(many.map(ask, range(96)))
        refused = [one for one in found if isinstance(one, NoisecError)]
        answered = [one for one in found if not isinstance(one, NoisecError)]
        assert refused
        assert answered
        assert all("Exceeds maximum queue size" in str(error) for error in refused)
        for verdicts in [*answered, ask(0)]:
            same(verdicts, expected)


def test_impatient_clients_do_not_end_a_server_whose_queue_is_full(tmp_path_factory, pixels):
    """As they do where a stage of an ensemble refuses them."""
    repository = arranged(tmp_path_factory, layout="single", max_queue_size=8)
    with EmbeddedServer(repository) as running, ThreadPoolExecutor(16) as many, GuardClient(running.grpc_url, GUARD) as patient:
        expected = patient.classify(pixels[:20])

        def ask(turn):
            image = triton_grpc.InferInput(contract.IMAGE, (64, 1, 28, 28), "FP32").set_data_from_numpy(pixels[:64])
            with triton_grpc.InferenceServerClient(running.grpc_url) as raw:
                try:
                    raw.infer(GUARD, [image], client_timeout=0.003)
                except InferenceServerException as error:
                    return str(error)

        said = set(many.map(ask, range(1000)))
        assert running.is_alive()
        assert any("Exceeds maximum queue size" in str(one) for one in said)
        assert any("Deadline Exceeded" in str(one) for one in said)
        time.sleep(1)  # until the last of them, which nobody waits for, have left the queue
        same(patient.classify(pixels[:20]), expected)


@pytest.mark.parametrize("layout", ["fused", "single", "graph"])
def test_a_longer_queue_is_parted_into_preferred_batches(layout, tmp_path_factory, pixels):
    repository = arranged(tmp_path_factory, layout=layout, preferred_batch_size=4)
    with EmbeddedServer(repository) as running, GuardClient(running.grpc_url, GUARD) as client, ThreadPoolExecutor(32) as many:
        expected = client.classify(pixels[:32])
        found = list(many.map(lambda turn: client.classify(pixels[turn % 32]), range(320)))
        images_answered(running.grpc_url)
        with triton_grpc.InferenceServerClient(running.grpc_url) as raw:
            statistics = raw.get_inference_statistics().model_stats
    assert [one.labels[0] for one in found] == [*expected.labels] * 10
    assert [one.is_malicious[0] for one in found] == [*expected.is_malicious] * 10
    model = {"fused": stage_model(GUARD, "autoencoder"), "single": GUARD, "graph": stage_model(GUARD, "scorer")}[layout]
    (executed,) = [{part.batch_size for part in one.batch_stats} for one in statistics if one.name == model]
    assert 4 in executed
    assert executed <= {1, 2, 3, 4, 32}


@pytest.mark.parametrize("name", ["single_server", "graph_server"])
def test_no_image_is_malicious_in_one_model_too(name, pixels, request):
    images = pixels[:4].copy()
    images[0, 0, 3, 3], images[1, 0, 0, 0], images[2, 0, 5, 5] = np.nan, np.inf, 1.5
    with triton_grpc.InferenceServerClient(request.getfixturevalue(name).grpc_url) as client:
        for batch in (images, images[:1], images[1:2], images[2:3]):
            sent = triton_grpc.InferInput(contract.IMAGE, batch.shape, "FP32").set_data_from_numpy(batch)
            answer = client.infer(GUARD, [sent])
            assert answer.as_numpy(contract.IS_MALICIOUS)[:3].all()
            assert (answer.as_numpy(contract.SCORE)[:3] == np.finfo(np.float32).max).all()
            assert (answer.as_numpy(contract.P_VALUE)[:3] < 0.01).all()


def test_a_guard_in_one_process_whose_graph_lacks_a_tensor_does_not_load(single, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(single, copy)
    shutil.copyfile(copy / GUARD / "1/classifier/model.onnx", copy / GUARD / "1/autoencoder/model.onnx")
    with pytest.raises(NoisecError, match="scorer.npz needs .*NOISE_LEVEL.* which the graphs beside it do not make"):
        EmbeddedServer(copy, check=False).start()


def test_labels_of_one_graph_are_answered_where_models_are_loaded_by_name(graph, report, staged_verdicts):
    with EmbeddedServer(graph, model_control="explicit") as server, GuardClient(server.grpc_url, GUARD) as client:
        labels = client.classify(report[:200].pixels, labels_only=True).labels
        with triton_grpc.InferenceServerClient(server.grpc_url) as raw:
            assert not raw.is_model_ready(stage_model(GUARD, "autoencoder")), "nothing else is loaded"
    np.testing.assert_array_equal(labels, staged_verdicts.labels)


@pytest.mark.parametrize("layout", ["single", "graph"])
def test_one_layout_in_place_of_another_is_served_after_a_refresh(layout, fused, tmp_path, report, staged_verdicts):
    copy = tmp_path / "copy"
    shutil.copytree(fused, copy)
    with EmbeddedServer(copy, model_control="explicit") as server, GuardClient(server.grpc_url, GUARD) as client:
        rearrange(copy, GUARD, ServingSpec(layout=layout), copy)
        server.refresh()
        triton_grpc.InferenceServerClient(server.grpc_url).load_model(GUARD)
        same(client.classify(report[:200].pixels), staged_verdicts)
    assert manifest.verify_repository(copy) == []


def test_an_ensemble_in_place_of_a_single_guard_is_served_after_a_refresh(single, tmp_path, report, staged_verdicts):
    copy = tmp_path / "copy"
    shutil.copytree(single, copy)
    with EmbeddedServer(copy, model_control="explicit") as server, GuardClient(server.grpc_url, GUARD) as client:
        shutil.rmtree(copy)
        shutil.copytree(REPOSITORY, copy)
        server.refresh()
        with triton_grpc.InferenceServerClient(server.grpc_url) as raw:
            for model in [*(stage_model(GUARD, stage) for stage in contract.STAGES), GUARD]:
                raw.load_model(model)
        same(client.classify(report[:200].pixels), staged_verdicts)


def test_where_a_verdict_fails_labels_are_still_given_and_no_verdict_is(blind_server, report, staged_verdicts):
    images = [
        triton_grpc.InferInput(contract.IMAGE, (1, 1, 28, 28), "FP32").set_data_from_numpy(report[[row]].floats()) for row in range(16)
    ]
    answers: queue.Queue[tuple[int, tuple[str, ...], object, object]] = queue.Queue()
    with triton_grpc.InferenceServerClient(blind_server.grpc_url) as client:
        for row, image in enumerate(images):
            names = (contract.LOGITS,) if row % 2 else contract.OUTPUTS
            outputs = [triton_grpc.InferRequestedOutput(name) for name in names]
            client.async_infer(
                GUARD, [image], lambda result, error, row=row, names=names: answers.put((row, names, result, error)), outputs=outputs
            )
        for row, names, result, error in [answers.get(timeout=60) for _ in images]:
            if names == contract.OUTPUTS:
                assert result is None
                assert "Reshape" in str(error)
            else:
                assert result.as_numpy(contract.LOGITS).argmax() == staged_verdicts.labels[row]


def test_fused_verdicts_are_the_staged_ones(started, report, staged_verdicts):
    with GuardClient(started.grpc_url, GUARD) as client:
        same(client.classify(report[:200].pixels), staged_verdicts)
        same(client.classify(report[:1].pixels), client.classify(report[:1].floats()))


def test_a_label_costs_only_the_classifier(started, byte_server, report):
    for server in (started, byte_server):
        before = images_answered(server.grpc_url)
        with GuardClient(server.grpc_url, GUARD) as client:
            client.classify(report[:8].pixels, labels_only=True)
        after = images_answered(server.grpc_url)
        assert {name for name in after if after[name] > before[name]} == {GUARD, stage_model(GUARD, "classifier")}


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


def tensors_of(repository: Path, images):
    return StageRunner.of(spec_of(repository), in_process(Release.newest(repository, GUARD).stages, 1)).batch(images)


@pytest.mark.parametrize("name", ["fused", "bytewise", "single", "single_bytes", "graph", "graph_bytes"])
def test_builders_get_the_same_tensors_from_every_layout(name, pixels, staged, request):
    wanted, found = tensors_of(staged, pixels[:20]), tensors_of(request.getfixturevalue(name), pixels[:20])
    assert wanted.keys() == found.keys()
    for key, rows in wanted.items():
        np.testing.assert_allclose(found[key], rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["staged", "bytewise", "single", "single_bytes", "graph", "graph_bytes"])
@pytest.mark.parametrize("back", [{"layout": "staged"}, {"layout": "fused"}, {"layout": "fused", "input": "uint8"}])
def test_every_layout_can_be_left_again(name, back, staged, pixels, tmp_path, request):
    rearrange(request.getfixturevalue(name), GUARD, ServingSpec(**back), tmp_path)
    assert manifest.verify_repository(tmp_path) == []
    graph = onnx.load(tmp_path / f"{GUARD}_classifier/1/model.onnx").graph
    assert graph.input[0].type.tensor_type.elem_type == (onnx.TensorProto.UINT8 if "input" in back else onnx.TensorProto.FLOAT)
    wanted, found = tensors_of(staged, pixels[:20]), tensors_of(tmp_path, pixels[:20])
    assert wanted.keys() == found.keys()
    for key, rows in wanted.items():
        np.testing.assert_allclose(found[key], rows, rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_a_fused_stage(fused, pixels):
    stage = Release.newest(fused, GUARD).stages["autoencoder"] / "model.onnx"
    images = torch.from_numpy(pixels[:8]).requires_grad_(True)
    answers = TorchGraph(stage).named(images)
    session = open_session(stage)
    wanted = [output.name for output in session.get_outputs()]
    for name, expected in zip(wanted, session.run(wanted, {contract.IMAGE: pixels[:8]}), strict=True):
        np.testing.assert_allclose(answers[name].detach().numpy(), expected, rtol=1e-3, atol=1e-4)
    (slope,) = torch.autograd.grad(answers[contract.PASSES["noise"]].square().sum(), images)
    assert (slope.flatten(1).abs().amax(dim=1) > 0).all()


def test_a_stage_of_bytes_takes_no_noise(bytewise, pixels):
    infer = in_process(Release.newest(bytewise, GUARD).stages, 1)
    with pytest.raises(NoisecError, match="takes bytes"):
        infer("classifier", pixels[:2] - 0.5, [contract.PENULTIMATE])


def test_graphs_of_different_opsets_are_joined(pixels, staged, fused, tmp_path):
    folders = Release.newest(staged, GUARD).stages
    autoencoder, classifier = (onnx.load(folders[stage] / "model.onnx") for stage in ("autoencoder", "classifier"))
    older = onnx.version_converter.convert_version(classifier, 16)
    onnx.save(fuse(autoencoder, older, spec_of(fused)), tmp_path / "model.onnx")
    names = [contract.PASSES["noise"], contract.PASSES["reconstruction"]]
    found = open_session(tmp_path / "model.onnx").run(names, {contract.IMAGE: pixels[:5]})
    wanted = open_session(fused / f"{GUARD}_autoencoder/1/model.onnx").run(names, {contract.IMAGE: pixels[:5]})
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_classifier_that_mixes_the_rows_of_a_batch_stays_staged(staged, tmp_path):
    copy = tmp_path / "mixing"
    shutil.copytree(staged, copy)
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
    with pytest.raises(NoisecError, match=r"not as it was built(.|\n)*classifier/1/model.onnx: changed since the build"):
        rearrange(copy, GUARD, ServingSpec(layout="fused"), tmp_path / "fused")
    content = {key: value for key, value in read_manifest(copy, GUARD).items() if key not in ("guard", "release", "files")}
    write_manifest(copy, GUARD, 1, content)
    with pytest.raises(NoisecError, match="mixes the rows of a batch; serve it staged"):
        rearrange(copy, GUARD, ServingSpec(layout="fused"), tmp_path / "fused")


def test_a_guard_is_arranged_from_the_command_line(tmp_path):
    def arrange(*options):
        command = ["arrange", str(REPOSITORY), "--guard", GUARD, "--out", str(tmp_path / "new"), *options]
        return subprocess.run([sys.executable, "-m", "noisec", *command], capture_output=True, text=True)

    assert "say what to change" in arrange().stderr
    assert "max_queue_size = 9 goes with layout 'single'" in arrange("--max-queue-size", "9").stderr
    assert "preferred_batch_size = 99 is above max_batch_size = 64" in arrange("--preferred-batch-size", "99").stderr
    assert "serving.instances: Input should be less than 2147483648" in arrange("--instances", "99999999999").stderr
    assert not (tmp_path / "new").exists()
    done = arrange("--layout", "single", "--input", "uint8", "--instances", "2", "--max-queue-size", "9", "--preferred-batch-size", "4")
    assert done.returncode == 0, done.stderr
    serving = spec_of(tmp_path / "new").serving
    assert serving == ServingSpec(layout="single", input="uint8", instances=2, max_queue_size=9, preferred_batch_size=4)
    assert manifest.verify_repository(tmp_path / "new") == []
    assert "name a new folder" in arrange("--layout", "fused").stderr


def test_what_does_not_go_together_is_refused(single):
    content = spec_of(REPOSITORY).model_dump()
    with pytest.raises(ValidationError, match="goes with layout 'fused', 'single' or 'graph'"):
        GuardSpec.model_validate({**content, "serving": {"layout": "staged", "input": "uint8"}})
    with pytest.raises(ValidationError, match="goes with runtime = 'onnxruntime'"):
        GuardSpec.model_validate({**content, "runtime": "tensorrt", "serving": {"layout": "fused", "input": "uint8"}})
    for layout in ("single", "graph"):
        with pytest.raises(ValidationError, match=f"'{layout}' goes with runtime = 'onnxruntime'"):
            GuardSpec.model_validate({**content, "runtime": "tensorrt", "serving": {"layout": layout}})
    with pytest.raises(ValidationError, match="'graph' goes without \\[memory\\]: a graph remembers nothing"):
        GuardSpec.model_validate({**content, "memory": {}, "serving": {"layout": "graph"}})
    for layout in ("fused", "graph"):
        with pytest.raises(ValidationError, match="max_queue_size = 9 goes with layout 'single': a full queue .* can end Triton 24.10"):
            GuardSpec.model_validate({**content, "serving": {"layout": layout, "max_queue_size": 9}})
    with pytest.raises(NoisecError, match="fashion_mnist cannot be changed so:\n.*'single' goes with runtime = 'onnxruntime'"):
        compile_with(None, "9.0", single, GUARD, EngineOptions())
    assert releases(single, GUARD) == [1]
