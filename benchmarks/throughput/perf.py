"""NVIDIA's perf_analyzer: found or fetched, and run with real images.

PyPI's own ``perf-analyzer`` wheels want glibc 2.38. The binary that tritonclient 2.50.0 carries runs on older systems too; the two
libraries besides the system's that it needs lie in the nvidia-pytriton wheel. It asks for every output of a model; loads that ask for
some of them come from :mod:`noisec.benchmarks.throughput.load`. Its ``--request-count`` is left alone: it divides by whole seconds.
"""

from __future__ import annotations

import base64
import csv
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from noisec import contract
from noisec.clients.requests import Pixels
from noisec.errors import NoisecError

WHEEL = "tritonclient==2.50.0"
PLATFORM = "manylinux1_x86_64"
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
"""name that perf_analyzer asks for -> its file in ``nvidia_pytriton.libs``"""
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "noisec" / "perf_analyzer"
WINDOWS = 3
"""measurements that each figure is the mean of: perf_analyzer compares as many of them with one another"""
UNSTABLE = 999
"""per cent by which they may differ: the benchmark has rounds of its own"""
TOO_SHORT = ("No valid requests recorded", "Failed to obtain stable measurement")
"""what it says where no request, or a single one, came back in time"""
SENDERS = 16
"""threads that send at a rate, without waiting for answers: by itself perf_analyzer takes four that wait, and sends up to half of all
requests late where half of a guard's throughput is asked for"""
LONGER = 5
"""times that a measurement that was too short is made, each twice as long"""
SAID = 500
"""characters of what it said that an error repeats"""


