"""The throughput benchmark of one guard: its limit, what a server makes of it, and what other servers do."""

from __future__ import annotations

import math
import platform
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from noisec import contract, manifest
from noisec.benchmarks.throughput import statistics
from noisec.benchmarks.throughput.limit import Processes, What, fastest, processes, sweep
from noisec.benchmarks.throughput.load import Connect, Generator, Traffic, generator, triton
from noisec.benchmarks.throughput.perf import PerfAnalyzer, find_perf_analyzer, write_images
from noisec.benchmarks.throughput.report import write_results
from noisec.benchmarks.throughput.rows import (
    CLASSIFIER,
    CONTENDERS,
    EVENLY,
    GUARD,
    HALF,
    LABELS,
    MANY,
    Part,
    Row,
    by_setting,
    choose,
    in_turns,
    middle,
    of_failure,
    of_load,
    of_perf,
    of_speed,
)
from noisec.benchmarks.throughput.summary import Summary, summary_of
from noisec.benchmarks.throughput.target import CORES, Target
from noisec.builders.progress import console, tracked
from noisec.builders.spec import GuardSpec
from noisec.clients.requests import Pixels
from noisec.errors import NoisecError
from noisec.python_backend.server import EmbeddedServer, native_backends

if TYPE_CHECKING:
    from noisec.benchmarks.throughput.peers.registry import Peer

REQUESTS = 80
"""that a measurement by perf_analyzer waits for at least: it counts whole ones in three windows, and of a dozen large ones it leaves out
up to a seventh"""
MORE = 3
"""times as many turns where what is compared differs by a few per cent"""
ARRIVALS = 2.0
"""seconds of arrivals at least, for the slowest hundredth of them"""
SOAK_LOAD, SOAK_CHUNK = 0.8, 6.0
"""share of the throughput, and seconds of each of its parts, between which memory is looked at. After each third of a part perf_analyzer
adds up its requests, which takes it one core for about 15 us each, and requests wait meanwhile: the
longer the part, the longer"""
SHORTEST_SOAK = 5 * SOAK_CHUNK
"""seconds: the memory of its last fifth is compared with that of the first"""
MIXED_LOAD = 0.5
"""share of mixed traffic's throughput at which its latency is measured"""
MIXED = ((1, contract.OUTPUTS, 0.5), (1, (contract.LOGITS,), 0.2), (8, contract.OUTPUTS, 0.2), (8, contract.VERDICT, 0.1))
"""batch, outputs and share of each kind of request in mixed traffic"""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    seconds: float = 3.0
    """of each measurement"""
    rounds: int = 5
    """in which measurements that are compared take turns"""
    batches: tuple[int, ...] = (1, 8, 32, 64)
    clients: tuple[int, ...] = (1, 2, 4, 8)
    """with each of the batches"""
    singles: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """clients that send single images"""
    limits: tuple[int, ...] = (1, 8, 32, 64, 128)
    """batch sizes in process"""
    loads: tuple[float, ...] = (0.1, 0.25, 0.75, 0.9)
    """shares of the throughput of single images, besides half of it"""
    soak: float = 0.0
    """seconds at 80 % load"""
    peers: tuple[str, ...] = ()


QUICK = Plan(seconds=1.0, rounds=3, batches=(8, 32), clients=(2, 4), singles=(1, 4, 16), limits=(1, 8, 32), loads=())
"""the same figures in less time"""


def long_enough(seconds: float, batch: int, limit: float) -> float:
    """How long perf_analyzer measures: ``seconds``, or what ``REQUESTS`` requests of ``batch`` images take at ``limit`` images a second."""
    return max(seconds, REQUESTS * batch / limit)


@dataclass(frozen=True)
class Observation:
    """What the server did during some measurements."""

    during: str
    stages: list[statistics.Stage]
    cpu_ms: float
    """processor time of the server's processes for each image; NaN where they are not on this machine"""
    memory_mb: float


@dataclass
class Result:
    """Everything that was measured."""

    rows: list[Row] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    """megabytes of the server after each part of the soak"""
    absent: dict[str, str] = field(default_factory=dict)
    """peer -> why it was not measured"""
    own_labels: bool = True
    """whether the guard itself answers labels; else the bare classifier does, and comparing them says nothing"""


