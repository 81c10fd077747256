"""Amplified passes: in the graph, in the scorer, and, with a hardened copy's, on a real server in every layout."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import tensorrt_rtx_bindings as rtx
import torch
from conftest import GUARD, REPOSITORY
from pydantic import ValidationError
from torch import nn

from noisec import contract, manifest
from noisec.benchmarks.throughput.peers.servers.compute import open_guard
from noisec.builders.amplified import AMPLIFICATION, DEEPER, amplifiable, amplified, amplify, chosen_depths, with_amplified_passes
from noisec.builders.calibrate import fit_scorer
from noisec.builders.copies import with_copies
from noisec.builders.engine import build_plan
from noisec.builders.export import export_stage
from noisec.builders.hardened import with_weights
from noisec.builders.head import read_head
from noisec.builders.images import Splits
from noisec.builders.layout import rearrange
from noisec.builders.precision import lower
from noisec.builders.release import Release
from noisec.builders.repository import read_widths, write_repository
from noisec.builders.spec import DetectorSpec, EngineOptions, HardenedSpec, ServingSpec, changed
from noisec.builders.stages import StageRunner, ask_guard, in_process
from noisec.builders.torchgraph import TorchGraph
from noisec.clients import GuardClient
from noisec.errors import NoisecError
from noisec.python_backend.scorer.session import open_session
from noisec.python_backend.server import EmbeddedServer

CONFIDENCE = DetectorSpec(kind="confidence", view="amplified")
DISSENT = DetectorSpec(kind="dissent", view="hardened")


class Small(nn.Module):
    """A classifier of three convolutions, the last of which may speak too loud."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolutions = nn.ModuleList([nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 5, 3)])
        self.head = nn.Linear(5, 10)

    def forward(self, images: torch.Tensor, loud: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        for place, layer in enumerate(self.convolutions):
            images = (layer(images) * (AMPLIFICATION if place >= len(self.convolutions) - loud else 1)).relu()
        features = images.mean(dim=(2, 3))
        return self.head(features), features


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "model.onnx"
    export_stage(Small(), (1, 28, 28), contract.CLASSIFIER_OUTPUTS, path)
    return onnx.load(path)


@pytest.mark.parametrize("depths", [(1,), (3,), (1, 2), (2, 3), (3, 3)])
def test_the_last_layers_outputs_are_multiplied(small, pixels, depths):
    graph = amplified(small, depths)
    session = open_session(graph.SerializeToString())
    for depth in depths:
        found = session.run([f"{depth}/{name}" for name in contract.CLASSIFIER_OUTPUTS], {contract.IMAGE: pixels[:8]})
        with torch.no_grad():
            expected = Small()(torch.from_numpy(pixels[:8]), loud=depth)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other.numpy(), rtol=1e-4, atol=1e-5)
    assert len(amplifiable(small)) == 3, "the original is as it was"
    apart = max(depths) - 1 if len(set(depths)) > 1 else 0  # layers that the shallower copy does not have in common with the deeper one
    assert len(amplifiable(graph)) == 3 + apart


def test_branches_have_no_layers(small):
    model = onnx.ModelProto()
    model.CopyFrom(small)
    node = model.graph.node.add(op_type="If", input=["chosen"], output=["either"])
    node.attribute.append(onnx.helper.make_attribute("then_branch", onnx.helper.make_graph([], "empty", [], [])))
    with pytest.raises(NoisecError, match="branches or loops cannot be amplified: leave the detector"):
        amplified(model, [1])


def test_a_head_that_is_a_convolution_is_no_layer(small):
    model = onnx.ModelProto()
    model.CopyFrom(small)
    model.graph.node.add(op_type="Conv", input=[contract.PENULTIMATE, "head"], output=["behind"])
    assert amplifiable(model) == amplifiable(small)


def test_a_batch_norm_stands_for_its_convolution(small):
    assert len(amplifiable(small)) == 3
    model = onnx.ModelProto()
    model.CopyFrom(small)
    last = next(node for node in reversed(model.graph.node) if node.op_type == "Conv")
    made, last.output[0] = last.output[0], "raw"
    parts = ["scale", "shift", "mean", "variance"]
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.full(5, index != 1, np.float32), name) for index, name in enumerate(parts)
    )
    place = list(model.graph.node).index(last)
    model.graph.node.insert(place + 1, onnx.helper.make_node("BatchNormalization", ["raw", *parts], [made]))
    assert amplifiable(model) == amplifiable(small)


def test_views_and_kinds_go_together():
    with pytest.raises(ValidationError, match="kind 'confidence' has view 'amplified'; view is 'image'"):
        DetectorSpec(kind="confidence", view="image")
    with pytest.raises(ValidationError, match="kind 'mixture' has view 'noise' or .*; view is 'amplified'"):
        DetectorSpec(view="amplified")


