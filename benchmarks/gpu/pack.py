"""Prepare the GPU check on a CPU, and pack what has to travel to a machine without network.

Example: ``python -m noisec.benchmarks.gpu.pack``, then the commands that it prints. The machine is taken to have Python 3.12 with torch for
CUDA, onnx and onnxruntime, which do not travel, nor does a TensorRT; everything else travels as wheels.

Without a TensorRT the check skips every part with plans. The package ``tensorrt``, of a TensorRT container or NVIDIA's own index, does all
of them. TensorRT for RTX can travel, with ``--also tensorrt-rtx-cu13-bindings --also tensorrt-rtx-cu13-libs``: it knows no Hopper GPU, and
its plans are verified and timed, and not served, for the stand-in backend runs those of ``tensorrt``.

The embedded server needs NumPy 1.26, so the environment that ``install.sh`` makes puts it in front of the machine's own NumPy. The
machine's packages run with it: tried on Python 3.12 with torch 2.11 for CUDA 13, onnx 1.23 and onnxruntime 1.31, installed with NumPy 2.5.
The server's Python backend also needs ``libpython3.12.so.1.0`` of the machine's own Python, which does not travel; without it the check
skips serving.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from noisec.benchmarks.gpu.prepared import ATTACKED, PREPARED, Guard, Prepared
from noisec.builders import datasets
from noisec.builders.attacks import AttackedImages, AttackSpec, attack
from noisec.builders.graphs import save_model
from noisec.builders.images import Floats, Images, Splits
from noisec.builders.layout import changed_stages, unarranged
from noisec.builders.precision import STAGE
from noisec.builders.progress import console
from noisec.builders.protect import LogitsOnly, Protected
from noisec.builders.repository import read_widths
from noisec.builders.spec import NETWORK_STAGES, Precision, Stage
from noisec.builders.torchgraph import TorchGraph
from noisec.builders.variants import laid_out, lowered
from noisec.builders.workbench import Workbench
from noisec.errors import NoisecError

ATTACKS = ("fgsm-0.05", "pgd-0.1")
IMAGES = 1000
"""report images that are attacked"""
LOWER: tuple[Precision, ...] = ("fp16", "int8")
REQUIREMENTS = (
    *("nvidia-pytriton==0.7.0", "numpy<2", "psutil"),  # the embedded server
    *("tritonclient[grpc]", "typer", "rich", "pillow", "pydantic", "scikit-learn", "scipy"),
)
MANYLINUX = ("_2_35", "_2_34", "_2_31", "_2_28", "_2_27", "_2_26", "_2_24", "_2_17", "2014", "_2_12", "2010", "_2_5", "1")
"""pip matches a wheel's platform letter by letter; where none matches it takes a pure Python wheel, and such a protobuf would be mixed with
the machine's own compiled one"""
ROOMS = ("builders", "python_backend", "clients", "benchmarks")
MEBIBYTE = 1 << 20


def prepare(repository: Path, name: str, folder: Path) -> None:
    """Write what ``noisec.benchmarks.gpu.check`` needs besides the guard: images, attacked images, graphs in lower precision.

    The attacks are white-box, on the classifier as it lies in the repository. A precision that cannot be made here is left out, with the
    reason.
    """
    guard = Guard.measurable(repository, name)
    splits = datasets.load_splits(guard.spec.data, guard.spec.seed, cache=folder.parent / "images")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / ATTACKED).mkdir()
    (folder / ATTACKED / "names.json").write_text(json.dumps(ATTACKS))
    for one in ATTACKS:
        attack_guard(guard, splits.report[:IMAGES], one).save(folder / ATTACKED / f"{one}.npz")
    made = {precision: lower_guard(guard, precision, splits, folder / precision) for precision in LOWER}
    skipped = {str(precision): reason for precision, reason in made.items() if isinstance(reason, str)}
    graphs = {str(precision): stages for precision, stages in made.items() if not isinstance(stages, str)}
    Prepared(splits, folder / ATTACKED, graphs, skipped).save(folder, guard)
    for precision, reason in skipped.items():
        console.print(f"{precision}: skipped: {reason}")
    console.print(f"{folder}: prepared, {_megabytes(folder.rglob('*')):.1f} MiB")


