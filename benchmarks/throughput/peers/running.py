"""A peer from its start to its end, of which nothing may be left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from noisec.benchmarks.throughput.load import Sender
from noisec.benchmarks.throughput.peers.registry import Peer, Settings
from noisec.benchmarks.throughput.peers.senders import Answers, Images
from noisec.benchmarks.throughput.peers.servers.compute import VARIABLE, Task
from noisec.builders.repository import read_widths
from noisec.errors import NoisecError

PORTS = 3
START_SECONDS = 60.0
STOP_SECONDS = 15.0
LAST_CHARACTERS = 2000


@dataclass(frozen=True)
class Running:
    """A peer that answers."""

    peer: Peer
    settings: Settings
    guard: str
    port: int
    pid: int
    """of the process that was started; the others are its descendants"""

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Sender]:
        """One client's connection."""
        async with self.peer.open(self.port, self.guard) as ask:

            async def send(images: Images) -> None:
                check(self.peer, await ask(images), len(images))

            yield send

    async def ask(self, images: Images) -> Answers:
        """The answers to one request, on a connection of its own."""
        async with self.peer.open(self.port, self.guard) as ask:
            answers = await ask(images)
        check(self.peer, answers, len(images))
        return answers


def check(peer: Peer, answers: Answers, count: int) -> None:
    """
    Raises:
        NoisecError: not one answer for each image.
    """
    if any(len(rows) != count for rows in answers.values()):
        raise NoisecError(f"{peer.name}: {count} images got { ({name: len(rows) for name, rows in answers.items()}) } answers")


@contextmanager
def running(peer: Peer, environment: Path, repository: Path, guard: str, settings: Settings) -> Iterator[Running]:
    """Start a peer on free ports, wait until it answers, and end all its processes afterwards.

    Raises:
        NoisecError: it does not start (the message holds the end of its log), or still listens when it should have ended.
    """
    with tempfile.TemporaryDirectory(prefix="noisec-peer-") as name:
        folder, log = Path(name, "work"), Path(name, "log")
        folder.mkdir()
        ports, shape = free_ports(PORTS), read_widths(repository, guard)[0].shape
        task = Task(str(repository.resolve()), guard, ports, **asdict(settings))
        command = peer.command(environment, folder, task)
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=folder, env=_variables(environment, folder, task), stdout=output, stderr=output, start_new_session=True
            )
        try:
            found = Running(peer, settings, guard, ports[0], process.pid)
            asyncio.run(_wait(found, process, log, shape))
            yield found
        finally:
            _end(process)
        _check_silent(peer, ports)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _variables(environment: Path, folder: Path, task: Task) -> dict[str, str]:
    """The server's environment variables: its own Python before ours, and no thread pools but ONNX Runtime's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "NOISEC_"))}
    return kept | {
        VARIABLE: json.dumps(asdict(task)),
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
        "HOME": str(folder),
        "PYTHONPATH": str(Path(__file__).parent),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "LD_LIBRARY_PATH": f"{sysconfig.get_config_var('LIBDIR')}:{os.environ.get('LD_LIBRARY_PATH', '')}",  # PyTriton's stub needs ours
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "BENTOML_DO_NOT_TRACK": "True",
        "TF_USE_LEGACY_KERAS": "1",
    }


async def _wait(found: Running, process: subprocess.Popen[bytes], log: Path, shape: tuple[int, int, int]) -> None:
    """Until every worker had time to answer a request."""
    image, deadline, reason = np.full((1, *shape), 0.5, np.float32), time.monotonic() + START_SECONDS, "nothing listens"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise NoisecError(f"{found.peer.name} stopped while it started:\n{_end_of(log)}")
        try:
            if _listens(found.port):
                await asyncio.gather(*(found.ask(image) for _ in range(4 * found.settings.workers)))
                return
        except NoisecError as error:
            reason = str(error)
        await asyncio.sleep(0.2)
    raise NoisecError(f"{found.peer.name} does not answer after {START_SECONDS:g} s: {reason}; the end of its log:\n{_end_of(log)}")


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-LAST_CHARACTERS:]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the server as Ctrl-C does (SIGTERM leaves LitServe's workers alive), then end what is left of it, children that left its
    process group included."""
    members = family(process.pid)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    _, left = psutil.wait_procs(members, timeout=STOP_SECONDS)
    for member in left:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(left, timeout=STOP_SECONDS)


def family(pid: int) -> list[psutil.Process]:
    """A process and its descendants, those of them that are there."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@contextmanager
def stopped(pids: Iterable[int]) -> Iterator[None]:
    """These processes and their descendants stand still: some servers poll while they wait, with up to a quarter of a core, which would be
    taken from the server that is measured."""
    members = [member for pid in pids for member in family(pid)]
    try:
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.suspend()
        yield
    finally:
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.resume()


def _check_silent(peer: Peer, ports: list[int]) -> None:
    for port in filter(_listens, ports):
        raise NoisecError(f"{peer.name} still listens on port {port} after its end; the next measurement would ask the old server")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
