"""The command line: a thin layer over functions."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import noisec
from noisec.errors import NoisecError

app = typer.Typer(
    help='Label and "is this input an attack?" in one Triton call.',
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
EXTRAS = {
    "build": (
        "torch",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "sklearn",
        "pydantic",
        "pooch",
        "art",
        "filelock",
        "matplotlib",
        "tomli",
        "packaging",
        "multiprocess",
        "safetensors",
        "scipy",
    ),
    "precision": ("modelopt", "onnx_graphsurgeon", "onnxconverter_common", "onnxslim", "polygraphy", "lief", "cppimport"),
    "serve": ("pytriton", "psutil"),
    "bench": ("aiohttp",),
}
"""extra -> modules that only it installs"""
console = Console(markup=False, highlight=False)


class Runtime(str, Enum):
    """Runtimes that compile."""

    TENSORRT = "tensorrt"


class Goal(str, Enum):
    """What settings are tuned for."""

    THROUGHPUT = "throughput"
    LATENCY = "latency"


class Layout(str, Enum):
    """How a guard is cut into models."""

    STAGED = "staged"
    FUSED = "fused"
    SINGLE = "single"
    GRAPH = "graph"


class Pixels(str, Enum):
    """What clients send."""

    FLOAT32 = "float32"
    UINT8 = "uint8"


Repository = Annotated[Path, typer.Argument(help="Model repository: a folder with one or more guards.")]
Url = Annotated[str, typer.Option("--url", "-u", help="gRPC address of the server.")]
GuardName = Annotated[str, typer.Option("--guard", "-g", help="Name of the guard.")]


def _epsilon(eps: float) -> float:
    if not 0 < eps <= 1:
        raise NoisecError(f"--eps {eps:g}: an epsilon lies in (0, 1], as pixels do in [0, 1]; 8 of 255 is 0.0314")
    return eps


Epsilon = Annotated[float, typer.Option(help="Largest change of a pixel, in (0, 1].", callback=_epsilon)]


def main() -> None:
    """Run the command line; errors that the user can mend are printed alone, without a traceback, and end with exit code 1."""
    try:
        app()
    except (NoisecError, OSError) as error:
        sys.exit(f"noisec: {error}")
    except ModuleNotFoundError as error:
        extra = next((extra for extra, modules in EXTRAS.items() if (error.name or "").split(".")[0] in modules), None)
        if extra is None:
            raise
        sys.exit(f"noisec: this command needs {error.name}: pip install 'noisec-triton[{extra}]'")


def _version(wanted: bool) -> None:
    if wanted:
        console.print(noisec.__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    pass


@app.command()
def build(
    spec: Annotated[Path, typer.Argument(help="The guard's TOML file.")],
    repository: Annotated[Path, typer.Option("--repository", "-r", help="Model repository to write into.")] = Path("model_repository"),
    work: Annotated[Path, typer.Option(help="Folder for finished steps; a re-run reuses them.")] = Path("workbench"),
    strict: Annotated[bool, typer.Option("--strict", help="Refuse broken or wrongly labelled files instead of skipping them.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Build in spite of failed sanity checks.")] = False,
) -> None:
    """Build a guard: data, training, export, calibration, report, model repository.

    Example: `noisec build builders/guards/fashion_mnist.toml --repository model_repository`
    """
    from noisec.builders.build import build as build_guard
    from noisec.builders.spec import read_spec

    guard = read_spec(spec)
    build_guard(guard, repository, work / guard.name, strict=strict, force=force)
    console.print(f"{repository}: {guard.name} release {guard.release} is ready; serve it with: noisec serve {repository}")


@app.command()
def calibrate(
    repository: Repository,
    guard: GuardName,
    url: Annotated[str | None, typer.Option("--url", "-u", help="gRPC address of a server with the latest release.")] = None,
    work: Annotated[Path, typer.Option(help="The folder that the guard was built in: its attacked images are asked again.")] = Path(
        "workbench"
    ),
    force: Annotated[bool, typer.Option("--force", help="Write the release in spite of what it loses against fp32.")] = False,
    new_images: Annotated[bool, typer.Option("--new-images", help="All images are new to the guard: none has trained it.")] = False,
) -> None:
    """Refit a guard's scorer on what its serving stages answer, as a new release beside the old.

    Example: `noisec calibrate model_repository --guard fashion_mnist --url localhost:8001`
    """
    from noisec.builders.recalibrate import recalibrate

    release = recalibrate(repository, guard, work / guard, url, force=force, new_images=new_images)
    console.print(f"release {release} is written; the server takes it when it loads the stages and then the ensemble again")


@app.command(name="compile")
def compile_command(
    repository: Repository,
    guard: GuardName,
    runtime: Annotated[Runtime, typer.Option(help="What the stages are compiled for.")] = Runtime.TENSORRT,
    optimum: Annotated[int, typer.Option(help="Batch size that the plans are tuned for.", min=1)] = 32,
    level: Annotated[int, typer.Option(help="Builder optimisation level.", min=0, max=5)] = 3,
    workspace: Annotated[int, typer.Option(help="Workspace limit in megabytes.", min=1)] = 1024,
    any_ampere_or_newer: Annotated[bool, typer.Option("--any-ampere-or-newer", help="One plan for every GPU from Ampere on.")] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Plans that later TensorRT versions load, if they may run code of their own.")
    ] = False,
) -> None:
    """Compile a guard's ONNX stages to TensorRT plans on this machine's GPU, as a new release beside the old.

    Run it in the container that will serve; then serve the new release and refit its scorer with `noisec calibrate --url`.

    Example: `noisec compile model_repository --guard fashion_mnist --level 5`
    """
    from noisec.builders.compiling import compile_guard
    from noisec.builders.spec import EngineOptions

    assert runtime is Runtime.TENSORRT
    options = EngineOptions(
        optimum=optimum,
        level=level,
        workspace_megabytes=workspace,
        any_ampere_or_newer=any_ampere_or_newer,
        version_compatible=version_compatible,
    )
    release = compile_guard(repository, guard, options)
    console.print(f"release {release} is written; serve it, then: noisec calibrate {repository} --guard {guard} --url HOST:PORT")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="An ONNX file, or package.module:callable that returns a torch module.")],
    shape: Annotated[str, typer.Option(help="Shape of one input of a torch module, as C,H,W.")] = "3,32,32",
) -> None:
    """Show what a classifier looks like: input, logits, candidates for the penultimate layer, parameters, multiply-adds.

    Example: `noisec inspect classifier.onnx` or `noisec inspect torchvision.models:resnet18 --shape 3,224,224`
    """
    from noisec.builders.inspect import inspect_classifier

    facts, candidates = inspect_classifier(model, shape)
    _show(model, ["", ""], facts)
    _show("Penultimate layer: the first is taken unless the TOML names another", ["tensor", "width", "what it is"], candidates)


@app.command()
def serve(
    repository: Repository,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="0 takes a free port.", min=0, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(help="0 takes a free port.", min=0, max=65535)] = 8001,
    metrics_port: Annotated[int, typer.Option(help="0 takes a free port.", min=0, max=65535)] = 8002,
    ready_seconds: Annotated[float, typer.Option(help="How long the models may take to load.", min=1)] = 60,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print Triton's own log.")] = False,
) -> None:
    """Serve a model repository with the embedded Triton until Ctrl-C or SIGTERM.

    Example: `noisec serve model_repository --grpc-port 9001`
    """
    from noisec.python_backend.server import EmbeddedServer
    from noisec.python_backend.server import serve as serve_until_stopped

    server = EmbeddedServer(
        repository,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        ready_seconds=ready_seconds,
        verbose=verbose,
    )
    serve_until_stopped(server)


@app.command()
def tune(
    repository: Repository,
    guard: GuardName,
    goal: Annotated[Goal, typer.Option(help="Most images a second, or the same with the 99th percentile within --latency-ms.")],
    latency_ms: Annotated[float | None, typer.Option(help="Bound of the 99th percentile, with --goal latency.", min=0)] = None,
    clients: Annotated[int, typer.Option(help="Each with one request under way.", min=1)] = 16,
    batch: Annotated[int, typer.Option(help="Images in a request.", min=1)] = 1,
    seconds: Annotated[float, typer.Option(help="Time budget.", min=1)] = 180,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write a copy of the guard with the best settings here.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the best settings into the repository itself.")] = False,
    work: Annotated[Path, typer.Option(help="Folder for decoded images.")] = Path("workbench"),
) -> None:
    """Find the serving settings that suit this machine: layout, instances, queue delays, largest batch. The verdicts stay.

    Example: `noisec tune model_repository --guard fashion_mnist --goal throughput --seconds 120 --out tuned`
    """
    if out is not None and (write or out.exists()):
        raise NoisecError(f"--out {out}: name a new folder, and do not give --write with it")
    from noisec.benchmarks.throughput.tuning import Wish, memories, tuning_rows
    from noisec.benchmarks.throughput.tuning import tune as tune_guard
    from noisec.builders.layout import rearrange
    from noisec.builders.release import Release

    found = tune_guard(repository, guard, Wish(goal.value, clients, batch, latency_ms), seconds, work / guard / "images")
    _show(f"{guard}: {clients} clients, {batch} images a request", *tuning_rows(found))
    console.print(
        f"best: {found.best.gain:.2f} of the present throughput" + ("" if found.complete else "; the budget ended the sweep early")
    )
    if lost := memories(Release.newest(repository, guard).spec, found.best.serving):
        console.print(lost)
    target = repository if write else out
    if target is not None:
        rearrange(repository, guard, found.best.serving, target)
        console.print(f"{target}: {guard} is written with the best settings; a running server takes them when it starts again")


@app.command()
def arrange(
    repository: Repository,
    guard: GuardName,
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for the copy.")],
    layout: Annotated[Layout | None, typer.Option(help="Each stage a model, two side by side, one process, or one graph.")] = None,
    pixels: Annotated[Pixels | None, typer.Option("--input", help="What clients send; bytes go with all but staged.")] = None,
    instances: Annotated[int | None, typer.Option(help="Copies of each network stage, or of the process or graph.", min=1)] = None,
    preferred_batch_size: Annotated[
        int | None, typer.Option(help="Images that a network's batch is made of where more are waiting; 0: as many as it takes.", min=0)
    ] = None,
    max_queue_size: Annotated[int | None, typer.Option(help="Requests that may wait, with single; 0: any number.", min=0)] = None,
) -> None:
    """Copy a guard's newest release with other serving settings, which `noisec tune` would find by measuring. The verdicts stay.

    Example: `noisec arrange model_repository --guard fashion_mnist --layout single --instances 2 --out single`
    """
    if out.exists():
        raise NoisecError(f"--out {out}: it exists already; name a new folder")
    from noisec.builders.layout import rearrange
    from noisec.builders.release import Release
    from noisec.builders.spec import changed

    given = {
        "layout": layout and layout.value,
        "input": pixels and pixels.value,
        "instances": instances,
        "preferred_batch_size": preferred_batch_size,
        "max_queue_size": max_queue_size,
    }
    asked = {name: value for name, value in given.items() if value is not None}
    if not asked:
        raise NoisecError(f"{guard} stays as it is: say what to change, such as --layout single")
    former = Release.newest(repository, guard).spec
    rearrange(repository, guard, changed(former, serving={**former.serving.model_dump(), **asked}).serving, out)
    console.print(f"{out}: {guard} is written with {', '.join(f'{name} = {value}' for name, value in asked.items())}")


@app.command()
def classify(
    files: Annotated[list[Path], typer.Argument(help="Image files, or .npz files with an array `images`.")],
    guard: GuardName,
    url: Url = "localhost:8001",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the verdicts as JSON; - for standard output.")] = None,
    labels_only: Annotated[bool, typer.Option(help="Ask only for labels: the server runs only the classifier.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.", min=0.001)] = 30.0,
) -> None:
    """Ask a served guard about images.

    Example: `noisec classify --guard fashion_mnist shoe.png shirt.png --json verdicts.json`
    """
    _check_file("--json", json_file)
    from noisec.clients import GuardClient
    from noisec.clients.files import read_images, verdict_rows

    with GuardClient(url, guard, timeout=timeout) as client:
        names, images = read_images(files, client.interface)
        rows = verdict_rows(names, client.classify(images, labels_only=labels_only), client.interface)
    if json_file != Path("-"):
        _show(f"{guard} at {url}", list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])
    if json_file:
        _write_json(json_file, rows)


@app.command()
def verify(
    repository: Repository,
    guard: Annotated[str | None, typer.Option("--guard", "-g", help="Only this guard.")] = None,
) -> None:
    """Compare every file of a model repository with the digests in its manifests.

    Example: `noisec verify model_repository`
    """
    from noisec.manifest import guards, verify_repository
    from noisec.manifest import verify as verify_guard

    found = [guard] if guard else guards(repository)
    if not found:
        raise NoisecError(f"{repository}: no guard in this folder")
    problems = verify_guard(repository, guard) if guard else verify_repository(repository)
    if problems:
        raise NoisecError("\n".join([f"{repository}: {len(problems)} files or folders are not as they were built", *problems]))
    console.print(f"{', '.join(found)}: every file is as it was built")


@app.command()
def audit(
    spec: Annotated[Path, typer.Argument(help="The guard's TOML file.")],
    work: Annotated[Path, typer.Option(help="Folder for finished steps, as of `noisec build`.")] = Path("workbench"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the evidence as JSON; - for standard output.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw what the audit saw of each class into this picture.")] = None,
    like: Annotated[
        list[Path] | None,
        typer.Option(help="Evidence (--json) of a clean classifier with the same classes and architecture; at least three calibrate."),
    ] = None,
    false_alarm: Annotated[float, typer.Option(help="With --like: share of clean classifiers that may be called backdoored.")] = 0.05,
) -> None:
    """Search a classifier for a backdoor (BAN) before it ships. Exit code 0: none found; 3: probably backdoored; 1: it cannot be audited.

    Example: `noisec audit builders/guards/demo.toml --plot audit.png`

    Calibrated: `noisec audit guard.toml --like clean1.json --like clean2.json --like clean3.json`
    """
    _check_file("--json", json_file)
    _check_picture("--plot", plot)
    import dataclasses

    from noisec.builders.audit.guard import audit_protected, draw_audit, read_evidence, said
    from noisec.builders.audit.reference import fit_reference, judged_by
    from noisec.builders.datasets import load_splits
    from noisec.builders.protect import protect
    from noisec.builders.spec import read_spec
    from noisec.builders.workbench import Workbench

    guard = read_spec(spec)
    bench = Workbench(work / guard.name)
    splits = load_splits(guard.data, guard.seed, cache=bench.folder / "images")
    reference = fit_reference([read_evidence(path) for path in like], false_alarm) if like else None
    evidence = audit_protected(guard, splits, protect(guard, splits, bench), bench)
    if reference:
        evidence = judged_by(evidence, reference)
    if plot:
        draw_audit(evidence, splits.class_names, plot)
    if json_file:
        _write_json(json_file, dataclasses.asdict(evidence))
    if json_file != Path("-"):
        console.print(said(evidence, splits.class_names))
    raise typer.Exit(3 if evidence.backdoored else 0)


@app.command()
def repair(
    spec: Annotated[Path, typer.Argument(help="The guard's TOML file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New weights file; an existing one is not written over.")],
    work: Annotated[Path, typer.Option(help="Folder for finished steps, as of `noisec build`.")] = Path("workbench"),
    epochs: Annotated[int, typer.Option(help="Of fine-tuning on 5 % of the training images.", min=1)] = 25,
    learning_rate: Annotated[float, typer.Option(help="The paper's is .005, with which small networks keep their backdoor.")] = 0.05,
    target: Annotated[
        int | None, typer.Option(help="Class that the backdoor leads to; by default the one that an audit finds, -1 for none.")
    ] = None,
) -> None:
    """Fine-tune a backdoored classifier and write the repaired weights; audit them again before they ship.

    Where the class that the backdoor leads to is known (--target, else from an audit, which runs first), it learns the true labels of
    images that lean towards that class; else the classes under neuron noise, as BAN has it.

    Example: `noisec repair guard.toml --out repaired.safetensors`

    As published: `noisec repair guard.toml --out repaired.safetensors --target -1 --learning-rate 0.005`
    """
    if out.exists():
        raise NoisecError(f"--out {out}: there is a file already, and weights are not written over; choose another name")
    _check_file("--out", out)
    from safetensors.torch import save_file

    from noisec.builders.audit.evidence import UNKNOWN
    from noisec.builders.audit.guard import audit_protected, repair_protected, said
    from noisec.builders.audit.repair import RepairSettings
    from noisec.builders.datasets import load_splits
    from noisec.builders.protect import protect
    from noisec.builders.spec import read_spec
    from noisec.builders.workbench import Workbench

    guard = read_spec(spec)
    bench = Workbench(work / guard.name)
    splits = load_splits(guard.data, guard.seed, cache=bench.folder / "images")
    settings = RepairSettings(epochs=epochs, learning_rate=learning_rate, seed=guard.seed)
    protected = protect(guard, splits, bench)
    if target is None and protected.network is not None:
        evidence = audit_protected(guard, splits, protected, bench)
        console.print(said(evidence, splits.class_names))
        target = evidence.suspect
    module, figures = repair_protected(guard, splits, protected, settings, None if target == UNKNOWN else target)
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, out)
    console.print(f"{out}: accuracy {figures['accuracy_before']:.4f} before, {figures['accuracy_after']:.4f} after; now: noisec audit")


bench = typer.Typer(
    help="Measure: what a guard detects, what hardening costs an attacker, what the audit finds, what serving costs.", no_args_is_help=True
)
app.add_typer(bench, name="bench")


@bench.callback()
def _ended_as_by_ctrl_c() -> None:
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is finished is written, and servers that were started are stopped


def _write_study(page: Path, text: str, rows: list[Any]) -> None:
    """A study's page, and its rows as JSON beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)
    _write_json(page.with_suffix(".json"), rows)
    console.print(f"{page}: {len(rows)} rows")