def test_what_clean_images_bear_is_refused(report):
    classifier = onnx.load(REPOSITORY / f"{GUARD}_classifier" / "1" / "model.onnx")
    with pytest.raises(NoisecError, match="however many of the classifier's 3 convolutions .* at most [0-9] % .* leave the detector"):
        chosen_depths(classifier, report)


def test_the_depths_are_where_clean_images_fail_and_beyond(small, report, tmp_path):
    assert chosen_depths(small, report) == (1, min(1 + DEEPER, 3)), "untrained, it is wrong from the first layer on"
    onnx.save(small, tmp_path / "model.onnx")
    (tmp_path / "loud").mkdir()
    amplify(tmp_path, report, tmp_path / "loud")
    assert json.loads((tmp_path / "loud" / "amplified.json").read_text()) == {"amplified": [1, 3], "layers": 3}


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_an_amplified_stage_can_be_lowered(small, pixels, tmp_path, precision):
    folders = {name: tmp_path / name for name in ("loud", "plain", "whole", "low")}
    for folder in folders.values():
        folder.mkdir()
    amplify_to(folders["loud"], small, (1, 2))
    rearrange(REPOSITORY, GUARD, ServingSpec(layout="staged"), folders["plain"])
    with_amplified_passes(Release.newest(folders["plain"], GUARD).folder("autoencoder"), folders["loud"], folders["whole"])
    lower(folders["whole"], precision, [pixels], "max", folders["low"])
    names = [contract.PASSES[one] for one in contract.AMPLIFIED]
    both = (open_session(folders[one] / "model.onnx").run(names, {contract.IMAGE: pixels}) for one in ("whole", "low"))
    for exact, low in zip(*both, strict=True):
        assert 0 < np.abs(exact - low).max() < 0.1 * np.abs(exact).max()


def amplify_to(folder, classifier, depths):
    """What `amplify` writes, of depths that nobody chose."""
    onnx.save(amplified(classifier, depths), folder / "model.onnx")
    (folder / "amplified.json").write_text(json.dumps({"amplified": depths}))


def other_weights(classifier):
    """Those of its convolutions a little changed, as if it had been trained on."""
    generator = np.random.default_rng(0)
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in classifier.graph.initializer}
    named = [node.input[1] for node in classifier.graph.node if node.op_type == "Conv"]
    return {name: weights[name] * generator.normal(1, 0.1, weights[name].shape).astype(np.float32) for name in named}


@pytest.fixture(scope="module")
def amplifying(report, tmp_path_factory):
    """The reference guard with passes of all copies, staged, and in one process under another name."""
    folder = tmp_path_factory.mktemp("amplifying")
    rearrange(REPOSITORY, GUARD, ServingSpec(layout="staged", instances=1), folder / "plain")
    plain, content = Release.newest(folder / "plain", GUARD), manifest.read_manifest(REPOSITORY, GUARD)
    spec = changed(plain.spec, detectors=(*plain.spec.detectors, CONFIDENCE, DISSENT), hardened=HardenedSpec(eps=0.1))
    for name in ("loud", "amplified", "hardened"):
        (folder / name).mkdir()
    classifier = onnx.load(plain.folder("classifier") / "model.onnx")
    amplify_to(folder / "loud", classifier, (1, 2))
    with_amplified_passes(plain.folder("autoencoder"), folder / "loud", folder / "amplified")
    onnx.save(with_weights(classifier, other_weights(classifier)), folder / "hardened" / "model.onnx")
    with_copies(folder / "amplified", folder / "hardened", {"hardened": contract.PENULTIMATE}, folder)
    stages = {"autoencoder": folder, "classifier": plain.folder("classifier")}
    splits = Splits(report[:10], report[1000:2000], report[2000:3000], report[:200], ())
    run = StageRunner.of(spec, in_process(stages, 1))
    scorer = fit_scorer(spec, run, splits, read_head(stages["classifier"] / "model.onnx", report[:32].floats()))
    widths, names = read_widths(REPOSITORY, GUARD)
    repository = folder / "repository"
    for name in ("staged", "single", "graph"):
        named = changed(spec, name=name)
        write_repository(repository, named, widths, names, stages, scorer)
        manifest.write_manifest(repository, name, 1, {"versions": content["versions"], "spec": named.model_dump(mode="json")})
    for layout in ("single", "graph"):
        rearrange(repository, layout, ServingSpec(layout=layout), repository)
    rearrange(repository, "staged", ServingSpec(layout="fused"), folder / "fused")
    with EmbeddedServer(repository) as running:
        yield running, run, scorer, folder


