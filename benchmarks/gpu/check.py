"""A guard on this machine's NVIDIA GPU: answers, detection and speed, in one JSON file and one Markdown table.

Example: ``python -m noisec.benchmarks.gpu.pack --only-prepare``, which prepares what it needs, here or for a machine without network, and
then ``python -m noisec.benchmarks.gpu.check``. What the machine cannot do is skipped, and the reason is part of the result: plans are
compiled where a TensorRT is installed. The guard's stages always run as torch operations, launched one by one and as CUDA graphs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer

from noisec import manifest
from noisec.benchmarks.gpu.measure import agreement, answers_of, detection, differences, load, speed
from noisec.benchmarks.gpu.prepared import PREPARED, Guard, Prepared
from noisec.benchmarks.gpu.report import Result
from noisec.benchmarks.gpu.stages import PlanStage, TorchStage, asking
from noisec.builders.compiling import compile_with
from noisec.builders.engine import compute_capability, gpus
from noisec.builders.figures import Answers
from noisec.builders.images import Floats, in_batches
from noisec.builders.precision import STAGE
from noisec.builders.progress import console
from noisec.builders.repository import read_plans
from noisec.builders.spec import EngineOptions
from noisec.builders.stages import Infer, Tensors, ask_guard, in_process
from noisec.clients import GuardClient
from noisec.errors import NoisecError
from noisec.python_backend.scorer.scoring import Scorer

CLIENTS, SERVED_BATCHES = (1, 8), (1, 32)
VERIFIED = 500
"""clean images on which answers are compared"""
TENSORRT = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")


def serve(guard: Guard, runtime: str, infer: Infer, scorer: Scorer, images: Floats, result: Result) -> None:
    """Serve a repository; compare its verdicts with the same stages in this process; put it under load."""
    from noisec.python_backend.server import EmbeddedServer

    expected = ask_guard(guard.runner(infer), scorer, in_batches(images), len(images), "verdicts in process")
    with EmbeddedServer(guard.repository, ready_seconds=180) as server:
        with GuardClient(server.grpc_url, guard.name) as client:
            said = client.classify(images)
        assert said.scores is not None
        assert said.is_malicious is not None
        result.content["served"][runtime] = agreement(Answers(said.labels, said.scores, said.is_malicious), expected)
        for clients, batch in itertools.product(CLIENTS, SERVED_BATCHES):
            result.content["load"].append({"runtime": runtime, **load(server.grpc_url, guard.name, images, clients, batch)})


def check_torch(guard: Guard, prepared: Prepared, exact: Tensors, result: Result) -> None:
    """The stages as torch operations, fp32 without TF32 and fp16."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    images = prepared.splits.report[:VERIFIED].floats()
    for precision, eager in itertools.product(("fp32", "fp16"), (True, False)):
        runtime = f"torch {'eager' if eager else 'CUDA graphs'} {precision}"
        with result.part(runtime):
            stages = {stage: TorchStage(folder / STAGE, half=precision == "fp16", eager=eager) for stage, folder in guard.stages.items()}
            result.content["verified"][runtime] = differences(answers_of(guard, asking(stages), images), exact, exact)
            result.content["speed"] += speed(guard, runtime, stages)
            if not eager:
                result.content["detection"][runtime] = detection(guard, asking(stages), prepared)[1]


def check_plans(guard: Guard, prepared: Prepared, exact: Tensors, result: Result) -> None:
    """The stages as TensorRT plans, in every precision for which there is a graph."""
    graphs = {"fp32": guard.stages, **prepared.graphs}
    for precision, reason in prepared.skipped.items():
        result.skip(f"TensorRT {precision}", reason)
    for precision, folders in graphs.items():
        with result.part(f"TensorRT {precision}"), tempfile.TemporaryDirectory() as folder:
            trt = find_builder()
            compiled = compile_copy(trt, guard, folders, Path(folder, "repository"))
            check_plan(trt, compiled, folders, precision, prepared, exact, result)


def check_plan(
    trt: ModuleType, guard: Guard, graphs: Mapping[str, Path], precision: str, prepared: Prepared, exact: Tensors, result: Result
) -> None:
    """Verify, refit, time and serve one compiled release, a copy that may be written to."""
    runtime = f"{trt.__name__} {precision}"
    images = prepared.splits.report[:VERIFIED].floats()
    name = read_plans(guard.repository, guard.name)[compute_capability()]
    plans = {stage: PlanStage(trt, folder / name, guard.spec.serving.max_batch_size) for stage, folder in guard.stages.items()}
    megabytes = sum((folder / name).stat().st_size for folder in guard.stages.values()) / 1e6
    seconds = sum(manifest.read_manifest(guard.repository, guard.name)["compiled"]["seconds"].values())
    result.content["plans"][runtime] = {"megabytes": round(megabytes, 2), "seconds": round(seconds, 1)}
    wanted = exact if precision == "fp32" else answers_of(guard, in_process(graphs), images)
    result.content["verified"][runtime] = differences(answers_of(guard, asking(plans), images), wanted, exact)
    result.content["speed"] += speed(guard, runtime, plans)
    scorer, result.content["detection"][runtime] = detection(guard, asking(plans), prepared)
    with result.part(f"serving {runtime}"):
        if trt.__name__ != "tensorrt":
            raise NoisecError(f"the stand-in backend runs plans of the package tensorrt, not of {trt.__name__}")
        publish(guard, scorer)
        serve(guard, runtime, asking(plans), scorer, images, result)