@bench.command()
def detection(
    repository: Repository,
    guard: GuardName,
    attacks: Annotated[str, typer.Option(help="White-box attacks, as method-epsilon, with commas.")],
    black_box: Annotated[str, typer.Option(help="The same made on a smaller classifier, and replayed.")] = "",
    ladder: Annotated[str, typer.Option(help="Epsilons of the attackers that adapt to the guard; the first for all of them.")] = "",
    triggers: Annotated[str, typer.Option(help="Backdoors: badnets, blend, wanet, label-consistent, adaptive-blend, iad, bpp.")] = "",
    images: Annotated[int, typer.Option(help="Benign images, and as many attacked ones.", min=100)] = 1000,
    slow: Annotated[int, typer.Option(help="Images for C&W, DeepFool, AutoAttack and HopSkipJump.", min=10)] = 100,
    laddered: Annotated[int, typer.Option(help="Images for the attackers that adapt.", min=10)] = 200,
    queried: Annotated[int, typer.Option(help="Images for those of them who ask the guard.", min=10)] = 60,
    queries: Annotated[int, typer.Option(help="Of the query attacker, for each image.", min=1)] = 1000,
    square: Annotated[int, typer.Option(help="Queries of Square and HopSkipJump.", min=1)] = 1000,
    poisoned: Annotated[int, typer.Option(help="Training images of a backdoored classifier, a part of them poisoned.", min=100)] = 10000,
    poisoned_epochs: Annotated[int, typer.Option(help="Of its training, which begins at the guard's own classifier.", min=1)] = 3,
    seed: Annotated[int, typer.Option(help="Of every attack.", min=0)] = 0,
    seeds: Annotated[int, typer.Option(help="From --seed on; those after the first repeat the faster white-box attacks.", min=1)] = 1,
    work: Annotated[Path, typer.Option(help="The folder that the guard was built in; keeps finished attacks.")] = Path("workbench"),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for tables and plots.")] = Path("benchmarks/results/detection"),
) -> None:
    """Measure what a guard detects, under the honest and the published protocol, beside other detectors; an interrupted run goes on.

    Finished parts stay in --work: parts of a long run can be commands of their own, side by side, and the whole command then takes them.

    Example: `noisec bench detection model_repository --guard fashion_mnist --attacks fgsm-0.1,pgd-0.1,square-0.2 --ladder 0.1,0.05`
    """
    from noisec.benchmarks.detection.run import Plan, Sizes, run_benchmark
    from noisec.benchmarks.detection.subject import Subject

    sizes = Sizes(images, slow, laddered, queried, queries, square, poisoned=poisoned, poisoned_epochs=poisoned_epochs)
    plan = Plan(_parts(attacks), _parts(black_box), _numbers("--ladder", ladder), _parts(triggers), sizes)
    subject = Subject.open(repository, guard, work / guard)
    run_benchmark(subject, plan, work / guard, out / guard, seed, _command(), seeds)


