"""Settings or versions of a guard side by side: throughput in turns, and processor time for each image, which other work disturbs less.

An arm is ``name=REPOSITORY`` or ``name=REPOSITORY@SITE``; SITE is a folder with another version of the package, made from a checkout of it
with ``pip install --no-deps --target SITE .``.

Example: ``python -m noisec.benchmarks.throughput.ab fashion_mnist before=model_repository@SITE after=model_repository``
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from noisec import contract
from noisec.benchmarks.throughput.load import Generator, Traffic, generator, triton
from noisec.benchmarks.throughput.rows import in_turns
from noisec.benchmarks.throughput.target import Target
from noisec.builders.figures import markdown_table
from noisec.contract import STAGES
from noisec.errors import NoisecError


@dataclass(frozen=True)
class Arm:
    """A running server."""

    name: str
    url: str
    load: Generator
    processes: list[psutil.Process]

    def cpu(self) -> dict[str, float]:
        """Seconds that the server itself, each stage's processes and those of a guard in one process have used."""
        used: dict[str, float] = defaultdict(float)
        for process in self.processes:
            times, words = process.cpu_times(), " ".join(process.cmdline())
            part = next((stage for stage in STAGES if f"_{stage}/" in words), "guard" if "python_backend_stub" in words else "server")
            used[part] += times.user + times.system
        return used


@contextmanager
def serving(guard: str, arm: str) -> Iterator[Arm]:
    """Serve one arm with its version of the package.

    Raises:
        NoisecError: it is not written as an arm, or its server does not start.
    """
    name, _, place = arm.partition("=")
    repository, _, site = place.partition("@")
    if not repository:
        raise NoisecError(f"{arm}: an arm is name=REPOSITORY or name=REPOSITORY@SITE")
    images = Target.newest(Path(repository), guard).images(Path(tempfile.gettempdir(), "noisec-ab"))
    command = [sys.executable, "-m", "noisec", "serve", str(Path(repository).resolve())]
    ports = [word for port in ("http", "grpc", "metrics") for word in (f"--{port}-port", "0")]
    environment = os.environ | ({"PYTHONPATH": str(Path(site).resolve())} if site else {})
    with (
        generator(images) as load,
        subprocess.Popen([*command, *ports], env=environment, stdout=subprocess.PIPE, text=True, cwd=tempfile.gettempdir()) as process,
    ):
        try:
            found = re.search(r"gRPC (\S+),", process.stdout.readline() if process.stdout else "")
            if found is None:
                raise NoisecError(f"{arm}: the server does not start: noisec serve {repository}")
            yield Arm(name, found[1], load, psutil.Process(process.pid).children(recursive=True))
        finally:
            process.terminate()


def compare(arms: Sequence[Arm], guard: str, outputs: Sequence[str], setting: str, rounds: int, seconds: float) -> list[list[str]]:
    """A row for each arm under one setting, such as ``1x16``: images in a request x clients."""
    batch, clients = map(int, setting.split("x"))
    rates: dict[str, list[float]] = defaultdict(list)
    middles: dict[str, list[float]] = defaultdict(list)
    used: dict[str, list[dict[str, float]]] = defaultdict(list)
    for arm in in_turns(rounds, arms):
        before = arm.cpu()
        load = arm.load.closed([Traffic(partial(triton, arm.url, guard, outputs), batch)], clients, seconds)
        after = arm.cpu()
        rates[arm.name].append(load.per_second)
        middles[arm.name].append(load.p50_ms)
        # The warm-up's images count in the time but not in the load: the same share for every arm.
        used[arm.name].append({part: 1e6 * (after[part] - before[part]) / load.images for part in after})
    first = arms[0].name
    rows = []
    for arm in arms:
        parts = {part: statistics.median(one[part] for one in used[arm.name]) for part in used[arm.name][0]}
        faster = statistics.median(new / old for new, old in zip(rates[arm.name], rates[first], strict=True))
        dearer = statistics.median(sum(new.values()) / sum(old.values()) for new, old in zip(used[arm.name], used[first], strict=True))
        shown = ", ".join(f"{part} {value:.0f}" for part, value in sorted(parts.items()) if value >= 1)
        row = [
            setting,
            arm.name,
            f"{statistics.median(rates[arm.name]):.0f}",
            f"{faster:.2f}",
            f"{statistics.median(middles[arm.name]):.2f}",
        ]
        rows.append([*row, f"{dearer:.2f}", shown])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("guard")
    parser.add_argument("arms", nargs="+")
    parser.add_argument("--settings", default="1x1,1x16,32x4", help="images in a request x clients, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--labels", action="store_true", help="ask only for LOGITS")
    given = parser.parse_args()
    outputs = (contract.LOGITS,) if given.labels else contract.OUTPUTS
    with ExitStack() as stack:
        arms = [stack.enter_context(serving(given.guard, arm)) for arm in given.arms]
        rows = [row for one in given.settings.split(",") for row in compare(arms, given.guard, outputs, one, given.rounds, given.seconds)]
    heads = ["setting", "arm", "images/s", "of the first", "p50 ms", "processor time of the first's", "us an image"]
    print(markdown_table(heads, rows))


if __name__ == "__main__":
    try:
        main()
    except NoisecError as error:
        sys.exit(f"ab: {error}")