def test_every_layout_gives_the_verdicts_of_the_scorer_that_was_fitted(amplifying, report):
    server, run, scorer, folder = amplifying
    expected = ask_guard(run, scorer, iter([report[:200].floats()]), 200, "amplified")
    for name in ("staged", "single", "graph"):
        with GuardClient(server.grpc_url, name) as client:
            found = client.classify(report[:200].pixels)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(found.is_malicious, expected.is_malicious)
        elsewhere = open_guard(folder / "repository", name)(report[:200].floats())
        np.testing.assert_allclose(elsewhere["score"], expected.scores, rtol=1e-3, atol=1e-3)
    fused = Release.newest(folder / "fused", "staged")
    again = ask_guard(StageRunner.of(fused.spec, in_process(fused.stages, 1)), scorer, iter([report[:200].floats()]), 200, "fused")
    np.testing.assert_allclose(again.scores, expected.scores, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["staged", "fused"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_tensorrt_parses_and_builds_a_stage_with_every_copy(amplifying, pixels, tmp_path, layout, precision):
    *_, folder = amplifying
    release = Release.newest(folder / ("fused" if layout == "fused" else "repository"), "staged")
    lower(release.folder("autoencoder"), precision, [pixels], "max", tmp_path)
    assert len(build_plan(rtx, tmp_path / "model.onnx", 64, EngineOptions(optimum=16))) > 100_000


@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_one_process_computes_once_what_the_images_passes_have_in_common(amplifying, report, tmp_path, kind):
    *_, folder = amplifying
    rearrange(folder / "repository", "staged", ServingSpec(layout="single", input=kind), tmp_path)
    release, whole = Release.newest(tmp_path, "staged"), tmp_path / "staged" / "1"
    images = report[:8].pixels if kind == "uint8" else report[:8].floats()
    names = [*contract.CLASSIFIER_OUTPUTS, *(contract.PASSES[one] for one in contract.COPIES)]
    asked = in_process(release.stages, 1)
    expected = asked("classifier", images, names[:2]) | asked("autoencoder", images, names[2:])
    found = open_session(whole / "image" / "model.onnx", 1).run(names, {contract.IMAGE: images})
    for name, rows in zip(names, found, strict=True):
        np.testing.assert_allclose(rows, expected[name], rtol=1e-4, atol=1e-4)
    layers = {part: len(amplifiable(onnx.load(whole / part / "model.onnx"))) for part in ("classifier", "image", "autoencoder")}
    before = len(amplifiable(onnx.load(release.folder("autoencoder") / "model.onnx")))
    assert layers["classifier"] == 3
    assert layers["image"] == 3 + 1 + 3, "the amplified copies change the input of one layer between them, the hardened one all"
    assert before - layers["autoencoder"] == 3 + 1 + 3, "where they were alone, they had all layers to compute"


@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_one_graph_makes_the_passes_of_every_copy_once(amplifying, report, tmp_path, kind):
    _, run, scorer, folder = amplifying
    rearrange(folder / "repository", "staged", ServingSpec(layout="graph", input=kind), tmp_path)
    graph, images = Release.newest(tmp_path, "staged").folder("scorer") / "model.onnx", report[:8]
    names = (contract.SCORE, contract.IS_MALICIOUS)
    score, malicious = open_session(graph, 1).run(names, {contract.IMAGE: images.pixels if kind == "uint8" else images.floats()})
    expected = scorer.verdict(run.batch(images.floats()))
    np.testing.assert_allclose(score[:, 0], expected.score, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(malicious[:, 0], expected.is_malicious)
    stage = Release.newest(tmp_path, "staged").folder("autoencoder") / "model.onnx"
    layers = [sum(node.op_type == "Conv" for node in onnx.load(path).graph.node) for path in (graph, stage)]
    assert layers[0] == layers[1], "the image's own layers for those that the amplified copies then share with it"


def test_the_amplified_passes_are_differentiable_and_alone_can_raise_the_alarm(amplifying, pixels):
    _, run, scorer, folder = amplifying
    images = torch.from_numpy(pixels[:4]).requires_grad_(True)
    graph = TorchGraph(folder / "model.onnx", "cpu")
    answers = dict(zip(graph.outputs, graph(images), strict=True))
    (slope,) = torch.autograd.grad(sum(answers[contract.PASSES[one]].square().sum() for one in contract.COPIES), images)
    assert slope.abs().sum() > 0
    tensors = run.batch(pixels[:4])
    assert not scorer.verdict(tensors).is_malicious.all()
    certain = tensors[contract.PASSES["image"]] * 50
    verdict = scorer.verdict({**tensors, **{contract.PASSES[one]: certain for one in contract.AMPLIFIED}})
    assert verdict.is_malicious.all(), "as sure as that of the label is no clean image"
    astray = scorer.verdict({**tensors, contract.PASSES["hardened"]: np.roll(tensors[contract.PASSES["image"]], 1, axis=0) * 20})
    assert astray.score.max() > verdict.score.min(), "nor is one of which the copy says something else"