@bench.command()
def hardening(
    repository: Repository,
    guard: GuardName,
    eps: Epsilon,
    count: Annotated[int, typer.Option(help="Images that the adaptive attacker attacks.", min=10)] = 100,
    seed: Annotated[int, typer.Option(help="Of every attack and draw.", min=0)] = 0,
    work: Annotated[Path, typer.Option(help="The folder that the guard was built in; keeps finished attacks.")] = Path("workbench"),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the table.")] = Path("benchmarks/results/detection"),
) -> None:
    """Measure what random choices inside a guard cost an attacker who holds its weights.

    Example: `noisec bench hardening model_repository --guard fashion_mnist --eps 0.05`
    """
    from noisec.benchmarks.detection.hardening import run_study

    rows, text = run_study(repository, guard, work / guard, eps, count, seed)
    _write_study(out / guard / "hardening.md", text, rows)


@bench.command()
def memory(
    repository: Repository,
    guard: GuardName,
    eps: Epsilon,
    count: Annotated[int, typer.Option(help="Images that are searched around at once.", min=10)] = 60,
    queries: Annotated[int, typer.Option(help="Questions about each image.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Of the searches.", min=0)] = 0,
    work: Annotated[Path, typer.Option(help="The folder that the guard was built in.")] = Path("workbench"),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the table.")] = Path("benchmarks/results/detection"),
) -> None:
    """Measure what a memory of recent inputs costs an attacker who searches with the guard's answers.

    Example: `noisec bench memory model_repository --guard fashion_mnist --eps 0.1`
    """
    from noisec.benchmarks.detection.remembering import run_study

    rows, text = run_study(repository, guard, work / guard, eps, count, queries, seed)
    _write_study(out / guard / "memory.md", text, rows)