def attack_guard(guard: Guard, images: Images, name: str) -> AttackedImages:
    """Attack a guard's classifier with the gradients of its ONNX graph."""
    network = TorchGraph(guard.folder("classifier") / STAGE)
    logits = LogitsOnly(network)  # type: ignore[arg-type]  # only called
    widths, _ = read_widths(guard.repository, guard.name)

    def answer(pixels: Floats) -> Floats:
        found: Floats = logits(torch.from_numpy(pixels)).numpy()
        return found

    protected = Protected(guard.folder("classifier"), logits, answer, widths.classes, widths.features, "ONNX graph")
    return attack(protected, images, AttackSpec.parse(name), guard.spec.seed)


def lower_guard(guard: Guard, precision: Precision, splits: Splits, folder: Path) -> dict[str, Path] | str:
    """Both network stages in a lower precision, as a build makes them: lowered one by one, then laid out as they are served.

    Returns:
        stage -> its folder, or why that cannot be done here
    """
    with tempfile.TemporaryDirectory() as place:
        bench = Workbench(Path(place, "bench"))
        exact = plain_stages(guard, Path(place))
        try:
            made = {stage: lowered(guard.spec, exact, stage, precision, splits, bench) for stage in NETWORK_STAGES}
            made |= {stage: laid_out(guard.spec, made, stage, bench) for stage in changed_stages(guard.spec)}
        except NoisecError as error:
            return str(error)
        return {str(stage): copy_graph(path, folder / stage) for stage, path in made.items()}


def plain_stages(guard: Guard, folder: Path) -> dict[Stage, Path]:
    """Stage -> folder with its graph as it was before it was laid out: staged, with float input."""
    plain = {stage: guard.folder(stage) for stage in NETWORK_STAGES}
    for stage in changed_stages(guard.spec):
        graph, plain[stage] = unarranged(guard.spec, stage, plain[stage]), folder / stage
        plain[stage].mkdir()
        save_model(graph, plain[stage])
    return plain


def copy_graph(source: Path, target: Path) -> Path:
    """A graph and its external data."""
    target.mkdir(parents=True)
    for path in source.glob(f"{STAGE}*"):
        shutil.copyfile(path, target / path.name)
    return target


def download(folder: Path, requirements: Sequence[str]) -> list[Path]:
    """The wheels of some packages and of all that they need, for CPython 3.12 on Linux, x86-64."""
    shutil.rmtree(folder, ignore_errors=True)
    platforms = [f"--platform=manylinux{version}_x86_64" for version in MANYLINUX]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    subprocess.run([*command, *platforms, "--dest", folder, *requirements], check=True)
    return sorted(folder.glob("*.whl"))


def split_into_pieces(wheels: Iterable[Path], folder: Path, limit: int) -> dict[str, list[str]]:
    """Sort files into ``folder/1``, ``folder/2``, ..., none of which holds more than ``limit`` bytes; larger files are cut into parts.

    Returns:
        name of each file that was cut -> its parts, in order, as paths below ``folder``
    """
    shutil.rmtree(folder, ignore_errors=True)
    parts: list[tuple[int, str, Path, int]] = []  # size, name, of which file, from where
    for path in wheels:
        size = path.stat().st_size
        for number, start in enumerate(range(0, size, limit)):
            parts.append((min(limit, size - start), path.name + (f".part-{number}" if size > limit else ""), path, start))
    free: list[int] = []
    cut: dict[str, list[str]] = {}
    for size, name, path, start in sorted(parts, key=lambda part: -part[0]):
        piece = next((index for index, left in enumerate(free) if left >= size), len(free))
        free[piece:] = [limit, *free[piece + 1 :]] if piece == len(free) else free[piece:]
        free[piece] -= size
        target = folder / str(piece + 1) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as source:
            source.seek(start)
            target.write_bytes(source.read(size))
        if name != path.name:
            cut.setdefault(path.name, []).append(f"{piece + 1}/{name}")
    return {name: sorted(found, key=lambda part: int(part.rpartition("-")[2])) for name, found in cut.items()}


