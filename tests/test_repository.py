"""The model repository is what the manifest says, and what a stock Triton expects."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest
from conftest import GUARD, REPOSITORY, ROOT
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from noisec import contract
from noisec.builders.figures import percent
from noisec.builders.passes import passes_needed
from noisec.builders.repository import Widths, guard_config, network_config, scorer_config
from noisec.builders.spec import DetectorSpec
from noisec.contract import stage_model
from noisec.errors import NoisecError
from noisec.manifest import manifest_path, read_manifest, releases, verify
from noisec.python_backend.scorer import scoring

CONFIGS = sorted(REPOSITORY.glob("*/config.pbtxt"))


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(REPOSITORY, tmp_path / "repository"))


def read_config(path: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def test_the_served_repository_equals_the_manifests_digests():
    assert verify(REPOSITORY, GUARD) == []


def test_nothing_in_the_repository_names_a_machine_it_was_built_on():
    for path in REPOSITORY.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"site-packages" not in content
            assert str(ROOT).encode() not in content
            assert b"stack_trace" not in content


def test_every_change_to_a_file_is_named(copy):
    scorer = copy / stage_model(GUARD, "scorer") / "1"
    (scorer / "model.py").write_text("import os\n")
    (scorer / "extra.py").write_text("")
    (copy / stage_model(GUARD, "classifier") / "1" / "model.onnx").unlink()
    assert sorted(verify(copy, GUARD)) == [
        "fashion_mnist_classifier/1/model.onnx: missing",
        "fashion_mnist_scorer/1/extra.py: not in a manifest",
        "fashion_mnist_scorer/1/model.py: changed since the build",
    ]


def test_a_link_to_a_folder_is_named(copy, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model.py").write_text("import os\n")
    scorer = copy / stage_model(GUARD, "scorer")
    for place in ("2", "1/__pycache__"):
        (scorer / place).symlink_to(tmp_path / "elsewhere")
    assert sorted(verify(copy, GUARD)) == [f"fashion_mnist_scorer/{place}: not in a manifest" for place in ("1/__pycache__", "2")]


def test_the_scorers_code_in_the_repository_is_the_packages():
    for path in (REPOSITORY / stage_model(GUARD, "scorer") / "1").glob("*.py"):
        assert path.read_bytes() == (Path(scoring.__file__).parent / path.name).read_bytes()


def test_the_repository_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in REPOSITORY.rglob("*") if path.is_file()) < 8e6


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_configs_are_complete(path):
    config = read_config(path)
    assert config.name == path.parent.name
    assert config.backend or config.platform == "ensemble"
    assert config.max_batch_size > 0
    assert config.input
    assert config.output
    for tensor in [*config.input, *config.output]:
        assert tensor.data_type != model_config_pb2.TYPE_INVALID
        assert all(size > 0 for size in tensor.dims)
    assert not config.response_cache.enable
    assert list(path.parent.glob("[0-9]*/*")), "git drops an empty version directory"


def test_ensemble_outputs_are_leaves_and_steps_are_pinned():
    config = read_config(REPOSITORY / GUARD / "config.pbtxt")
    steps = config.ensemble_scheduling.step
    consumed = {tensor for step in steps for tensor in step.input_map.values()}
    assert consumed.isdisjoint({output.name for output in config.output})
    assert {step.model_version for step in steps} == {releases(REPOSITORY, GUARD)[-1]}
    assert {output.name for output in config.output} == set(contract.OUTPUTS)


def test_network_stages_use_the_backend_that_a_stock_triton_has():
    for stage in ("autoencoder", "classifier"):
        assert read_config(REPOSITORY / stage_model(GUARD, stage) / "config.pbtxt").backend == "onnxruntime"


def test_the_scorer_imports_nothing_but_numpy():
    allowed = {
        "__future__",
        "collections",
        "dataclasses",
        "functools",
        "json",
        "pathlib",
        "types",
        "typing",
        "numpy",
        "triton_python_backend_utils",
    }
    for path in (REPOSITORY / stage_model(GUARD, "scorer") / "1").glob("*.py"):
        tree = ast.parse(path.read_text())
        plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        plain |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        assert {name.split(".")[0] for name in plain} <= allowed


def test_the_card_states_the_manifests_figures():
    figures = read_manifest(REPOSITORY, GUARD)["figures"]
    card = (REPOSITORY / GUARD / "README.md").read_text()
    assert percent(figures["accuracy"]) in card
    for name, attack in figures["attacks"].items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {name} "))
        assert f"{attack['auroc']:.3f}" in row
        assert percent(attack["tpr_at_1pct"]) in row


def test_missing_guards_and_releases_are_named(copy):
    with pytest.raises(NoisecError, match="no guard 'nobody'; guards here: \\['fashion_mnist'\\]"):
        read_manifest(copy, "nobody")
    with pytest.raises(NoisecError, match="no such manifest; releases of 'fashion_mnist' here: \\[1\\]"):
        read_manifest(copy, GUARD, 7)
    assert manifest_path(copy, GUARD, 1).is_file()
    assert ROOT.joinpath("LICENSE").is_file()


def test_the_reconstruction_error_costs_no_classifier_pass(spec):
    chosen = (DetectorSpec(kind="reconstruction-error", view="pixels"), DetectorSpec(kind="logit-gaussian", view="delta"))
    lighter = spec.model_copy(update={"detectors": chosen})
    assert passes_needed(spec) == ("noise", "image", "reconstruction")
    assert passes_needed(lighter) == ("image", "reconstruction")
    assert chosen[0].inputs == (contract.NOISE_LEVEL,)
    with pytest.raises(ValueError, match="kind 'mixture' has view 'noise' or .*; view is 'pixels'"):
        DetectorSpec(kind="mixture", view="pixels")


def test_every_onnx_instance_has_one_thread_and_a_graph_names_the_model_for_labels(spec):
    widths = Widths((1, 28, 28), 10, 128)
    whole = spec.model_copy(update={"serving": spec.serving.model_copy(update={"layout": "graph"})})
    one = scorer_config(whole, widths)
    for config in (network_config(spec, "classifier", widths), network_config(spec, "autoencoder", widths), one):
        assert config.parameters["intra_op_thread_count"].string_value == "1"
    assert guard_config(whole, widths, ("a", "b")).parameters[contract.LABEL_MODEL].string_value == stage_model(GUARD, "classifier")
    assert one.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
    assert "intra_op_thread_count" not in network_config(spec, "classifier", widths, {"9.0": "model_sm90.plan"}).parameters


def test_instances_and_queue_are_as_the_specification_says(spec):
    widths = Widths((1, 28, 28), 10, 128)
    plain = network_config(spec, "classifier", widths)
    assert plain.instance_group[0].count == 2
    assert not plain.dynamic_batching.HasField("default_queue_policy")
    assert not plain.dynamic_batching.preferred_batch_size
    serving = spec.serving.model_copy(update={"layout": "single", "instances": 3, "max_queue_size": 500, "preferred_batch_size": 4})
    config = network_config(spec.model_copy(update={"serving": serving}), "classifier", widths, {"9.0": "model_sm90.plan"})
    assert config.instance_group[0].count == 3
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 500
    assert list(config.dynamic_batching.preferred_batch_size) == [4]