@bench.command()
def denoisers(
    spec: Annotated[Path, typer.Argument(help="The guard's TOML file.")],
    attacks: Annotated[str, typer.Option(help="White-box attacks, as method-epsilon, with commas.")],
    epochs: Annotated[int, typer.Option(help="Of every denoiser's training.", min=1)] = 3,
    images: Annotated[int, typer.Option(help="Benign images, and as many attacked ones.", min=100)] = 1000,
    seed: Annotated[int, typer.Option(help="Of every attack.", min=0)] = 0,
    work: Annotated[Path, typer.Option(help="Keeps trained denoisers and finished attacks.")] = Path("workbench"),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the tables.")] = Path("benchmarks/results/detection"),
) -> None:
    """Measure what the denoiser's kind, training noise and guidance do to detection; an interrupted run goes on.

    Example: `noisec bench denoisers builders/guards/fashion_mnist.toml --attacks fgsm-0.05,pgd-0.02,pgd-0.1`
    """
    from noisec.benchmarks.detection.denoisers import as_json, as_markdown, run_study
    from noisec.builders.spec import read_spec

    guard = read_spec(spec)
    rows = run_study(guard, _parts(attacks), epochs, images, work / guard.name, seed)
    _write_study(out / guard.name / "denoisers.md", as_markdown(rows, guard.name, _command()), as_json(rows))


