"""A peer and this server, in turns under the same load from the same generator."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from noisec.benchmarks.throughput.load import Generator, Sender, Traffic
from noisec.benchmarks.throughput.peers.environments import prepare
from noisec.benchmarks.throughput.peers.registry import PEERS, Peer, Settings
from noisec.benchmarks.throughput.peers.running import Running, running, stopped
from noisec.benchmarks.throughput.rows import CONTENDERS, Part, Row, by_setting, choose, in_turns, of_load
from noisec.benchmarks.throughput.target import Target
from noisec.builders.progress import console
from noisec.errors import NoisecError

MEETINGS = 2
"""turns that a peer's best settings take side by side, before the better one meets this server"""
Notes = tuple[str, ...]
"""settings as their rows note them"""


@dataclass(frozen=True)
class Asked:
    """A running server under load."""

    what: str
    note: str
    traffic: Callable[[int], Traffic]
    """requests to it, by batch size"""
    pids: tuple[int, ...]
    """of its processes, or of those that all others descend from; none where it runs elsewhere"""


def peers_named(names: Sequence[str]) -> list[Peer]:
    """The peers of these names, as they are written or as a command line takes them: ``mlserver-alibi-detect``.

    Raises:
        NoisecError: there is none of a name.
    """
    known, asked = {plain(peer.name): peer for peer in PEERS}, [plain(name) for name in names]
    unknown = sorted({*asked} - {*known})
    if unknown:
        raise NoisecError(f"--peers {', '.join(unknown)}: no such peer; there are {', '.join(known)}")
    return [known[name] for name in asked]


def plain(name: str) -> str:
    """A name in lower case, with a hyphen where it has anything but letters and digits."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def compare_peer(
    peer: Peer,
    work: Path,
    target: Target,
    own: Asked,
    load: Generator,
    loads: Sequence[tuple[int, int]],
    seconds: float,
    rounds: int,
) -> list[Row]:
    """A peer under every load, at the settings that are its best for that load, in turns with this server under the same load.

    Args:
        work: folder for the peers' environments
        own: this server, its rows noted with the peer's name
        loads: batch size and clients

    Returns:
        rows of part "peer settings": one for each setting and load, and for each load those of its best settings in turns; and of part
        "peers"

    Raises:
        NoisecError: the peer cannot be installed, or starts and answers at no setting.
    """
    environment = prepare(peer, work)
    known = {f"{settings}; {peer.encoding}": settings for settings in peer.settings}

    @contextmanager
    def started(note: str) -> Iterator[Asked]:
        with ExitStack() as stack:
            server = at_second_try(lambda: stack.enter_context(running(peer, environment, target.repository, target.name, known[note])))
            yield Asked(peer.name, note, partial(Traffic, partial(connection, peer.name, target.name, server.port)), (server.pid,))

    def asked(part: Part, notes: Notes, chosen: Sequence[tuple[int, int]], turns: int, *others: Asked) -> list[Row]:
        rows: list[Row] = []
        with ExitStack() as stack:
            servers = [*(stack.enter_context(started(note)) for note in notes), *others]
            for batch, clients in chosen:
                for one in in_turns(turns, servers):
                    with stopped(pid for other in servers if other is not one for pid in other.pids):
                        found = load.closed([one.traffic(batch)], clients, seconds)
                    rows.append(of_load(part, one.what, found, batch, clients, note=one.note))
        return rows

    tried, reasons = list[Row](), list[str]()
    for note in known:
        with noting(reasons):
            tried += asked("peer settings", (note,), loads, 1)
    if not tried:
        raise NoisecError(reasons[0])
    met, against = list[Row](), list[Row]()
    for notes, chosen in fastest(tried, loads, CONTENDERS).items():
        with noting(reasons):
            met += asked("peer settings", notes, chosen, MEETINGS)
    judged = [row for at in loads for row in _at(met, at) or _at(tried, at)]  # by what was tried where two at once do not start
    for notes, chosen in fastest(judged, loads, 1).items():
        against += asked("peers", notes, chosen, rounds, own)
    return tried + met + against


def fastest(rows: Sequence[Row], loads: Sequence[tuple[int, int]], count: int) -> dict[Notes, list[tuple[int, int]]]:
    """The ``count`` best settings of each load, together -> the loads that have these."""
    found: dict[Notes, list[tuple[int, int]]] = {}
    for at in loads:
        best = by_setting(_at(rows, at))[:count]
        found.setdefault(tuple(sorted(same[0].note for same in best)), []).append(at)
    return found


def _at(rows: Sequence[Row], load: tuple[int, int]) -> list[Row]:
    batch, clients = load
    return choose(rows, "peer settings", batch=batch, clients=clients)


def at_second_try(start: Callable[[], Running]) -> Running:
    """What ``start`` gives; a first failure is said and forgiven, as a server's own processes now and then miss each other.

    Raises:
        NoisecError: it fails again.
    """
    try:
        return start()
    except NoisecError as error:
        console.print(f"  once more: {str(error).splitlines()[0]}")
        return start()


@contextmanager
def noting(reasons: list[str]) -> Iterator[None]:
    """Go on after an error that says why something could not be measured."""
    try:
        yield
    except NoisecError as error:
        reasons.append(str(error))


def connection(name: str, guard: str, port: int) -> AbstractAsyncContextManager[Sender]:
    """Connect to a running peer from another process."""
    return Running(peers_named([name])[0], Settings(), guard, port, 0).connect()
