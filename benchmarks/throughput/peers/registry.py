"""The peers: how each is started, asked and stopped, and the settings among which the benchmark takes its best."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from noisec.benchmarks.throughput.peers.senders import Open, over_grpc, over_http
from noisec.benchmarks.throughput.peers.servers.compute import ANSWERS, Task
from noisec.benchmarks.throughput.target import CORES
from noisec.builders.repository import read_widths
from noisec.contract import stage_model
from noisec.manifest import releases

REQUIREMENTS = Path(__file__).parent / "requirements"
LARGEST_MESSAGE = 2**30
"""bytes that MLServer takes over gRPC"""
Command = Callable[[Path, Path, Task], list[str]]
"""(environment, an empty folder in which the server runs, what it serves) -> command line; it may write files into the folder"""


@dataclass(frozen=True)
class Settings:
    """Where a peer has no such setting, its value says nothing."""

    workers: int = 1
    threads: int = 1
    """compute threads of each worker"""
    batch: int = 1
    """requests or images that are computed together, as the peer counts them; 1 joins none"""
    delay_ms: float = 0.0
    """how long a request waits for others"""
    preferred: int = 0
    """what a longer queue is parted into; 0: ``batch``"""

    def __str__(self) -> str:
        parted = f", {self.preferred} preferred" if self.preferred else ""
        joined = f"batches of {self.batch}{parted}, delay {self.delay_ms:g} ms" if self.batch > 1 else "no batching"
        return f"{self.workers} x {self.threads} threads, {joined}"


@dataclass(frozen=True)
class Peer:
    """Another server with the same guard."""

    name: str
    package: str
    """whose version is the peer's; also names its requirements and its environment"""
    encoding: str
    settings: tuple[Settings, ...]
    command: Command
    open: Open

    @property
    def requirements(self) -> list[str]:
        """``package==version``, everything that its environment holds; a package without one in the file has the version that is
        installed here, so that what is compared computes with the same."""
        lines = (REQUIREMENTS / f"{self.package}.txt").read_text().splitlines()
        return [line if "==" in line else f"{line}=={metadata.version(line)}" for line in lines if line and not line.startswith("#")]

    @property
    def version(self) -> str:
        return dict(line.split("==") for line in self.requirements)[self.package]


def _litserve(environment: Path, folder: Path, task: Task) -> list[str]:
    return [f"{environment}/bin/python", "-m", "servers.litserve_app"]


def _bentoml(environment: Path, folder: Path, task: Task) -> list[str]:
    return [f"{environment}/bin/bentoml", "serve", "servers.bentoml_app:GuardService", "--host", "127.0.0.1", "--port", str(task.ports[0])]


def _pytriton(environment: Path, folder: Path, task: Task) -> list[str]:
    return [f"{environment}/bin/python", "-m", "servers.pytriton_app"]


def _mlserver(environment: Path, folder: Path, task: Task) -> list[str]:
    model: dict[str, object] = {"name": task.guard, "implementation": "servers.mlserver_runtime.GuardRuntime"}
    joined = {"max_batch_size": task.batch, "max_batch_time": task.delay_ms / 1000} if task.batch > 1 else {}
    return _start_mlserver(environment, folder, task, model | joined)


def _alibi(environment: Path, folder: Path, task: Task) -> list[str]:
    """MLServer's adaptive batching stays off: with this runtime it mixes up the replies."""
    runtime = "mlserver_alibi_detect.AlibiDetectRuntime"
    _start_mlserver(environment, folder, task, {"name": task.guard, "implementation": runtime, "parameters": {"uri": "./detector"}})
    (folder / "network.json").write_text(json.dumps(describe_classifier(Path(task.repository), task.guard)))
    return [f"{environment}/bin/python", "-m", "servers.alibi_app", str(folder)]


