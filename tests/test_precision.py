"""Lower precision stays where it belongs, and TensorRT takes every stage in every precision."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorrt_rtx_bindings as rtx
from conftest import GUARD, REPOSITORY
from google.protobuf import text_format
from onnx import TensorProto
from tritonclient.grpc import model_config_pb2

from noisec import contract
from noisec.builders import variants
from noisec.builders.build import build
from noisec.builders.compiling import compile_with
from noisec.builders.engine import build_plan, gpus
from noisec.builders.images import Splits, in_batches
from noisec.builders.layout import arrange, rearrange
from noisec.builders.precision import LOWERED, lower
from noisec.builders.release import Release
from noisec.builders.sanity import precision_problems
from noisec.builders.spec import GUARDS, EngineOptions, ServingSpec, read_spec
from noisec.builders.variants import NETWORK_STAGES, classifier_feeds
from noisec.builders.workbench import Workbench
from noisec.contract import stage_model
from noisec.errors import NoisecError
from noisec.manifest import read_manifest, releases, verify
from noisec.python_backend.scorer.session import open_session
from noisec.python_backend.server import EmbeddedServer

PRECISIONS = ("fp32", "fp16", "int8")
PAIRS = [(stage, precision) for stage in NETWORK_STAGES for precision in PRECISIONS]
LOWER_PAIRS = [pair for pair in PAIRS if pair[1] != "fp32"]


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """Stage -> folder of its graph as it is before it is arranged, which is what is lowered."""
    staged = tmp_path_factory.mktemp("staged")
    rearrange(REPOSITORY, GUARD, ServingSpec(layout="staged"), staged)
    return Release.newest(staged, GUARD).stages


@pytest.fixture(scope="module")
def stages(tmp_path_factory, report, exact):
    """(stage, precision) -> folder, made from 500 real clean images."""
    images = report[:500].floats()
    folders = {}
    for stage, precision in PAIRS:
        folders[stage, precision] = tmp_path_factory.mktemp(f"{stage}-{precision}")
        feeds = in_batches(images) if stage == "autoencoder" else classifier_feeds(exact["autoencoder"], in_batches(images), contract.NOISE)
        lower(exact[stage], precision, feeds, "entropy", folders[stage, precision])
    return folders


def run(folder, outputs, images):
    return dict(zip(outputs, open_session(folder / "model.onnx").run(list(outputs), {contract.IMAGE: images}), strict=True))


@pytest.mark.parametrize(("stage", "precision"), PAIRS)
def test_inputs_and_outputs_are_fp32_in_every_precision(stages, stage, precision):
    graph = onnx.load(stages[stage, precision] / "model.onnx").graph
    assert {value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]} == {TensorProto.FLOAT}
    assert [value.name for value in graph.input] == [contract.IMAGE]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_noise_is_subtracted_from_the_image_as_it_came_in(stages, pixels, precision):
    answer = run(stages["autoencoder", precision], contract.AUTOENCODER_OUTPUTS, pixels)
    assert np.abs(answer[contract.NOISE] + answer[contract.RECONSTRUCTION] - pixels).max() < 1e-6
    graph = onnx.load(stages["autoencoder", precision] / "model.onnx").graph
    (subtraction,) = [node for node in graph.node if contract.NOISE in node.output]
    assert subtraction.op_type == "Sub"
    assert subtraction.input[0] == contract.IMAGE


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_range_check_is_exact_in_every_precision(stages, pixels, precision):
    images = np.repeat(pixels[:1], 6, axis=0)
    images[:, 0, 3, 4] = [0, 1, 1.0002, -0.0002, np.nan, np.inf]
    inside = run(stages["autoencoder", precision], [contract.IN_RANGE], images)[contract.IN_RANGE][:, 0]
    assert inside.tolist() == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(("stage", "precision"), LOWER_PAIRS)
def test_the_graph_really_is_in_lower_precision(stages, stage, precision):
    graph = onnx.load(stages[stage, precision] / "model.onnx").graph
    weights = [tensor for tensor in graph.initializer if len(tensor.dims) > 1]
    kind = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.INT8
    lowered = sum(int(np.prod(tensor.dims)) for tensor in weights if tensor.data_type == kind)
    share = lowered / sum(int(np.prod(tensor.dims)) for tensor in weights)
    if precision == "int8":  # weights may stay fp32 in front of their quantisation
        kinds = [node.op_type for node in graph.node]
        share = kinds.count("QuantizeLinear") / max(1, sum(kind in LOWERED for kind in kinds))
    assert share > 0.9


def test_a_graph_whose_nodes_have_no_names_is_quantised_all_the_same(exact, report, tmp_path):
    (tmp_path / "unnamed").mkdir()
    (tmp_path / "lowered").mkdir()
    model = onnx.load(exact["classifier"] / "model.onnx")
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, tmp_path / "unnamed" / "model.onnx")
    images = in_batches(report[:50].floats())
    feeds = classifier_feeds(exact["autoencoder"], images, contract.NOISE)
    lower(tmp_path / "unnamed", "int8", feeds, "max", tmp_path / "lowered")
    kinds = [node.op_type for node in onnx.load(tmp_path / "lowered" / "model.onnx").graph.node]
    assert kinds.count("QuantizeLinear") >= sum(kind in LOWERED for kind in kinds) - 2


def test_other_noise_or_another_denoiser_is_calibrated_anew(exact, report, spec, tmp_path, monkeypatch):
    splits = Splits(report[:9], report[:9], report[:9], report[:9], ())
    monkeypatch.setattr(variants, "lower", lambda *given: None)
    noisy = spec.model_copy(update={"natural_noise_sd": 0.2})
    other = {**exact, "autoencoder": tmp_path / "another"}
    bench = Workbench(tmp_path / "bench")
    ways = [(spec, exact), (noisy, exact), (spec, other), (spec, exact)]
    folders = [variants.lowered(one, stages, "classifier", "int8", splits, bench) for one, stages in ways]
    assert len(set(folders)) == 3
    assert folders[0] == folders[-1]


@pytest.mark.parametrize("stage", NETWORK_STAGES)
def test_int8_scales_are_fp32(stages, stage):
    graph = onnx.load(stages[stage, "int8"] / "model.onnx").graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    assert {kinds[node.input[1]] for node in pairs} == {TensorProto.FLOAT}


@pytest.mark.parametrize("output", [contract.PENULTIMATE, contract.LOGITS])
def test_outputs_of_the_classifier_are_never_quantised(stages, output):
    graph = onnx.load(stages["classifier", "int8"] / "model.onnx").graph
    producer = {name: node for node in graph.node for name in node.output}
    node = producer[output]
    while node.op_type not in LOWERED:
        assert node.op_type not in ("QuantizeLinear", "DequantizeLinear")
        node = producer[node.input[0]]


@pytest.mark.parametrize("stage", NETWORK_STAGES)
def test_what_reads_the_image_is_not_quantised(stages, stage):
    graph = onnx.load(stages[stage, "int8"] / "model.onnx").graph
    readers = {node.op_type for node in graph.node if contract.IMAGE in node.input}
    assert "QuantizeLinear" not in readers
    assert "Conv" in readers


@pytest.mark.parametrize(("stage", "precision"), LOWER_PAIRS)
def test_answers_drift_little(stages, exact, pixels, stage, precision):
    outputs = contract.AUTOENCODER_OUTPUTS[1:2] if stage == "autoencoder" else (contract.LOGITS,)
    found = run(stages[stage, precision], outputs, pixels)[outputs[0]]
    wanted = run(exact[stage], outputs, pixels)[outputs[0]]
    limit = {"fp16": 0.01, "int8": 0.15}[precision] * np.abs(wanted).max()
    assert 0 < np.abs(found - wanted).max() < limit
    if stage == "classifier":
        assert np.mean(found.argmax(axis=1) == wanted.argmax(axis=1)) >= 0.985


@pytest.mark.parametrize(("stage", "precision"), PAIRS)
def test_tensorrt_parses_and_builds_every_stage_in_every_precision(stages, stage, precision):
    path = stages[stage, precision] / "model.onnx"
    plan = build_plan(rtx, path, largest=64, options=EngineOptions(optimum=16))
    assert len(plan) > 100_000
    assert plan != build_plan(rtx, path, largest=8, options=EngineOptions(optimum=1, level=0))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensorrt_parses_and_builds_fused_stages_in_every_precision(stages, precision, tmp_path):
    arrange(Release.newest(REPOSITORY, GUARD).spec, {stage: stages[stage, precision] for stage in NETWORK_STAGES}, "autoencoder", tmp_path)
    apart = build_plan(rtx, stages["autoencoder", precision] / "model.onnx", 64, EngineOptions(optimum=16))
    assert len(build_plan(rtx, tmp_path / "model.onnx", 64, EngineOptions(optimum=16))) > len(apart)


def test_a_stage_that_tensorrt_cannot_parse_is_named_with_its_reason(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(NoisecError, match=r"model\.onnx: TensorRT cannot parse this stage: .+"):
        build_plan(rtx, tmp_path / "model.onnx", 64, EngineOptions())


WITHOUT_GPU = pytest.mark.skipif(gpus() > 0, reason="this machine has an NVIDIA GPU")


@WITHOUT_GPU
def test_without_a_gpu_compile_says_so_in_one_sentence_and_changes_nothing(tmp_path):
    copy = Path(shutil.copytree(REPOSITORY, tmp_path / "repository"))
    done = subprocess.run(
        [sys.executable, "-m", "noisec", "compile", copy, "--guard", GUARD, "--runtime", "tensorrt"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == (
        "noisec: no NVIDIA GPU on this machine: TensorRT plans are compiled on the GPU that runs them; nothing was changed\n"
    )
    assert releases(copy, GUARD) == [1]
    assert verify(copy, GUARD) == []


@WITHOUT_GPU
def test_without_a_gpu_a_build_for_tensorrt_ends_before_anything_is_trained(tmp_path):
    spec = read_spec(GUARDS / "demo.toml").model_copy(update={"runtime": "tensorrt"})
    with pytest.raises(NoisecError, match="no NVIDIA GPU on this machine"):
        build(spec, tmp_path / "repository", tmp_path / "work")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The reference guard with plans of TensorRT for RTX, configured for GPUs of compute capability 9.0."""
    copy = Path(shutil.copytree(REPOSITORY, tmp_path_factory.mktemp("compiled") / "repository"))
    assert compile_with(rtx, "9.0", copy, GUARD, EngineOptions(optimum=8)) == 2
    return copy


