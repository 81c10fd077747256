"""`noisec audit` and `noisec repair` on a guard's own classifier, and the audit as a step of the build."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_audit import TARGET, backdoored_network, clean_network, sets, small  # noqa: F401

from noisec.builders.audit import guard as audited
from noisec.builders.audit.evidence import Evidence
from noisec.builders.audit.guard import audit_problems, audit_protected, draw_audit, said
from noisec.builders.datasets import load_splits
from noisec.builders.export import export_plain
from noisec.builders.protect import load_module, protect
from noisec.builders.spec import PreprocessingSpec, read_spec
from noisec.builders.workbench import Workbench
from noisec.cli import main

GUARD = """
name = "audited"
target_fpr = 0.05
natural_noise_sd = 0.02
{extra}
[data]
source = "fashion-mnist-test"
train = 4000
fit = 1500
calibrate = 500
report = 500

[classifier]
factory = "test_audit:small"
weights = "{weights}"

[autoencoder]
epochs = 1

[[detectors]]
view = "image"
"""


class Ended(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments, cwd):
    """The command, as if typed in this folder."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["noisec", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    code = ended.value.code or 0
    return Ended(code, out.getvalue(), err.getvalue()) if isinstance(code, int) else Ended(1, out.getvalue(), err.getvalue() + code)


@pytest.fixture(scope="module")
def guards(tmp_path_factory, request):
    """``clean`` and ``bad`` -> TOML file of a guard around a classifier that was trained so."""
    folder = tmp_path_factory.mktemp("audited")
    found = {}
    for name, fixture in (("clean", "clean_network"), ("bad", "backdoored_network")):
        weights = folder / f"{name}.safetensors"
        save_file(request.getfixturevalue(fixture).state_dict(), weights)
        found[name] = folder / f"{name}.toml"
        found[name].write_text(GUARD.format(weights=weights, extra=""))
    return found