def _start_mlserver(environment: Path, folder: Path, task: Task, model: dict[str, object]) -> list[str]:
    grpc, http, metrics = task.ports
    workers = task.workers if task.workers > 1 else 0  # 0 computes in the server's own process
    server = {"host": "127.0.0.1", "grpc_port": grpc, "http_port": http, "metrics_port": metrics, "parallel_workers": workers}
    server |= {"debug": False, "grpc_max_message_length": LARGEST_MESSAGE}  # else: a line in its log for every request, and 4 MB
    (folder / "settings.json").write_text(json.dumps(server))
    (folder / "model-settings.json").write_text(json.dumps(model))
    return [f"{environment}/bin/mlserver", "start", str(folder)]


def describe_classifier(repository: Path, guard: str) -> dict[str, object]:
    """The layers of a guard's classifier, in the order of its graph.

    Returns:
        ``shape`` (H, W, C), and ``layers`` of (kind, outputs, kernel, stride)
    """
    import onnx

    release = max(releases(repository, guard))
    graph = onnx.load(repository / stage_model(guard, "classifier") / str(release) / "model.onnx").graph
    sizes = {one.name: tuple(one.dims) for one in graph.initializer}
    layers: list[tuple[str, int, int, int]] = []
    for node in graph.node:
        if node.op_type in {"DequantizeLinear", "Cast"} and node.input[0] in sizes:  # weights in lower precision
            sizes[node.output[0]] = sizes[node.input[0]]
        given = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        stride = int(given.get("strides", [1])[0])
        if node.op_type == "Conv":
            outputs, _, kernel, _ = sizes[node.input[1]]
            layers.append(("conv", outputs, kernel, stride))
        elif node.op_type == "MaxPool":
            layers.append(("pool", 0, int(given["kernel_shape"][0]), stride))
        elif node.op_type in {"ReduceMean", "GlobalAveragePool"}:
            layers.append(("mean", 0, 0, 0))
        elif node.op_type == "Gemm":
            layers.append(("dense", sizes[node.input[1]][0 if given.get("transB") else 1], 0, 0))
    channels, height, width = read_widths(repository, guard)[0].shape
    return {"shape": (height, width, channels), "layers": layers}


JSON = "JSON over HTTP, pixels in base64"
BINARY = "binary over gRPC"

LITSERVE = Peer(
    "LitServe",
    "litserve",
    JSON,
    (Settings(), Settings(CORES), Settings(1, CORES), Settings(1, 1, 16, 1), Settings(CORES, 1, 16, 1), Settings(CORES, 1, 4, 1)),
    _litserve,
    over_http("/predict"),
)
"""counts requests; without a delay its batching loop would never sleep"""
BENTOML = Peer(
    "BentoML",
    "bentoml",
    JSON,
    (Settings(), Settings(CORES), Settings(1, CORES), Settings(1, 1, 64), Settings(CORES, 1, 64)),
    _bentoml,
    over_http("/judge"),
)
"""counts images, and finds the delay itself"""
MLSERVER = Peer(
    "MLServer",
    "mlserver",
    BINARY,
    (Settings(), Settings(CORES), Settings(1, CORES), Settings(1, 1, 16, 1), Settings(CORES, 1, 16, 1), Settings(CORES, 1, 4, 1)),
    _mlserver,
    over_grpc(ANSWERS),
)
"""counts requests"""
PYTRITON = Peer(
    "PyTriton",
    "nvidia-pytriton",
    BINARY,
    (Settings(1, 1, 64), Settings(CORES, 1, 64), Settings(1, CORES, 64), Settings(1, 1, 64, 1), Settings(CORES, 1, 64, preferred=4)),
    _pytriton,
    over_grpc(ANSWERS),
)
"""counts images, and refuses requests of more"""
ALIBI = Peer(
    "MLServer + alibi-detect",
    "mlserver-alibi-detect",
    BINARY,
    (Settings(), Settings(CORES)),
    _alibi,
    over_grpc(("is_adversarial", "instance_score"), channels_last=True),
)
PEERS = (LITSERVE, BENTOML, MLSERVER, PYTRITON, ALIBI)
