"""Which part may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FORBIDDEN = {
    "src/noisec/contract.py": ("noisec", "numpy", "torch"),
    "src/noisec/manifest.py": ("noisec.builders", "noisec.clients", "noisec.python_backend", "noisec.benchmarks", "numpy", "torch"),
    "clients": ("noisec.builders", "noisec.python_backend", "noisec.benchmarks", "torch", "onnx", "onnxruntime", "sklearn", "pydantic"),
    "python_backend": ("noisec.builders", "noisec.clients", "noisec.benchmarks", "sklearn", "pydantic"),
    "python_backend/scorer": ("noisec", "torch", "scipy"),
    "python_backend/runtimes/onnxruntime": ("torch",),
    "builders": ("noisec.clients", "noisec.benchmarks"),
}


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module and not node.level}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_no_room_imports_what_it_may_not(room):
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in ([ROOT / room] if room.endswith(".py") else (ROOT / room).rglob("*.py"))
        for name in imports(path)
        if any(name == other or name.startswith(f"{other}.") for other in FORBIDDEN[room])
    }
    assert not found


def test_compiling_and_arranging_load_no_training_code():
    loaded = "import sys; print([name for name in ('torch', 'onnxruntime') if name in sys.modules])"
    for module, expected in (("compiling", []), ("layout", ["onnxruntime"])):  # a copy is compared with what it was made of
        code = f"import noisec.builders.{module}; {loaded}"
        assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == str(expected)


def test_the_client_and_the_command_line_load_no_heavy_package():
    heavy = ("torch", "onnx", "sklearn", "pydantic", "pytriton")
    code = f"import noisec.clients, noisec.cli, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
