"""What the README tells a newcomer to type works."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from noisec.builders.spec import read_spec

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\$ (.*)$", README, flags=re.MULTILINE)
NOISEC = [sys.executable, "-m", "noisec"]


def commands(start: str) -> list[list[str]]:
    return [shlex.split(command) for command in COMMANDS if command.removeprefix(".venv/bin/").startswith(start)]


def test_every_command_of_the_readme_is_covered_here():
    known = ("noisec inspect", "make demo", "noisec serve", "noisec classify", "noisec build", "noisec verify", "noisec tune", "docker run")
    known += ("noisec audit",)  # runs in test_audit_commands.py, on classifiers that were trained for it
    assert [command for command in COMMANDS if not command.removeprefix(".venv/bin/").startswith(known)] == []
    assert {name for name in known if commands(name)} == set(known)


def test_tuned_settings_are_written_beside_the_guard(tmp_path):
    (command,) = commands("noisec tune")
    command[command.index("model_repository")] = str(ROOT / "model_repository")
    done = subprocess.run([*NOISEC, *command[1:], "--seconds", "4"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    subprocess.run([*NOISEC, "verify", "tuned"], cwd=tmp_path, check=True)


def test_the_make_targets_exist():
    for target in re.findall(r"`?make (\w+)`?", README):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.timeout(600)  # two minutes on two free cores
def test_the_demo_builds_serves_attacks_and_shows(tmp_path):
    done = subprocess.run([*NOISEC, "demo", "--json", "figures.json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() >= {"seconds", "accuracy", "fpr", "alpha", "requests_per_second", "attacks"}
    assert list(figures["attacks"]) == ["fgsm-0.05", "fgsm-0.1", "pgd-0.02", "pgd-0.05", "pgd-0.1", "badnets"]
    for attack in figures["attacks"].values():
        assert attack.keys() >= {"success", "flagged", "auroc", "tpr_at_1pct"}
    assert figures["attacks"]["pgd-0.1"]["auroc"] >= 0.99
    assert figures["attacks"]["badnets"]["success"] >= 0.9
    assert figures["attacks"]["badnets"]["auroc"] >= 0.9
    for name in figures["attacks"]:
        assert name in done.stdout
    with Image.open(tmp_path / "demo" / "demo.png") as picture:
        assert min(picture.size) > 500
    manifest = json.loads((tmp_path / "demo" / "model_repository" / "demo" / "1" / "manifest.json").read_text())
    assert manifest["figures"] == figures


def test_the_serve_commands_serve():
    for command in commands("noisec serve"):
        ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
        process = subprocess.Popen([*NOISEC, *command[1:], *ports], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert "ready: gRPC" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


def test_the_classify_command_classifies(server, report, tmp_path):
    Image.fromarray(report.pixels[0, 0]).save(tmp_path / "shoe.png")
    for command in commands("noisec classify"):
        arguments = [argument.replace("localhost:8001", server.grpc_url) for argument in command[1:]]
        subprocess.run([*NOISEC, *arguments], cwd=tmp_path, check=True, capture_output=True)
        assert len(json.loads((tmp_path / "verdicts.json").read_text())) == 1


def test_the_build_command_names_a_valid_guard_and_the_verify_command_verifies():
    for command in commands("noisec build"):
        assert read_spec(ROOT / command[2]).name == "fashion_mnist"
    for command in commands("noisec verify"):
        subprocess.run([*NOISEC, *command[1:]], cwd=ROOT, check=True, capture_output=True)


def test_the_inspect_command_inspects():
    for command in commands("noisec inspect"):
        out = subprocess.run([*NOISEC, *command[1:]], check=True, capture_output=True, text=True).stdout
        assert "multiply-adds" in out
        assert "[batch, 3, 32, 32]" in out


def test_the_guard_of_the_readme_is_valid(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "guard.toml").write_text(text)
    assert read_spec(tmp_path / "guard.toml").classifier.kind == "onnx"


def test_the_python_client_example_runs(server, pixels, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(code.replace("localhost:8001", server.grpc_url), {"images": pixels[:4]})
    assert len(capsys.readouterr().out.split("[")) == 4


@pytest.mark.skipif(
    shutil.which("tritonserver") is None, reason="no stock tritonserver on this machine; the embedded one serves the same folder"
)
def test_a_stock_triton_loads_the_repository():
    server = subprocess.Popen(["tritonserver", "--model-repository", str(ROOT / "model_repository"), "--exit-on-error=true"])
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            server.wait(timeout=30)
    finally:
        server.terminate()


def test_every_file_that_the_readme_links_to_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or Path(ROOT / target).exists(), target