def test_a_compiled_release_holds_plans_beside_the_graphs(compiled):
    assert verify(compiled, GUARD) == []
    for stage in NETWORK_STAGES:
        config = text_format.Parse((compiled / stage_model(GUARD, stage) / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        folder = compiled / stage_model(GUARD, stage) / "2"
        assert config.backend == "tensorrt"
        assert dict(config.cc_model_filenames) == {"9.0": "model_sm90.plan"}
        assert {path.name for path in folder.iterdir()} >= {"model.onnx", "model_sm90.plan"}
        assert [spec.batch_size for spec in config.optimization.cuda.graph_spec] == [1, 2, 4, 8, 16, 32, 64]
        assert [warmup.batch_size for warmup in config.model_warmup] == [1, 64]
        assert list(config.version_policy.specific.versions) == [2]
    assert read_manifest(compiled, GUARD)["compiled"]["scorer_fitted_on_release"] == 1


@WITHOUT_GPU
def test_the_real_server_takes_a_compiled_release_up_to_where_it_asks_for_the_gpu(compiled):
    for stage in NETWORK_STAGES:
        name = stage_model(GUARD, stage)
        reason = rf"{name}: a TensorRT plan needs (the package tensorrt: it is not installed here|an NVIDIA GPU and this server sees none)"
        with pytest.raises(NoisecError, match=reason):
            EmbeddedServer(compiled).start()


def test_a_precision_is_compared_in_its_own_runtime_where_that_is_the_only_one():
    figures = {"auroc": 0.95, "label_agreement": 1.0}
    table = {"fp32": {"tensorrt": figures}, "fp16": {"tensorrt": {**figures, "auroc": 0.9}}}
    assert precision_problems("fp32", table, "tensorrt") == []
    assert len(precision_problems("fp16", table, "tensorrt")) == 1
    assert precision_problems("fp16", {}, "tensorrt") == []


@pytest.mark.parametrize("change", [{"auroc": 0.93}, {"label_agreement": 0.99}])
def test_a_precision_that_loses_too_much_is_refused(change):
    exact_figures = {"auroc": 0.95, "label_agreement": 1.0}
    kept = {"auroc": 0.945, "label_agreement": 0.996}
    table = {"fp32": {"onnxruntime": exact_figures}, "int8": {"onnxruntime": kept}}
    assert precision_problems("int8", table, "onnxruntime") == []
    table["int8"]["onnxruntime"] = {**kept, **change}
    (problem,) = precision_problems("int8", table, "onnxruntime")
    assert "precision int8" in problem