def install_script(cut: dict[str, list[str]]) -> str:
    """A shell script that makes ``venv`` beside itself, out of ``pieces`` beside itself, for the checkout in whose root it is run.

    A plain environment would see the packages of the system's Python alone, and not those of the environment that ``PYTHON`` may belong to:
    hence the .pth file. The checkout's own code is linked, so that a change of it takes effect at once.
    """
    joins = [f'cat {" ".join(f"pieces/{part}" for part in parts)} > "joined/{name}"' for name, parts in cut.items()]
    rooms = " ".join(f'"$root/{room}"' for room in ROOMS)
    lines = [
        "#!/bin/sh",
        "# Run in the root of a checkout. PYTHON: the interpreter with torch, onnx and onnxruntime.",
        "set -eu",
        'python=$(command -v "${PYTHON:-python3}")',
        "root=$PWD",
        'cd "$(dirname "$0")"',
        "rm -rf joined venv",
        "mkdir joined",
        *joins,
        '"$python" -m venv --without-pip --system-site-packages venv',
        "packages='import sysconfig; print(sysconfig.get_path(\"purelib\"))'",
        'site=$(venv/bin/python -c "$packages")',
        'find pieces joined -name "*.whl" | xargs "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site"',
        'echo "import site; site.addsitedir(\'$("$python" -c "$packages")\')" > "$site/machine.pth"',
        'mkdir "$site/noisec"',
        f'ln -s "$root"/src/noisec/* {rooms} "$site/noisec/"',
        'venv/bin/python -c \'import numpy, onnx, onnxruntime, torch; print("NumPy", numpy.__version__, "torch", torch.__version__)\'',
    ]
    return "\n".join(lines) + "\n"


def pack(folder: Path, also: Sequence[str], limit: int) -> int:
    """Wheels into pieces, and ``install.sh``: the number of pieces."""
    wheels = download(folder / "wheels", [*REQUIREMENTS, *also])
    cut = split_into_pieces(wheels, folder / "pieces", limit)
    (folder / "install.sh").write_text(install_script(cut))
    return len(list((folder / "pieces").iterdir()))


def _megabytes(paths: Iterable[Path]) -> float:
    return sum(path.stat().st_size for path in paths if path.is_file()) / MEBIBYTE


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    repository: Annotated[Path, typer.Argument(help="Model repository with the guard.")] = Path("model_repository"),
    guard: Annotated[str, typer.Option("--guard", "-g", help="Name of the guard.")] = "fashion_mnist",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything.")] = PREPARED.parent,
    also: Annotated[
        list[str] | None, typer.Option(help="One more package to carry, such as tensorrt-rtx-cu13-bindings; repeatable.")
    ] = None,
    megabytes: Annotated[int, typer.Option(help="Largest piece, in MiB.", min=1)] = 48,
    only_prepare: Annotated[bool, typer.Option("--only-prepare", help="Only images, attacks and graphs; no wheels.")] = False,
) -> None:
    """Prepare the GPU check on a CPU and pack the wheels for a machine without network, in pieces.

    The machine has Python 3.12 with torch for CUDA, onnx and onnxruntime. A TensorRT is not among the wheels either, and without one the
    check skips every part with plans: install the package tensorrt there, or carry TensorRT for RTX, which knows no Hopper GPU and whose
    plans are measured and not served, with --also tensorrt-rtx-cu13-bindings --also tensorrt-rtx-cu13-libs.
    """
    try:
        prepare(repository, guard, out / PREPARED.name)
        pieces = 0 if only_prepare else pack(out, also or [], megabytes * MEBIBYTE)
    except (NoisecError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"gpu pack: {error}")
    for number in range(1, pieces + 1):
        piece = out / "pieces" / str(number)
        print(f"copy {piece} into the same place of a checkout on the GPU machine ({_megabytes(piece.iterdir()):.1f} MiB)")
    if pieces:
        print(f"copy {out / PREPARED.name} and {out / 'install.sh'} likewise, and run there, in the checkout's root:")
        print(f"  sh {out / 'install.sh'}")
        print(f"  {out / 'venv/bin/python'} -m noisec.benchmarks.gpu.check --prepared {out / PREPARED.name}")


if __name__ == "__main__":
    app()