@bench.command("audit")
def audit_zoo(
    work: Annotated[Path, typer.Option(help="Keeps trained classifiers and finished verdicts.")] = Path("workbench"),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for tables and plot.")] = Path("benchmarks/results/audit"),
    seeds: Annotated[int, typer.Option(help="Clean classifiers in each family; of each backdoor half as many.", min=1)] = 3,
    epochs: Annotated[int, typer.Option(help="Of each classifier's training.", min=1)] = 1,
    only: Annotated[
        str | None, typer.Option(help="Families, with commas: resnet, vgg, densenet; a later run takes over what is done.")
    ] = None,
) -> None:
    """Train clean and backdoored classifiers, and measure how well audits tell them apart and repairs mend them; resumable.

    Example: `noisec bench audit --only resnet --seeds 1 --epochs 2 --out resnet`
    """
    from noisec.benchmarks.audit.families import FAMILIES
    from noisec.benchmarks.audit.run import Plan, run_benchmark

    families = _parts(only) if only else tuple(FAMILIES)
    plan = Plan(families, clean=seeds, backdoored=(seeds + 1) // 2, epochs=epochs)
    run_benchmark(plan, work, out, _command())


@bench.command()
def throughput(
    repository: Repository,
    guard: GuardName,
    url: Annotated[str | None, typer.Option("--url", "-u", help="gRPC address of a server with it; else one is started.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The same figures in under 3 minutes; writes no tables or plots.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON; - for standard output.")] = None,
    peers: Annotated[str, typer.Option(help="Of litserve, bentoml, mlserver, pytriton, mlserver-alibi-detect; or none.")] = "none",
    soak: Annotated[float, typer.Option(help="Seconds at 80 % load in the end.", min=0)] = 0,
    seconds: Annotated[float | None, typer.Option(help="Of each measurement; 3, and 1 with --quick.", min=0.2)] = None,
    rounds: Annotated[int | None, typer.Option(help="In which what is compared takes turns; 5, and 3 with --quick.", min=1)] = None,
    work: Annotated[Path, typer.Option(help="Folder for decoded images and the environments of other servers.")] = Path("workbench"),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for tables and plots.")] = Path("benchmarks/results/throughput"),
) -> None:
    """Measure what serving a guard costs: perf_analyzer's figures, and the limit without a server in the same run.

    Example: `noisec bench throughput model_repository --guard fashion_mnist --quick --json figures.json`
    """
    _check_file("--json", json_file)
    from dataclasses import replace

    from noisec.benchmarks.throughput.run import QUICK, Plan, run_benchmark

    if quick and soak:
        raise NoisecError(f"--soak {soak:g} with --quick: a quick run writes no page, where a soak is told; leave one of them out")
    plan = QUICK if quick else Plan()
    plan = replace(plan, seconds=seconds or plan.seconds, rounds=rounds or plan.rounds, soak=soak)
    plan = replace(plan, peers=() if peers == "none" else _parts(peers))
    summary = run_benchmark(repository, guard, plan, work, None if quick else out, url, _command())
    if json_file != Path("-"):
        _show(guard, ["", ""], [[name, _cell(value)] for name, value in summary.items() if name != "peers"])
    if json_file:
        _write_json(json_file, {guard: summary})


def _command() -> str:
    """What was typed, without this machine's folders."""
    return " ".join(["noisec", *(Path(part).name if part.startswith("/") else part for part in sys.argv[1:])])


def _parts(text: str) -> tuple[str, ...]:
    """Names between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(option: str, text: str) -> tuple[float, ...]:
    """Numbers between commas."""
    try:
        return tuple(map(float, _parts(text)))
    except ValueError as error:
        raise NoisecError(f"{option} {text}: expected numbers with commas between them, such as 0.1,0.05") from error


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for the guard, the picture and the figures.")] = Path("demo"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Build a guard from scratch, serve it on a real Triton, attack it over gRPC and show what it catches (2.5 minutes on 2 cores).

    Example: `noisec demo --json figures.json`
    """
    _check_file("--json", json_file)
    from noisec.benchmarks.demo import run_demo

    figures, heads, rows = run_demo(folder)
    _show("Answers over gRPC", heads, rows)
    console.print(
        f"missed: succeeded and not flagged. {figures['requests_per_second']:.0f} single-image requests/s; "
        f"{figures['seconds']:.0f} s in all; picture: {folder / 'demo.png'}"
    )
    for path in filter(None, [folder / "figures.json", json_file]):
        _write_json(path, figures)


def _show(title: str, heads: list[str], rows: list[list[str]]) -> None:
    table = Table(title=Text(title))
    for index, head in enumerate(heads):
        table.add_column(Text(head), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # brackets in a cell are no markup
    console.print(table)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _check_file(option: str, path: Path | None) -> None:
    """Before the work, not after it."""
    if path is not None and path != Path("-") and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise NoisecError(f"{option} {path}: cannot be written; name a file in a folder that exists")


def _check_picture(option: str, path: Path | None) -> None:
    """The same for a picture, whose ending says what kind it is."""
    _check_file(option, path)
    if path is not None:
        from matplotlib.backend_bases import FigureCanvasBase

        kinds = FigureCanvasBase.get_supported_filetypes()
        if path.suffix.removeprefix(".") not in kinds:
            raise NoisecError(f"{option} {path}: no kind of picture; end the name in .{', .'.join(kinds)}")


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    if path == Path("-"):
        sys.stdout.write(text)
    else:
        path.write_text(text)
