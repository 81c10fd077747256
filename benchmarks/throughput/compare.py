"""A peer and this server, in turns under the same load from the same generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from pathlib import Path

from noisec.benchmarks.throughput.load import Generator, Sender, Traffic
from noisec.benchmarks.throughput.peers.environments import prepare
from noisec.benchmarks.throughput.peers.registry import PEERS, Peer, Settings
from noisec.benchmarks.throughput.peers.running import Running, running
from noisec.benchmarks.throughput.rows import GUARD, Part, Row, in_turns, of_load
from noisec.benchmarks.throughput.target import Target
from noisec.errors import NoisecError


def peers_named(names: Sequence[str]) -> list[Peer]:
    """The peers of these names, whatever their case.

    Raises:
        NoisecError: there is none of a name.
    """
    known = {peer.name.lower(): peer for peer in PEERS}
    unknown = sorted({name.lower() for name in names} - set(known))
    if unknown:
        raise NoisecError(f"--peers {', '.join(unknown)}: no such peer; there are {', '.join(known)}")
    return [known[name.lower()] for name in names]


def compare_peer(
    peer: Peer,
    work: Path,
    target: Target,
    own: Callable[[int], Traffic],
    load: Generator,
    loads: Sequence[tuple[int, int]],
    seconds: float,
    rounds: int,
) -> list[Row]:
    """A peer under every load, at the settings that are its best for that load, in turns with this server under the same load.

    Args:
        work: folder for the peers' environments
        own: requests to this server, by batch size
        loads: batch size and clients

    Returns:
        rows of part "peer settings", one for each setting and load, and of part "peers"

    Raises:
        NoisecError: the peer cannot be installed, or starts and answers at no setting.
    """
    environment = prepare(peer, work)

    def asked(part: Part, settings: Settings, chosen: Sequence[tuple[int, int]], turns: int, beside: bool) -> list[Row]:
        rows: list[Row] = []
        with running(peer, environment, target.repository, target.name, settings) as server:
            connect = partial(connection, peer.name, target.name, server.port)
            for batch, clients in chosen:
                others = [(GUARD, own(batch))] if beside else []
                for what, traffic in in_turns(turns, [(peer.name, Traffic(connect, batch)), *others]):
                    found = load.closed([traffic], clients, seconds)
                    note = "" if what == GUARD else f"{settings}; {peer.encoding}"
                    rows.append(of_load(part, what, found, batch, clients, note=note))
        return rows

    tried, reasons = dict[Settings, list[Row]](), list[str]()
    for settings in peer.settings:
        with noting(reasons):
            tried[settings] = asked("peer settings", settings, loads, 1, beside=False)
    if not tried:
        raise NoisecError(reasons[0])
    best = {one: fastest(tried, at) for at, one in enumerate(loads)}
    rows = [row for found in tried.values() for row in found]
    for settings in dict.fromkeys(best.values()):
        rows += asked("peers", settings, [one for one in loads if best[one] == settings], rounds, beside=True)
    return rows


def fastest(tried: Mapping[Settings, Sequence[Row]], at: int) -> Settings:
    """The settings whose row ``at`` has the highest throughput."""
    return max(tried, key=lambda settings: tried[settings][at].per_second)


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
