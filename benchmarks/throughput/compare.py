"""A peer and this server, in turns under the same load from the same generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

from noisec.benchmarks.throughput.load import Generator, Sender, Traffic
from noisec.benchmarks.throughput.peers.environments import prepare
from noisec.benchmarks.throughput.peers.registry import PEERS, Peer, Settings
from noisec.benchmarks.throughput.peers.running import Running, running
from noisec.benchmarks.throughput.rows import GUARD, Row, of_load
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
    """Every setting of a peer under every load, each followed by this server under the same load.

    Args:
        work: folder for the peers' environments
        own: requests to this server, by batch size
        loads: batch size and clients

    Raises:
        NoisecError: the peer cannot be installed or started, or answers nothing.
    """
    environment = prepare(peer, work)
    rows: list[Row] = []
    for settings in peer.settings:
        with running(peer, environment, target.repository, target.guard, settings) as server:
            connect = partial(connection, peer.name, target.guard, server.port)
            for batch, clients in [one for _ in range(rounds) for one in loads]:
                for what, traffic in ((peer.name, Traffic(connect, batch)), (GUARD, own(batch))):
                    found = load.closed([traffic], clients, seconds)
                    rows.append(of_load("peers", what, found, batch, clients, note=f"{settings}; {peer.encoding}"))
    return rows


def connection(name: str, guard: str, port: int) -> AbstractAsyncContextManager[Sender]:
    """Connect to a running peer from another process."""
    return Running(peers_named([name])[0], Settings(), guard, port, 0).connect()