@pytest.mark.parametrize(("name", "code"), [("clean", 0), ("bad", 3)])
def test_the_exit_code_tells_a_backdoored_classifier(guards, tmp_path, name, code):
    done = run("audit", guards[name], "--json", "found.json", "--plot", "found.png", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["backdoored"] == (code == 3)
    assert found["top_class_share"] == pytest.approx(max(found["histogram"]))
    assert ("probably backdoored" in done.stdout) == (code == 3)
    if code == 3:
        assert found["target"] == TARGET
    with Image.open(tmp_path / "found.png") as picture:
        assert min(picture.size) > 300
    likes = [word for _ in range(3) for word in ("--like", "clean.json")]
    if code == 0:
        (tmp_path / "found.json").rename(tmp_path / "clean.json")
    else:
        assert run("audit", guards["clean"], "--json", "clean.json", cwd=tmp_path).returncode == 0
    compared = run("audit", guards[name], *likes, "--json", "-", cwd=tmp_path)
    assert compared.returncode == code, compared.stderr
    assert json.loads(compared.stdout)["reference"] == json.loads((tmp_path / "clean.json").read_text())["histogram"]


def test_what_an_audit_is_compared_with_has_to_be_an_audits_evidence(guards, tmp_path):
    (tmp_path / "other.json").write_text("[1, 2]")
    for file in ("other.json", "missing.json"):
        done = run("audit", guards["clean"], "--like", file, cwd=tmp_path)
        assert done.returncode == 1
        assert f"{file} holds no evidence of an audit" in done.stderr


def test_a_repair_writes_new_weights_and_never_over_old_ones(guards, tmp_path):
    out = tmp_path / "repaired.safetensors"
    done = run("repair", guards["bad"], "--out", out, "--epochs", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"probably backdoored towards class {TARGET}" in done.stdout
    before = small().state_dict()
    assert load_file(out).keys() == before.keys()
    assert "before" in done.stdout
    small().load_state_dict(load_file(out))
    again = run("repair", guards["bad"], "--out", out, "--epochs", 1, cwd=tmp_path)
    assert again.returncode == 1
    assert "weights are not written over" in again.stderr
    wrong = run("repair", guards["bad"], "--out", "other.safetensors", "--target", 10, cwd=tmp_path)
    assert wrong.returncode == 1
    assert "target 10 is no class" in wrong.stderr
    published = run("repair", guards["bad"], "--out", "other.safetensors", "--target", -1, "--epochs", 1, cwd=tmp_path)
    assert published.returncode == 0, published.stderr
    assert "backdoored towards" not in published.stdout


def test_a_build_that_requires_the_audit_stops_at_a_backdoored_classifier(guards, tmp_path):
    toml = tmp_path / "guard.toml"
    toml.write_text(guards["bad"].read_text().replace("natural_noise_sd", 'audit = "require"\nnatural_noise_sd'))
    done = run("build", toml, "--repository", "repository", cwd=tmp_path)
    assert done.returncode == 1
    assert f"probably backdoored towards class {TARGET}" in done.stderr
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize(("name", "code"), [("clean", 0), ("bad", 3)])
def test_an_onnx_file_without_batch_norms_is_audited_and_not_repaired(guards, tmp_path, name, code):
    weights = guards[name].with_suffix(".safetensors")
    export_plain(load_module("test_audit:small", weights), torch.rand(2, 1, 28, 28), tmp_path / "mine.onnx")
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(tmp_path / "mine.onnx").graph.node}
    text = guards[name].read_text().replace(f'weights = "{weights}"', "").replace('factory = "test_audit:small"', 'onnx = "mine.onnx"')
    (tmp_path / "guard.toml").write_text(text)
    done = run("audit", "guard.toml", "--json", "found.json", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["backdoored"] == (code == 3)
    if code == 3:
        assert found["target"] == TARGET
    refused = run("repair", "guard.toml", "--out", "repaired.safetensors", cwd=tmp_path)
    assert refused.returncode == 1
    assert "a repair writes the weights of a PyTorch module" in refused.stderr


def test_other_preprocessing_is_another_classifier_and_audited_again(guards, tmp_path, monkeypatch):
    spec = read_spec(guards["clean"])
    splits, bench = load_splits(spec.data, spec.seed, cache=tmp_path), Workbench(tmp_path)
    asked = []

    def judge(network, *others):
        asked.append(network)
        return Evidence("ban", False, 0.1, 0.2, 1, 0.4, 0.34, (0.1,) * 10, 1.0, 2.0)

    monkeypatch.setattr(audited, "audit", judge)
    for mean in ((), (0.5,), (), (0.5,)):
        own = spec.classifier.model_copy(update={"preprocessing": PreprocessingSpec(mean=mean)})
        changed = spec.model_copy(update={"classifier": own})
        audit_protected(changed, splits, protect(changed, splits, bench), bench)
    assert len(asked) == 2


def test_classes_that_the_images_have_no_name_for_are_numbers(tmp_path):
    bad = Evidence("ban", True, 0.7, 0.2, 3, 0.8, 0.34, (0.1, 0.05, 0.05, 0.8), 1.0, 2.0)
    assert "towards class 3 (3): 80 %" in said(bad, ("shirt", "shoe", "bag"))
    draw_audit(bad, ("shirt", "shoe", "bag"), tmp_path / "seen.png")
    assert (tmp_path / "seen.png").stat().st_size > 1000


def test_the_verdict_is_one_sentence_with_its_figures():
    shares = (0.1, 0.8, 0.1)
    bad = Evidence("ban", True, 0.7, 0.2, 1, 0.8, 0.34, shares, 1.0, 2.0)
    names = ("shirt", "shoe", "bag")
    assert audit_problems(bad, names) == [said(bad, names)]
    assert "class 1 (shoe): 80 % of the images get one label under neuron noise, 34 % without (score 0.70, threshold 0.20)" in said(
        bad, names
    )
    usual = Evidence("ban", True, 0.3, 0.2, 2, 0.6, 0.34, (0.0, 0.6, 0.4), 1.0, 2.0, reference=(0.2, 0.7, 0.1))
    assert "class 2 (bag): 40 % of the images get one label" in said(usual, names), "the suspected label's share, not the commonest's"
    clean = Evidence("ban", False, 0.1, 0.2, 1, 0.4, 0.34, (0.3, 0.4, 0.3), 1.0, 2.0)
    assert audit_problems(clean, names) == []
    assert said(clean, names).startswith("audit: no backdoor found: 40 %")
    assert np.isclose(sum(clean.histogram), 1)