@dataclass(frozen=True)
class Perf:
    """What perf_analyzer measured at one batch size and one number of clients, or one rate."""

    batch: int
    clients: int
    """0 where a rate was given"""
    per_second: float
    """images"""
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True)
class PerfAnalyzer:
    """The program, and the libraries that it needs."""

    program: Path
    libraries: Path | None = None
    """folder for its own process alone"""

    @property
    def environment(self) -> dict[str, str]:
        known = os.environ.get("LD_LIBRARY_PATH")
        path = ":".join(filter(None, [str(self.libraries or ""), known]))
        return {**os.environ, **({"LD_LIBRARY_PATH": path} if path else {})}

    def version(self) -> str:
        """Raises NoisecError where it does not start."""
        done = subprocess.run([self.program, "--version"], env=self.environment, capture_output=True, text=True)
        if done.returncode not in (0, 99):  # 99 is also its answer to --version and --help
            raise NoisecError(f"{self.program} does not start: {done.stderr.strip() or done.returncode}")
        return done.stdout.strip()

    def measure(
        self,
        url: str,
        model: str,
        data: Path,
        batch: int,
        clients: int,
        seconds: float,
        *,
        rate: float = 0.0,
        evenly: bool = False,
        shared_memory: bool = False,
    ) -> Perf:
        """Throughput and latency of a served model; every output is asked for.

        Args:
            data: of :func:`write_images`
            clients: requests under way at any time
            seconds: length of the measurement, besides half of one for the start; more where no request ends in so short a time
            rate: requests per second, in place of ``clients``, whether or not the ones before are answered
            evenly: with a rate, equally far apart; else at Poisson arrivals
            shared_memory: images and answers through the system's shared memory, where server and client share a machine

        Raises:
            NoisecError: a request failed, or nothing was measured.
        """
        load = _arrivals(rate, evenly) if rate else [f"--concurrency-range={clients}"]
        memory = ["--shared-memory=system"] if shared_memory else []
        asked = ["-m", model, "-u", url, "-i", "grpc", f"--input-data={data}", "-b", str(batch), *load, *memory]
        with tempfile.TemporaryDirectory(prefix="noisec-perf-") as folder:
            report = Path(folder, "report.csv")
            for length in (seconds * 2**turn for turn in range(LONGER)):
                done = self._run([*asked, "-f", str(report)], length)
                if not any(text in done.stderr for text in TOO_SHORT):
                    break
            if done.returncode or not report.is_file():
                said = " ".join(f"{done.stderr}\n{done.stdout}".split())[:SAID]
                asking = f"{rate:g} requests a second" if rate else f"{clients} clients"
                raise NoisecError(f"perf_analyzer, {model}, batch {batch}, {asking}: exit code {done.returncode}: {said}")
            return read_report(report, batch, 0 if rate else clients)

    def _run(self, asked: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
        window = f"--measurement-interval={max(1, round(1000 * seconds / WINDOWS))}"
        stable = [window, f"--max-trials={WINDOWS}", f"--stability-percentage={UNSTABLE}", "--percentile=50"]
        return subprocess.run([self.program, *asked, *stable], env=self.environment, capture_output=True, text=True)


def _arrivals(rate: float, evenly: bool) -> list[str]:
    spacing = "constant" if evenly else "poisson"
    return [f"--request-rate-range={rate}", f"--request-distribution={spacing}", "--async", f"--max-threads={SENDERS}"]


def read_report(path: Path, batch: int, clients: int) -> Perf:
    """perf_analyzer's CSV file.

    Raises:
        NoisecError: it holds no measurement.
    """
    with path.open() as file:
        rows = list(csv.DictReader(file))
    if len(rows) != 1:
        raise NoisecError(f"perf_analyzer measured {len(rows)} settings where one was asked for: give it more seconds")
    times = [float(rows[0][f"{name} latency"]) / 1000 for name in ("p50", "p95", "p99")]
    return Perf(batch, clients, float(rows[0]["Inferences/Second"]), *times)


def write_images(path: Path, images: Pixels) -> Path:
    """Images as ``--input-data`` takes them, one request row after the other.

    Args:
        images: [n, C, H, W], as the guard takes them
    """
    rows = [{contract.IMAGE: {"b64": base64.b64encode(image.tobytes()).decode(), "shape": list(image.shape)}} for image in images]
    path.write_text(json.dumps({"data": rows}))
    return path


def find_perf_analyzer(cache: Path = CACHE) -> PerfAnalyzer:
    """perf_analyzer on PATH, else in the cache, else fetched into it.

    Raises:
        NoisecError: it cannot be had, and how to help.
    """
    found = shutil.which("perf_analyzer")
    analyzer = PerfAnalyzer(Path(found)) if found else _cached(cache)
    analyzer.version()
    return analyzer


def _cached(cache: Path) -> PerfAnalyzer:
    program, libraries = cache / "perf_analyzer", cache / "lib"
    libraries.mkdir(parents=True, exist_ok=True)
    for name, pattern in LIBRARIES.items():
        _link_library(libraries / name, pattern)
    if not program.is_file():
        _fetch(program)
    return PerfAnalyzer(program, libraries)


def _fetch(program: Path) -> None:
    with tempfile.TemporaryDirectory(dir=program.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", f"--platform={PLATFORM}"]
        done = subprocess.run([*command, "--dest", folder, WHEEL], capture_output=True, text=True)
        wheel = next(Path(folder).glob("*.whl"), None)
        if done.returncode or wheel is None:
            raise NoisecError(
                f"perf_analyzer is not on PATH, and {WHEEL}, which carries it, cannot be fetched: {done.stderr.strip()[-SAID:]}"
            )
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith("/bin/perf_analyzer"))
            unfinished = Path(folder, "perf_analyzer")
            unfinished.write_bytes(archive.read(member))
        unfinished.chmod(0o755)
        unfinished.replace(program)


def _link_library(link: Path, pattern: str) -> None:
    found = next((Path(sysconfig.get_path("platlib")) / "nvidia_pytriton.libs").glob(pattern), None)
    if found is None:
        raise NoisecError(
            f"perf_analyzer is not on PATH, and {link.name}, which it needs, is not there: pip install 'noisec-triton[serve]'"
        )
    if not (link.is_symlink() and link.readlink() == found):
        link.unlink(missing_ok=True)
        link.symlink_to(found)
