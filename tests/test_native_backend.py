"""Triton's own ONNX Runtime backend, compiled from its sources, gives the stand-in's answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import GUARD, REPOSITORY, ROOT

from noisec.builders.layout import rearrange
from noisec.builders.spec import ServingSpec
from noisec.clients import GuardClient
from noisec.python_backend.server import BACKENDS, EmbeddedServer

SCRIPT = ROOT / "python_backend" / "native_backend.sh"
SOURCES = "https://github.com/triton-inference-server/backend"


def compiled(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(shutil.which("sh")), str(SCRIPT), str(folder)]
    return subprocess.run(command, env={**os.environ, "PYTHON": sys.executable, **environment}, capture_output=True, text=True)


def needs_tools() -> None:
    missing = [tool for tool in ("git", "g++") if not shutil.which(tool)]
    if missing or not Path("/usr/include/rapidjson/document.h").is_file():
        pytest.skip(f"no {', '.join(missing) or 'headers of rapidjson'} here to compile Triton's backend with")


def needs_sources() -> None:
    asked = subprocess.run(["timeout", "20", "git", "ls-remote", SOURCES, "HEAD"], capture_output=True, text=True)
    if asked.returncode:
        pytest.skip(f"the sources of Triton's backend cannot be had here: {asked.stderr.strip()}")


def test_it_says_which_tool_is_missing(tmp_path):
    done = compiled(tmp_path / "backends", PATH="")
    assert done.returncode == 1
    assert done.stderr == "native backend: there is no git: apt-get install git g++ rapidjson-dev\n"


def test_it_says_where_onnx_runtime_is_looked_for(tmp_path):
    needs_tools()
    done = compiled(tmp_path / "backends", PYTHON="nobody")
    assert done.returncode == 1
    assert "nobody has no onnxruntime: pip install" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_graph_answers_there_as_on_the_stand_in(tmp_path, monkeypatch, client, pixels):
    needs_tools()
    needs_sources()
    done = compiled(tmp_path / "backends")
    assert done.returncode == 0, done.stderr
    rearrange(REPOSITORY, GUARD, ServingSpec(layout="graph"), tmp_path / "graph")
    monkeypatch.setenv(BACKENDS, str(tmp_path / "backends"))
    wanted = client.classify(pixels)
    with EmbeddedServer(tmp_path / "graph") as server, GuardClient(server.grpc_url, GUARD) as native:
        found = native.classify(pixels)
    assert np.array_equal(found.labels, wanted.labels)
    assert np.array_equal(found.is_malicious, wanted.is_malicious)
