"""The GPU check runs nothing without a GPU, its torch operations are ONNX Runtime's, and its result says what was left out."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import tensorrt_rtx_bindings as rtx
import torch
from conftest import GUARD, REPOSITORY, ROOT
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from noisec import contract
from noisec.benchmarks.gpu import check, measure, pack
from noisec.benchmarks.gpu.check import compile_copy, publish, serve
from noisec.benchmarks.gpu.measure import agreement, answers_of, differences, speed
from noisec.benchmarks.gpu.pack import REQUIREMENTS, install_script, lower_guard, split_into_pieces
from noisec.benchmarks.gpu.prepared import ATTACKED, Guard, Prepared
from noisec.benchmarks.gpu.report import Result
from noisec.benchmarks.gpu.stages import asking
from noisec.builders import engine
from noisec.builders.classifier import choose_penultimate, dissect, make_stage, read_model
from noisec.builders.engine import gpus
from noisec.builders.export import export_plain
from noisec.builders.figures import Answers
from noisec.builders.images import Splits
from noisec.builders.layout import rearrange
from noisec.builders.passes import fused_passes
from noisec.builders.repository import ensemble_steps
from noisec.builders.spec import PreprocessingSpec, ServingSpec, changed
from noisec.builders.stages import in_process, on_gpu
from noisec.builders.torchgraph import TorchGraph
from noisec.builders.variants import NETWORK_STAGES
from noisec.cli import app
from noisec.errors import NoisecError
from noisec.manifest import manifest_path, read_manifest, verify_repository, write_manifest
from noisec.python_backend.runtimes.tensorrt import names
from noisec.python_backend.scorer.scoring import Scorer
from noisec.python_backend.scorer.session import open_session

WITHOUT_GPU = pytest.mark.skipif(gpus() > 0, reason="this machine has an NVIDIA GPU")
FACTS = {
    "gpu": {"name": "NVIDIA Example 1", "compute_capability": "9.0", "memory_gib": 8.0, "driver": "1.2"},
    "versions": {"torch": "2"},
    "guard": GUARD,
    "release": 1,
}


@pytest.fixture(scope="module")
def guard() -> Guard:
    return Guard.newest(REPOSITORY, GUARD)


@WITHOUT_GPU
@pytest.mark.parametrize("start", [["-m", "noisec.benchmarks.gpu.check"], [str(ROOT / "benchmarks" / "gpu" / "check.py")]])
def test_without_a_gpu_the_check_says_so_and_writes_nothing(tmp_path, start):
    done = subprocess.run([sys.executable, *start, str(REPOSITORY)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "gpu check: no NVIDIA GPU on this machine: the GPU check measures one; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", NETWORK_STAGES)
@pytest.mark.parametrize("feed", ["image", "noise"])
def test_torch_operations_answer_as_onnx_runtime(guard, pixels, stage, feed):
    images = pixels
    if feed == "noise":
        (images,) = open_session(guard.folder("autoencoder") / "model.onnx").run([contract.NOISE], {contract.IMAGE: pixels})
    path = guard.folder(stage) / "model.onnx"
    graph = TorchGraph(path)
    wanted = open_session(path).run(list(graph.outputs), {contract.IMAGE: images})
    assert len(wanted) == {"autoencoder": 4 + len(fused_passes(guard.spec)), "classifier": 2}[stage]
    for name, found, expected in zip(graph.outputs, graph(torch.from_numpy(images)), wanted, strict=True):
        assert found.shape == expected.shape, name
        assert np.abs(found.numpy() - expected).max() < 1e-4, name
    assert graph.shape == images.shape[1:]


def check_against_onnx_runtime(path: Path) -> None:
    """A graph of one output answers normal noise as ONNX Runtime does."""
    images = np.random.default_rng(0).normal(0, 3, (3, 1, 6, 6)).astype(np.float32)
    (wanted,) = open_session(path).run(None, {contract.IMAGE: images})
    (found,) = TorchGraph(path)(torch.from_numpy(images))
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "attributes", "constants"),
    [
        ("AveragePool", {"kernel_shape": [2, 2], "strides": [2, 2]}, ()),
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, ()),
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}, ()),
        ("Squeeze", {}, (np.array([1]),)),
        ("Transpose", {"perm": [0, 2, 3, 1]}, ()),
        ("Transpose", {}, ()),
        ("Gather", {"axis": 2}, (np.array([3, 1]),)),
        ("LeakyRelu", {}, ()),
        ("LeakyRelu", {"alpha": 0.2}, ()),
        ("Clip", {}, (np.float32(0), np.float32(6))),
        ("Clip", {}, (np.float32(-1),)),
        ("Sigmoid", {}, ()),
        ("HardSigmoid", {}, ()),
        ("HardSwish", {}, ()),
        ("Tanh", {}, ()),
        ("Softmax", {"axis": 2}, ()),
        ("Elu", {"alpha": 0.5}, ()),
        ("Selu", {}, ()),
        ("PRelu", {}, (np.full((1, 1, 1), 0.3, np.float32),)),
        ("Gelu", {}, ()),
        ("Gelu", {"approximate": "tanh"}, ()),
        ("Softplus", {}, ()),
        ("Erf", {}, ()),
        ("Exp", {}, ()),
        ("Neg", {}, ()),
        ("ReduceMax", {"keepdims": 0}, (np.array([2, 3]),)),
        ("ReduceSum", {}, (np.array([2]),)),
        ("ReduceMean", {}, ()),
        ("InstanceNormalization", {"epsilon": 1e-4}, (np.full(1, 2, np.float32), np.full(1, 0.5, np.float32))),
        ("GlobalMaxPool", {}, ()),
    ],
)
def test_operations_of_other_classifiers_answer_as_onnx_runtime(tmp_path, kind, attributes, constants):
    image = helper.make_tensor_value_info(contract.IMAGE, TensorProto.FLOAT, ["n", 1, 6, 6])
    out = helper.make_tensor_value_info("OUT", TensorProto.FLOAT, None)
    held = [numpy_helper.from_array(np.asarray(value), f"c{index}") for index, value in enumerate(constants)]
    node = helper.make_node(kind, [contract.IMAGE, *(one.name for one in held)], ["OUT"], **attributes)
    graph = helper.make_graph([node], "g", [image], [out], initializer=held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "model.onnx")
    check_against_onnx_runtime(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [("Squeeze", {"axes": [1]}), ("Unsqueeze", {"axes": [0]}), ("ReduceMean", {"axes": [2], "keepdims": 0}), ("Softmax", {"axis": 3})],
)
def test_graphs_of_old_opsets_answer_as_onnx_runtime(tmp_path, kind, attributes):
    image = helper.make_tensor_value_info(contract.IMAGE, TensorProto.FLOAT, [3, 1, 6, 6])
    out = helper.make_tensor_value_info("OUT", TensorProto.FLOAT, None)
    two = helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.float32(2)))
    nodes = [two, helper.make_node("Mul", [contract.IMAGE, "two"], ["twice"]), helper.make_node(kind, ["twice"], ["OUT"], **attributes)]
    graph = helper.make_graph(nodes, "g", [image], [out])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7), tmp_path / "model.onnx")
    check_against_onnx_runtime(tmp_path / "model.onnx")


@pytest.mark.parametrize("size", [(12, 9), (4, 4)])
def test_resized_images_are_those_of_onnx_runtime(tmp_path, size):
    spec = PreprocessingSpec(size=size, channel_order="bgr", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    images = np.random.default_rng(0).random((3, 3, 6, 6)).astype(np.float32)
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3)
    )
    export_plain(network, torch.zeros(2, 3, *size), tmp_path / "plain.onnx")
    model = read_model(tmp_path / "plain.onnx")
    anatomy = dissect(model, "plain.onnx")
    stage = make_stage(model, anatomy, choose_penultimate(anatomy, model, None, "plain.onnx"), (3, 6, 6), spec, "plain.onnx")
    onnx.save(stage, tmp_path / "model.onnx")
    graph = TorchGraph(tmp_path / "model.onnx")
    wanted = open_session(tmp_path / "model.onnx").run(list(graph.outputs), {contract.IMAGE: images})
    for found, expected in zip(graph(torch.from_numpy(images)), wanted, strict=True):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_range_check_is_the_same_in_half_precision(guard, pixels):
    images = np.repeat(pixels[:1], 6, axis=0)
    images[:, 0, 3, 4] = [0, 1, 1.0002, -0.0002, np.nan, np.inf]
    graph = TorchGraph(guard.folder("autoencoder") / "model.onnx", half=True)
    answers = dict(zip(graph.outputs, graph(torch.from_numpy(images)), strict=True))
    assert answers[contract.IN_RANGE][:, 0].tolist() == [1, 1, 0, 0, 0, 0]
    noise, reconstruction = answers[contract.NOISE][:2].numpy(), answers[contract.RECONSTRUCTION][:2].numpy()
    assert np.abs(noise + reconstruction - images[:2]).max() < 1e-6


def test_half_precision_drifts_a_little_and_keeps_the_labels(guard, pixels):
    path = guard.folder("classifier") / "model.onnx"
    exact, half = (TorchGraph(path, half=half)(torch.from_numpy(pixels[:50]))[0].numpy() for half in (False, True))
    assert 0 < np.abs(half - exact).max() < 0.01 * np.abs(exact).max()
    assert (half.argmax(axis=1) == exact.argmax(axis=1)).all()


def test_gradients_flow_through_the_graph_so_that_it_can_be_attacked(guard, pixels, report):
    images = torch.from_numpy(pixels[:32]).requires_grad_()
    graph = TorchGraph(guard.folder("classifier") / "model.onnx")
    loss = torch.nn.functional.cross_entropy(graph(images)[0], torch.from_numpy(report.labels[:32]))
    loss.backward()
    stepped = (images.detach() + 0.1 * images.grad.sign()).clamp(0, 1)
    assert torch.nn.functional.cross_entropy(graph(stepped)[0], torch.from_numpy(report.labels[:32])) > 5 * loss


@pytest.mark.parametrize(
    ("kind", "attributes", "said"), [("Softsign", {}, "Softsign"), ("MaxPool", {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}, "padding")]
)
def test_a_graph_that_cannot_run_as_torch_operations_is_refused(tmp_path, kind, attributes, said):
    image, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1, 4, 4]) for name in (contract.IMAGE, "OUT"))
    node = helper.make_node(kind, [contract.IMAGE], ["OUT"], **attributes)
    onnx.save(helper.make_model(helper.make_graph([node], "g", [image], [out])), tmp_path / "model.onnx")
    with pytest.raises(NoisecError, match=said):
        TorchGraph(tmp_path / "model.onnx")(torch.zeros(1, 1, 4, 4))


class OnCpu:
    """A stage that takes small batches."""

    largest = 64

    def __init__(self, path: Path) -> None:
        self.graph = TorchGraph(path)
        self.sizes: list[int] = []

    def infer(self, images, outputs):
        self.sizes.append(len(images))
        answers = dict(zip(self.graph.outputs, self.graph(torch.from_numpy(images)), strict=True))
        return {name: answers[name].numpy() for name in outputs}


def test_more_images_than_a_stage_takes_are_asked_in_parts_and_come_back_in_order(guard, pixels):
    stage = OnCpu(guard.folder("classifier") / "model.onnx")
    found = asking({"classifier": stage})("classifier", pixels, [contract.LOGITS])
    wanted = in_process(guard.stages)("classifier", pixels, [contract.LOGITS])
    assert stage.sizes == [64, 64, 64, 8]
    assert np.abs(found[contract.LOGITS] - wanted[contract.LOGITS]).max() < 1e-4


def in_layout(guard: Guard, layout: str) -> Guard:
    return dataclasses.replace(guard, spec=changed(guard.spec, serving=ServingSpec(layout=layout)))


def served_steps(guard: Guard) -> list[tuple[str, set[str]]]:
    """Each step of the ensemble that asks a network stage: the stage, and what it is asked for."""
    steps = [(step.model_name.removeprefix(f"{guard.name}_"), set(step.output_map)) for step in ensemble_steps(guard.spec)]
    return [(stage, outputs) for stage, outputs in steps if stage in NETWORK_STAGES]


def test_the_guard_that_is_checked_asks_its_stages_for_what_the_served_one_asks_them(guard, pixels):
    stages, asked = in_process(guard.stages), []

    def infer(stage, images, outputs):
        asked.append((stage, set(outputs)))
        return stages(stage, images, outputs)

    guard.runner(infer).batch(pixels[:4])
    assert asked == served_steps(guard)
    made_by_the_autoencoder = {contract.PASSES[one] for one in fused_passes(guard.spec)}
    assert made_by_the_autoencoder <= dict(asked)["autoencoder"]
    assert made_by_the_autoencoder


@pytest.mark.parametrize(("layout", "passes_of_its_own"), [("fused", 1), ("staged", 3)])
def test_the_guard_that_is_timed_launches_what_its_layout_launches(guard, monkeypatch, layout, passes_of_its_own):
    guard, launched = in_layout(guard, layout), []
    monkeypatch.setattr(measure, "new_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(measure, "median_ms", lambda launch: (launch(), 1.0)[1])
    stages = {
        stage: SimpleNamespace(largest=1, launcher=lambda rows, stage=stage: lambda: launched.append(stage)) for stage in NETWORK_STAGES
    }
    assert [row["stage"] for row in speed(guard, "here", stages)] == [*NETWORK_STAGES, "guard"]
    of_the_guard = launched[len(NETWORK_STAGES) :]
    assert of_the_guard == ["autoencoder", *["classifier"] * passes_of_its_own]
    assert of_the_guard == [stage for stage, _ in served_steps(guard)]


def test_a_lower_precision_is_that_of_a_build_which_lowers_before_it_joins_the_stages(guard, report, tmp_path):
    splits = Splits(report[:0], report[:32], report[32:48], report[48:64], ("a", "b"))
    made = lower_guard(guard, "int8", splits, tmp_path / "int8")
    together, alone, exact = (
        read_model(folder / "model.onnx").graph for folder in (made["autoencoder"], made["classifier"], guard.folder("autoencoder"))
    )
    assert [node.op_type for node in together.node if f"classifier/{contract.IMAGE}" in node.input] == ["Conv"]  # no quantiser
    scales = [sorted(name for node in graph.node for name in node.input if "_scale" in name) for graph in (together, alone)]
    assert [name for name in scales[0] if name.startswith("classifier/")] == [f"classifier/{name}" for name in scales[1]]
    assert scales[1]
    assert [value.name for value in together.output] == [value.name for value in exact.output]
    images = report[64:96].floats()
    found, wanted = (answers_of(guard, in_process(stages), images) for stages in (made, guard.stages))
    assert differences(found, wanted, wanted)["label_agreement"] > 0.9


def test_differences_are_the_largest_ones():
    exact = {contract.LOGITS: np.array([[1, 4], [2, 0]], np.float32)}
    found = {contract.LOGITS: np.array([[1, 4], [2, 3]], np.float32)}
    assert differences(found, exact, exact) == {
        "outputs": {contract.LOGITS: {"max_abs": 3.0, "relative": 0.75}},
        "label_agreement": 0.5,
    }
    one = Answers(np.array([0, 1]), np.array([0.5, 2], np.float32), np.array([False, True]))
    assert agreement(one, dataclasses.replace(one, is_malicious=np.array([True, True]))) == {"labels": 1.0, "verdicts": 0.5, "score": 0.0}


def test_a_served_guard_is_compared_with_its_stages_and_put_under_load(guard, pixels, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "LOAD_SECONDS", 0.3)
    result, scorer = Result(tmp_path, FACTS), Scorer.load(guard.folder("scorer") / "scorer.npz")
    serve(guard, "here", in_process(guard.stages), scorer, pixels, result)
    assert result.content["served"]["here"] == {"labels": 1.0, "verdicts": 1.0, "score": pytest.approx(0, abs=1e-2)}
    rows = result.content["load"]
    assert [(row["clients"], row["batch"]) for row in rows] == [(1, 1), (1, 32), (8, 1), (8, 32)]
    for row in rows:
        assert 0 < row["median_ms"] <= row["p99_ms"]
        assert row["images_per_second"] > 0
    shifted = dataclasses.replace(scorer, calibration=scorer.calibration - 1e3)  # calls everything malicious
    serve(guard, "shifted", in_process(guard.stages), shifted, pixels, result)
    assert result.content["served"]["shifted"]["verdicts"] < 0.1


def test_a_compiled_copy_is_as_its_manifest_says_and_the_repository_stays(guard, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "compute_capability", lambda: "9.0")
    lowered = {stage: tmp_path / stage for stage in NETWORK_STAGES}
    for stage, folder in lowered.items():
        folder.mkdir()
        model = onnx.load(guard.folder(stage) / "model.onnx")
        model.doc_string = "another"
        onnx.save(model, folder / "model.onnx")
    copy = compile_copy(rtx, guard, lowered, tmp_path / "repository")
    publish(copy, dataclasses.replace(Scorer.load(copy.folder("scorer") / "scorer.npz"), alpha=0.05))
    assert copy.release == 2
    assert verify_repository(copy.repository) == []
    assert verify_repository(REPOSITORY) == []
    for stage in NETWORK_STAGES:
        assert (copy.folder(stage) / "model.onnx").read_bytes() == (lowered[stage] / "model.onnx").read_bytes()
        assert (copy.folder(stage) / "model_sm90.plan").is_file()
    assert Scorer.load(copy.folder("scorer") / "scorer.npz").alpha == 0.05


def tensorrt_without_engines(allowed: list[bool]) -> SimpleNamespace:
    """A TensorRT that loads no plan, and notes whether a plan might have run code on the host."""

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, plan):
            allowed.append(self.engine_host_code_allowed)

    class Logger:
        WARNING = 1

        def __init__(self, severity):
            pass

    return SimpleNamespace(__version__="0", Runtime=Runtime, Logger=Logger)


@pytest.mark.parametrize(("built", "expected"), [("version compatible", True), ("as ever", False), ("without manifest", False)])
def test_the_backend_lets_plans_run_code_on_the_host_only_where_they_were_built_so(tmp_path, monkeypatch, built, expected):
    copy = Path(shutil.copytree(REPOSITORY, tmp_path / "repository"))
    content = {key: value for key, value in read_manifest(copy, GUARD).items() if key not in ("guard", "release", "files")}
    content["spec"]["tensorrt"]["version_compatible"] = built != "as ever"
    write_manifest(copy, GUARD, 1, content)
    if built == "without manifest":
        manifest_path(copy, GUARD, 1).unlink()
    allowed: list[bool] = []
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_without_engines(allowed))
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", SimpleNamespace())
    for name, answer in (("is_available", True), ("get_device_capability", (9, 0)), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    load = runpy.run_path(str(Path(names.__file__).with_name("model.py")))["_load"]
    for stage in NETWORK_STAGES:
        model = contract.stage_model(GUARD, stage)
        arguments = {"model_repository": str(copy / model), "model_version": "1", "model_instance_device_id": "0"}
        with pytest.raises(RuntimeError, match="does not load with TensorRT 0 on this GPU"):
            load(arguments, {"default_model_filename": "model.onnx", "max_batch_size": 4})
    assert allowed == [expected] * len(NETWORK_STAGES)


@pytest.mark.parametrize("host_code", [True, False])
def test_stages_in_this_process_run_code_on_the_host_only_where_they_may(tmp_path, monkeypatch, host_code):
    allowed: list[bool] = []
    monkeypatch.setattr(engine, "find_tensorrt", lambda: tensorrt_without_engines(allowed))
    monkeypatch.setattr(engine, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    (tmp_path / "model_sm90.plan").write_bytes(b"plan")
    with pytest.raises(RuntimeError, match="does not load"):
        on_gpu({"classifier": tmp_path}, 4, host_code=host_code)
    assert allowed == [host_code]


def test_what_was_prepared_comes_back_and_fits_one_guard_only(guard, report, tmp_path, monkeypatch):
    splits = Splits(report[:0], report[:30], report[30:50], report[50:60], ("a", "b"))
    graphs = {"fp16": {str(stage): tmp_path / "fp16" / stage for stage in NETWORK_STAGES}}
    Prepared(splits, tmp_path / ATTACKED, graphs, {"int8": "no"}).save(tmp_path, guard)
    again = Prepared.load(tmp_path, guard)
    for name in ("fit", "calibrate", "report"):
        assert np.array_equal(getattr(again.splits, name).pixels, getattr(splits, name).pixels)
        assert np.array_equal(getattr(again.splits, name).labels, getattr(splits, name).labels)
    assert (again.graphs, again.skipped, again.attacked) == (graphs, {"int8": "no"}, tmp_path / ATTACKED)
    monkeypatch.setattr(Guard, "digests", {**guard.digests, "classifier": "another"})
    with pytest.raises(NoisecError, match="prepared for other stages than the guard's; run this first: python -m noisec"):
        Prepared.load(tmp_path, guard)


def test_a_check_of_which_nothing_is_prepared_says_what_to_run_first(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "gpus", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    folder = tmp_path / "a folder" / "prepared"
    with pytest.raises(NoisecError, match="nothing is prepared there") as error:
        check.run_check(REPOSITORY, GUARD, folder, tmp_path / "out")
    said = re.search("; run this first: (.+); then the check with --prepared (.+)$", str(error.value))
    assert shlex.split(said[2]) == [str(folder)]
    _, module, name, *arguments = shlex.split(said[1])
    assert (module, name) == ("-m", pack.__name__)
    prepared = []
    monkeypatch.setattr(pack, "prepare", lambda *given: prepared.append(given))
    assert CliRunner().invoke(pack.app, arguments).exit_code == 0
    assert prepared == [(REPOSITORY, GUARD, folder)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("serving", [ServingSpec(input="uint8"), ServingSpec(layout="single"), ServingSpec(layout="graph")])
def test_a_guard_that_the_check_cannot_measure_is_refused_with_what_makes_it_one_that_it_can(tmp_path, serving):
    rearrange(REPOSITORY, GUARD, serving, tmp_path / "guard")
    with pytest.raises(NoisecError, match=f"input {serving.input} and layout {serving.layout}") as refused:
        Guard.measurable(tmp_path / "guard", GUARD)
    command = re.search(r"noisec arrange [^,]*", str(refused.value))
    assert command
    asked = [word if word != "measured" else str(tmp_path / word) for word in shlex.split(command[0])[1:]]
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert Guard.measurable(tmp_path / "measured", GUARD).name == GUARD


def test_the_help_says_that_tensorrt_does_not_travel():
    assert not any("tensorrt" in name for name in REQUIREMENTS)
    said = " ".join(CliRunner().invoke(pack.app, ["--help"], terminal_width=140).output.split())
    assert "A TensorRT is not among the wheels either, and without one the check skips every part with plans" in said


def test_a_part_that_cannot_be_done_is_skipped_with_its_reason_and_the_others_stay(tmp_path):
    result = Result(tmp_path, FACTS)
    with result.part("first"):
        result.content["speed"].append({"runtime": "torch", "stage": "guard", "batch": 8, "median_ms": 2.0, "images_per_second": 4000.0})
    with result.part("second"):
        raise NoisecError("no such\npackage | here")
    with result.part("third"):
        raise ValueError("a mistake")
    content = json.loads((tmp_path / "nvidia-example-1.json").read_text())
    assert content["skipped"] == {"second": "no such package / here"}
    assert content["failed"] == {"third": "ValueError: a mistake"}
    text = (tmp_path / "nvidia-example-1.md").read_text()
    for row in (
        "| torch | guard | 8 | 2.000 | 4,000 |",
        "| second | no such package / here |",
        "| third | ValueError: a mistake |",
        "driver 1.2",
    ):
        assert row in text
    assert "Detection" not in text  # there is nothing to show


def test_pieces_stay_below_the_limit_and_join_to_what_they_were_cut_from(tmp_path):
    sizes = {"big.whl": 2500, "middle.whl": 700, "small.whl": 300, "tiny.whl": 10}
    generator = np.random.default_rng(0)
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(generator.bytes(size))
    cut = split_into_pieces([tmp_path / name for name in sizes], tmp_path / "pieces", limit=1000)
    assert list(cut) == ["big.whl"]
    pieces = sorted((tmp_path / "pieces").iterdir())
    assert [path.name for path in pieces] == ["1", "2", "3", "4"]
    assert max(sum(path.stat().st_size for path in piece.iterdir()) for piece in pieces) <= 1000
    (join,) = [line for line in install_script(cut).splitlines() if line.startswith("cat ")]
    (tmp_path / "joined").mkdir()
    subprocess.run(["sh", "-euc", join], cwd=tmp_path, check=True)
    for name in sizes:
        (found,) = [path for folder in (tmp_path / "joined", *pieces) for path in folder.glob(name)]
        assert found.read_bytes() == (tmp_path / name).read_bytes()