class Benchmark:
    """One guard on one server.

    Args:
        url: gRPC address of the server
        data: the images as perf_analyzer reads them
        images: [n, C, H, W], as the guard takes them
        here: whether the server is this process's own, so that its processes can be watched
    """

    def __init__(
        self, target: Target, url: str, plan: Plan, perf: PerfAnalyzer, data: Path, images: Pixels, load: Generator, here: bool
    ) -> None:
        self.target, self.url, self.plan, self.perf, self.data, self.images, self.load = target, url, plan, perf, data, images, load
        self.processes = statistics.server_processes() if here else []
        self.result = Result()
        self.rows = self.result.rows

    def run(self) -> Result:
        """Everything but the peers, in an order in which later parts use the settings that earlier ones found."""
        for part in (self.limit, self.saturate, self.side_by_side, self.labels, self.one_client, self.arrivals, self.mixed, self.soak):
            start = time.monotonic()
            part()
            console.print(f"  {part.__name__.replace('_', ' ')}: {time.monotonic() - start:.0f} s")
        return self.result

    def limit(self) -> None:
        """Processes, threads and batch sizes, without a server."""
        plan, batches = self.plan, [size for size in self.plan.limits if size <= len(self.images)]
        found = sweep(self.target, self.images, ("guard", "classifier"), batches, CORES, plan.seconds / 2, max(1, plan.rounds // 2))
        self.best_limits = fastest(found, "guard", CONTENDERS)
        self.rows += [of_speed("limit", speed) for speed in found]

    def saturate(self) -> None:
        """Batches and clients, and single images from more and more clients."""
        for batch in [size for size in self.plan.batches if size <= self.target.largest]:
            for clients in self.plan.clients:
                self._perf("batches and clients", batch, clients)
        for clients in self.plan.singles:
            self._perf("single images", 1, clients)

    def side_by_side(self) -> None:
        """The best settings, single images from many clients, and the limit at its best settings, in turns."""
        loads = {(rows[0].batch, rows[0].clients) for rows in by_setting(choose(self.rows, "batches and clients"))[:CONTENDERS]}
        with ExitStack() as stack:
            limits = [
                (one, stack.enter_context(processes(self.target, self.images, one.processes, one.threads))) for one in self.best_limits
            ]
            for measure in in_turns(
                self.plan.rounds,
                [
                    *(partial(self._compute, "side by side", computing, GUARD, one.batch) for one, computing in limits),
                    *(partial(self._watched, batch, clients) for batch, clients in sorted(loads | {(1, MANY)})),
                ],
            ):
                measure()
        self.best = by_setting(choose(self.rows, "side by side", tool="perf_analyzer"))[0][0]
        if self.processes:
            self._perf("shared memory", self.best.batch, self.best.clients, shared_memory=True)

    def labels(self) -> None:
        """Label-only requests to the guard, and the same requests to the bare classifier, in many turns: they differ by little."""
        outputs = (contract.LOGITS,)
        models = [(LABELS, self.target.asked(outputs)), (CLASSIFIER, self.target.classifier)]
        self.result.own_labels = self.target.asked(outputs) != self.target.classifier
        for batch, clients in sorted({(self.best.batch, self.best.clients), (1, MANY)}):
            for what, model in in_turns(MORE * self.plan.rounds, models):
                traffic = Traffic(self._connect(model, outputs), batch)
                found = self.load.closed([traffic], clients, self.plan.seconds)
                self.rows.append(of_load("labels", what, found, batch, clients))

    def one_client(self) -> None:
        """One single-threaded process, and one client, both with one image at a time, in turns; and the same of the bare classifier, which
        shows how much of what a server adds is requests and messages."""
        with processes(self.target, self.images, 1, 1) as computing:
            asked = [partial(self._perf, "one client", 1, 1, what) for what in (GUARD, CLASSIFIER)]
            computed = [partial(self._compute, "one client", computing, what, 1) for what in (GUARD, CLASSIFIER)]
            for measure in in_turns(self.plan.rounds, [*asked, *computed]):
                measure()

    def arrivals(self) -> None:
        """Single images at Poisson arrivals, at shares of the throughput that many clients reach; half of it evenly spaced as well."""
        for load in self.plan.loads:
            self._arriving(load, f"{load:g} of the throughput")
        for note in in_turns(self.plan.rounds, (HALF, EVENLY)):
            self._arriving(0.5, note)

    def mixed(self) -> None:
        """Several batch sizes and choices of outputs at once: how many of them, and how long they take at Poisson arrivals."""
        kinds = [(min(batch, self.target.largest), self.target.asked(outputs), outputs, weight) for batch, outputs, weight in MIXED]
        traffic = [Traffic(self._connect(model, outputs), batch, weight) for batch, model, outputs, weight in kinds]
        with self._observed("mixed traffic"):
            found = self.load.closed(traffic, MANY, self.plan.seconds)
        self.rows.append(of_load("mixed", GUARD, found, 0, MANY))
        rate = MIXED_LOAD * found.requests / self.plan.seconds
        self.rows.append(of_load("mixed", GUARD, self.load.open(traffic, rate, self.plan.seconds), 0, rate=rate))

    def soak(self) -> None:
        """Single images at Poisson arrivals for long. It ends with the first part in which a request fails."""
        rate = self._rate(SOAK_LOAD)
        seconds = min(self.plan.soak, SOAK_CHUNK)
        parts = math.ceil(self.plan.soak / SOAK_CHUNK)
        for _ in tracked(range(parts), "soak", parts):
            try:
                found = self.perf.measure(self.url, self.target.name, self.data, 1, 0, seconds, rate=round(rate, 1))
            except NoisecError as error:
                self.rows.append(of_failure("soak", GUARD, rate, str(error)))
                return
            self.result.memory.append(statistics.usage(self.processes).memory_mb)
            self.rows.append(of_perf("soak", GUARD, found, rate, f"server {self.result.memory[-1]:.1f} MB"))

    def against(self, peers: Sequence[Peer], work: Path) -> None:
        """Peers, each in turns with this server, under the same load from the same generator."""
        from noisec.benchmarks.throughput.compare import Asked, compare_peer, noting

        loads = {(1, 1), (1, MANY), (self.best.batch, self.best.clients)}
        pids = tuple(process.pid for process in self.processes)
        for peer in peers:
            reasons: list[str] = []
            with noting(reasons):
                own = Asked(GUARD, peer.name, self._both, pids)
                self.rows += compare_peer(peer, work, self.target, own, self.load, sorted(loads), self.plan.seconds, self.plan.rounds)
            self.result.absent |= dict.fromkeys([peer.name] * len(reasons), "".join(reasons))

    def _arriving(self, load: float, note: str) -> None:
        rate, seconds = self._rate(load), max(ARRIVALS, self.plan.seconds)
        found = self.perf.measure(self.url, self.target.name, self.data, 1, 0, seconds, rate=round(rate, 1), evenly=note == EVENLY)
        self.rows.append(of_perf("arrivals", GUARD, found, rate, note))

    def _rate(self, load: float) -> float:
        return load * middle(choose(self.rows, "side by side", tool="perf_analyzer", clients=MANY, batch=1))

    def _both(self, batch: int) -> Traffic:
        return Traffic(self._connect(self.target.name, contract.OUTPUTS), batch)

    def _connect(self, model: str, outputs: Sequence[str]) -> Connect:
        return partial(triton, self.url, model, tuple(outputs))

    def _perf(self, part: Part, batch: int, clients: int, what: What = GUARD, *, shared_memory: bool = False) -> None:
        model = {GUARD: self.target.name, CLASSIFIER: self.target.classifier}[what]
        seconds = long_enough(self.plan.seconds, batch, self.best_limits[0].per_second)
        found = self.perf.measure(self.url, model, self.data, batch, clients, seconds, shared_memory=shared_memory)
        self.rows.append(of_perf(part, what, found, note="shared memory" if shared_memory else ""))

    def _compute(self, part: Part, computing: Processes, what: What, batch: int) -> None:
        self.rows.append(of_speed(part, computing.measure(what, batch, self.plan.seconds)))

    def _watched(self, batch: int, clients: int) -> None:
        with self._observed(f"batch {batch} from {clients} clients"):
            self._perf("side by side", batch, clients)

    @contextmanager
    def _observed(self, during: str) -> Iterator[None]:
        models, own = manifest.models(self.target.name), self.processes
        before, used = statistics.read(self.url, models), statistics.usage(own)
        yield
        stages, now = statistics.between(before, statistics.read(self.url, models)), statistics.usage(own)
        asked = {self.target.name, self.target.asked((contract.LOGITS,))}
        images = sum(stage.images for stage in stages if stage.model in asked)
        spent = 1000 * (now.cpu_seconds - used.cpu_seconds) / images if own and images else float("nan")
        self.result.observations.append(Observation(during, stages, spent, now.memory_mb))


def run_benchmark(repository: Path, guard: str, plan: Plan, work: Path, out: Path | None, url: str | None, command: str) -> Summary:
    """Measure one guard, and write its tables and plots into ``out`` where that is given.

    Args:
        work: folder for decoded images and the peers' environments
        url: gRPC address of a server that serves the repository; None starts the embedded server

    Raises:
        NoisecError: the guard, a peer, its images or perf_analyzer cannot be had, or a request failed under perf_analyzer.
    """
    from noisec.benchmarks.throughput.compare import peers_named

    peers = peers_named(plan.peers)
    start, target, perf = time.monotonic(), Target.newest(repository, guard), find_perf_analyzer()
    images = target.images(work / guard / "images")
    _check(plan, target, url)
    with (
        tempfile.TemporaryDirectory(prefix="noisec-throughput-") as folder,
        _serving(repository, url) as address,
        generator(images) as load,
    ):
        statistics.read(address, manifest.models(guard))  # every stage is asked, the bare classifier by itself
        data = write_images(Path(folder, "images.json"), images)
        benchmark = Benchmark(target, address, plan, perf, data, images, load, here=url is None)
        result = benchmark.run()
        benchmark.against(peers, work / "peers")
    summary = summary_of(result.rows)
    if out:
        told = {"serving": target.spec.serving.model_dump(), "command": command, "seconds": round(time.monotonic() - start)}
        facts = {**_facts(plan, images), **({} if url else {"networks run by": _network_runtime(target.spec)}), **told}
        write_results(guard, result, summary, facts, out)
        console.print(f"{out / guard}: {len(result.rows)} measurements")
    return summary


def _check(plan: Plan, target: Target, url: str | None) -> None:
    """
    Raises:
        NoisecError: part of the plan cannot be measured.
    """
    if plan.soak and url:
        raise NoisecError(f"--soak {plan.soak:g} with --url {url}: the memory of a server elsewhere cannot be seen; leave one of them out")
    if 0 < plan.soak < SHORTEST_SOAK:
        raise NoisecError(f"--soak {plan.soak:g}: whether memory grows takes {SHORTEST_SOAK:g} s at least; the usual length is 600")
    if plan.peers and target.spec.serving.input == "uint8":
        raise NoisecError(
            f'--peers {",".join(plan.peers)}: {target.name} takes bytes (serving.input = "uint8"), other servers are asked with floats; '
            "leave --peers out, or measure a copy of it that takes floats (noisec arrange)"
        )


@contextmanager
def _serving(repository: Path, url: str | None) -> Iterator[str]:
    """The address of the server that is measured."""
    if url:
        yield url
    else:
        with EmbeddedServer(repository) as server:
            yield server.grpc_url


def _network_runtime(spec: GuardSpec) -> str:
    """What the embedded server runs a guard's networks with."""
    if spec.serving.layout == "single":
        return "ONNX Runtime in Triton's Python backend"
    own = spec.runtime in native_backends()
    return f"Triton's own {spec.runtime} backend" if own else f"the stand-in for Triton's {spec.runtime} backend"


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", known.read_text()) if known.is_file() else []
    return f"{platform.machine()}, {names[0]}" if names else platform.machine()


def _facts(plan: Plan, images: Pixels) -> dict[str, Any]:
    packages = ("onnxruntime", "nvidia-pytriton", "tritonclient", "numpy")
    return {
        "machine": f"{_processor()}, {CORES} cores, {platform.system()}; client, server and limit share it",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "images": f"{len(images)} different ones, {list(np.shape(images)[1:])} {images.dtype}",
        "each measurement": f"{plan.seconds:g} s, with perf_analyzer as long as {REQUESTS} requests take at the limit, if that is longer; "
        f"what is compared takes turns for {plan.rounds} rounds, and medians are compared",
    }
