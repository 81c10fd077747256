"""A release whose network stages are TensorRT plans, compiled on the machine that will run them. Needs neither torch nor training code."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from noisec import manifest
from noisec.builders.engine import build_plan, compute_capability, find_tensorrt
from noisec.builders.progress import console
from noisec.builders.release import Release
from noisec.builders.repository import read_widths, write_repository
from noisec.builders.spec import EngineOptions, GuardSpec, changed
from noisec.builders.workbench import DONE
from noisec.python_backend.runtimes.tensorrt.names import plan_name


def compile_guard(repository: Path, guard: str, options: EngineOptions) -> int:
    """Compile the newest release's ONNX stages on this machine's GPU and publish them as the next release.

    Returns:
        the new release's number. Its scorer is still the old release's: serve it and run `noisec calibrate`.

    Raises:
        NoisecError: no GPU, no TensorRT, or a stage that it cannot compile; the repository is then as it was.
    """
    return compile_with(find_tensorrt(), compute_capability(), repository, guard, options)


def compile_with(trt: Any, capability: str, repository: Path, guard: str, options: EngineOptions) -> int:
    """The same with a given TensorRT package, for GPUs of one compute capability, such as ``9.0``."""
    old, former = manifest.read_manifest(repository, guard), Release.newest(repository, guard)
    new = changed(former.spec, release=old["release"] + 1, runtime="tensorrt", tensorrt=options)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        stages = {stage: Path(folder, stage) for stage in ("autoencoder", "classifier")}
        for stage, target in stages.items():
            start = time.monotonic()
            compile_stage(trt, capability, former.folder(stage), new, target)
            seconds[stage] = time.monotonic() - start
            console.print(f"  {stage}: compiled in {seconds[stage]:.0f} s")
        widths, names = read_widths(repository, guard)
        write_repository(
            repository,
            new,
            widths,
            names,
            stages,
            dataclasses.replace(former.scorer, release=new.release),
            {capability: plan_name(capability)},
        )
    content = {key: value for key, value in old.items() if key not in ("guard", "release", "files", "spec", "figures", "threshold")}
    compiled = {
        "tensorrt": trt.__version__,
        "compute_capability": capability,
        "seconds": seconds,
        "scorer_fitted_on_release": old["release"],
    }
    content |= {"spec": json.loads(new.model_dump_json()), "compiled": compiled}
    manifest.write_manifest(repository, guard, new.release, content)
    return new.release


def compile_stage(trt: Any, capability: str, source: Path, spec: GuardSpec, target: Path) -> None:
    """Copy a stage's folder and put its plan and timing cache beside the graph."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.plan", DONE), dirs_exist_ok=True)
    plan = build_plan(trt, target / "model.onnx", spec.serving.max_batch_size, spec.tensorrt, target / "model.timing")
    (target / plan_name(capability)).write_bytes(plan)
