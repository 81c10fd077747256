"""Every call of TensorRT fits the signatures of TensorRT 11.4 and of TensorRT for RTX.

The bindings of TensorRT 11.4 come from PyPI, its libraries do not: the bindings are loaded here beside libraries with nothing in them, in a
process that reads their signatures and runs none of them.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from noisec.builders import engine
from noisec.python_backend.runtimes.tensorrt import names

EMPTY_LIBRARY = "".join(
    f"void *{name}(void) {{ return 0; }}\n"
    for name in (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getBuilderPluginRegistry",
        "getNvOnnxParserVersion",
        "getPluginRegistry",
        "initLibNvInferPlugins",
    )
)
PACKAGES = ("tensorrt_bindings", "tensorrt_rtx_bindings")
COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler, to make empty libraries")


@pytest.fixture(scope="module", params=PACKAGES)
def signatures(request, tmp_path_factory):
    """Folder with stubs of one TensorRT package under the name ``tensorrt``."""
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "empty.c"
    source.write_text(EMPTY_LIBRARY)
    for library in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
        subprocess.run([COMPILER, "-shared", "-fPIC", source, "-o", folder / f"{library}.so.11"], check=True)
    package = Path(importlib.util.find_spec(request.param).origin).parent
    module = next(path.name.split(".")[0] for path in package.glob("tensorrt*.so"))
    done = subprocess.run(
        [sys.executable, "-m", "pybind11_stubgen", f"{request.param}.{module}", "-o", folder, "--ignore-all-errors"],
        env={"LD_LIBRARY_PATH": f"{folder}:{sysconfig.get_config_var('LIBDIR')}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    (stub,) = folder.glob(f"{request.param}/*.pyi")
    assert "def create_network" in stub.read_text(), done.stderr
    (folder / "tensorrt").mkdir()
    (folder / "tensorrt" / "__init__.pyi").write_text(HEAD + "\n".join(map(readable, stub.read_text().splitlines())))
    return folder


HEAD = "from builtins import bool as truth\n__version__: str\n"
"""the package's own __init__ has a version, and a data type named ``bool``"""
CONVERTED = {"class Dims:": "class Dims(typing.Sequence[int]):", "class IHostMemory:": "class IHostMemory(bytes):"}
"""what the bindings take for each other without saying so in their signatures: sequences of sizes, and buffers"""


def readable(line: str) -> str:
    """A line of a stub; a signature that is no Python (an argument named ``in``) takes anything."""
    definition = re.match(r"( *)def (\w+)\(", line)
    if definition is None:
        return CONVERTED.get(line, line)
    line = re.sub(r"\bbool\b", "truth", re.sub(r": Dims\b", ": typing.Sequence[int]", line))
    try:
        ast.parse(f"{line.strip()} ...")
    except SyntaxError:
        return f"{definition[1]}def {definition[2]}(*arguments: typing.Any, **named: typing.Any) -> typing.Any:"
    return line


def with_types(source: str) -> str:
    """A module that is handed the TensorRT package, as one that imports it, so that a type checker sees through its calls."""
    source = re.sub(r"\btrt: Any(, )?", "", source)
    source = re.sub(r"\((self, )?trt(, )?(?=[\w)])", r"(\1", source)
    return source.replace("from __future__ import annotations\n", "from __future__ import annotations\nimport tensorrt as trt\n", 1)


def complaints(folder: Path, source: str) -> list[str]:
    (folder / "calls.py").write_text(source)
    (folder / "only_tensorrt.ini").write_text("[mypy]\nfollow_imports = skip\n[mypy-tensorrt]\nfollow_imports = normal\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=only_tensorrt.ini", "calls.py"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert "checked 1 source file" in done.stdout, done.stdout + done.stderr  # the stub's own complaints do not matter
    return [line for line in done.stdout.splitlines() if line.startswith("calls.py") and "error" in line]


@pytest.mark.parametrize("path", [Path(engine.__file__), Path(names.__file__).with_name("plan.py")], ids=["builds", "runs"])
def test_calls_fit_the_signatures(signatures, path):
    source = with_types(path.read_text())
    assert "trt: Any" not in source
    assert complaints(signatures, source) == []


def test_a_call_that_does_not_fit_is_found(signatures):
    source = with_types(Path(engine.__file__).read_text())
    wrong = source.replace("config.add_optimization_profile(", "config.add_optimisation_profile(")
    assert wrong != source
    assert any("add_optimisation_profile" in line for line in complaints(signatures, wrong))