def find_builder() -> ModuleType:
    """The first TensorRT package that this machine has."""
    found = [name for name in TENSORRT if importlib.util.find_spec(name)]
    if not found:
        raise NoisecError(f"no TensorRT on this machine: none of the packages {', '.join(TENSORRT)} is installed")
    return importlib.import_module(found[0])


def compile_copy(trt: ModuleType, guard: Guard, graphs: Mapping[str, Path], target: Path) -> Guard:
    """A copy of the guard's repository whose newest release holds plans of the given graphs, stage -> folder."""
    shutil.copytree(guard.repository, target)
    copy = dataclasses.replace(guard, repository=target)
    for stage, folder in graphs.items():
        for path in folder.glob(f"{STAGE}*"):
            shutil.copyfile(path, copy.folder(stage) / path.name)
    _sign(copy)
    compile_with(trt, compute_capability(), target, guard.name, EngineOptions())
    return Guard.newest(target, guard.name)


def publish(guard: Guard, scorer: Scorer) -> None:
    """Put a scorer in the place of the guard's."""
    scorer.save(guard.folder("scorer") / "scorer.npz")
    _sign(guard)


def _sign(guard: Guard) -> None:
    """Bring the manifest in line with files that have been replaced."""
    content = manifest.read_manifest(guard.repository, guard.name)
    kept = {key: value for key, value in content.items() if key not in ("guard", "release", "files")}
    manifest.write_manifest(guard.repository, guard.name, guard.release, kept)


def machine() -> dict[str, Any]:
    """GPU and versions."""
    properties = torch.cuda.get_device_properties(0)
    gpu = {
        "name": properties.name,
        "compute_capability": compute_capability(),
        "memory_gib": properties.total_memory / 2**30,
        "driver": _driver(),
    }
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "CUDA": str(torch.version.cuda)}
    versions |= {package: _version(package) for package in ("onnxruntime", "numpy", "nvidia-pytriton", *TENSORRT[:2])}
    return {"gpu": gpu, "versions": versions}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def run_check(repository: Path, name: str, folder: Path, out: Path) -> Result:
    """Every part, in order of how likely it is to work.

    Args:
        folder: what ``noisec.benchmarks.gpu.pack`` prepared
        out: folder for the result

    Raises:
        NoisecError: there is no NVIDIA GPU that torch can use, or nothing is prepared; nothing has been written.
    """
    if not gpus():
        raise NoisecError("no NVIDIA GPU on this machine: the GPU check measures one; nothing was written")
    if not torch.cuda.is_available():
        raise NoisecError(f"torch {torch.__version__} cannot use this machine's NVIDIA GPU: install a build for CUDA; nothing was written")
    guard = Guard.measurable(repository, name)
    prepared = Prepared.load(folder, guard)
    result = Result(out, {**machine(), "guard": name, "release": guard.release})
    reference, images = in_process(guard.stages), prepared.splits.report[:VERIFIED].floats()
    exact = answers_of(guard, reference, images)
    check_torch(guard, prepared, exact, result)
    cpu = "onnxruntime (CPU) fp32"
    with result.part(f"detection on {cpu}"):
        result.content["detection"][cpu] = detection(guard, reference, prepared)[1]
    with result.part(f"serving {cpu}"):
        serve(guard, cpu, reference, guard.scorer, images, result)
    check_plans(guard, prepared, exact, result)
    console.print(f"{result.write()}: written, and the same as JSON beside it")
    return result


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def check(
    repository: Annotated[Path, typer.Argument(help="Model repository with the guard.")] = Path("model_repository"),
    guard: Annotated[str, typer.Option("--guard", "-g", help="Name of the guard.")] = "fashion_mnist",
    prepared: Annotated[Path, typer.Option(help="What noisec.benchmarks.gpu.pack prepared.")] = PREPARED,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the JSON file and the table.")] = Path("benchmarks/results/gpu"),
) -> None:
    """Verify a guard on this machine's NVIDIA GPU, refit and measure it; exit code 1 where a part broke.

    What python -m noisec.benchmarks.gpu.pack --only-prepare makes has to be there. Without a TensorRT every part with plans is skipped.
    """
    try:
        result = run_check(repository, guard, prepared, out)
    except (NoisecError, OSError) as error:
        sys.exit(f"gpu check: {error}")
    if result.content["failed"]:
        sys.exit(f"gpu check: {', '.join(result.content['failed'])} failed; the errors are in the table")


if __name__ == "__main__":
    app()
