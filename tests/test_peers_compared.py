"""A peer is compared at its best, by its own turns with this server, and computes with the same runtime."""

from __future__ import annotations

import subprocess
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace

import psutil
import pytest
from conftest import GUARD, REPOSITORY

from noisec.benchmarks.throughput import compare, report, rows
from noisec.benchmarks.throughput.load import Load, Traffic
from noisec.benchmarks.throughput.peers.registry import ALIBI, LITSERVE, PEERS
from noisec.benchmarks.throughput.peers.running import family
from noisec.benchmarks.throughput.peers.servers.compute import open_session
from noisec.benchmarks.throughput.rows import MANY, Row
from noisec.benchmarks.throughput.run import Result
from noisec.benchmarks.throughput.summary import over_peer, peer_figures
from noisec.benchmarks.throughput.target import Target
from noisec.contract import stage_model
from noisec.errors import NoisecError

NOBODY = 2**30
"""no process has this pid"""
OWN = compare.Asked(rows.GUARD, "LitServe", lambda batch: Traffic(None, batch), ())


def loaded(per_second: float) -> Load:
    return Load(10, 10, 1.0, per_second, 1.0, 2.0, 3.0, 0)


def peers_row(what: str, per_second: float, note: str, clients: int) -> Row:
    return rows.of_load("peers", what, loaded(per_second), 1, clients, note=note)


def test_settings_that_were_lucky_once_have_to_win_again(tmp_path, monkeypatch):
    lucky, good, *others = LITSERVE.settings
    rates = {lucky: iter((200, 100, 100)), good: iter((150, 150, 150, 150)), **{one: iter((50,)) for one in others}}
    alive, most = [], []

    @contextmanager
    def running(peer, environment, repository, guard, settings):
        alive.append(settings)
        most.append(len(alive))
        yield SimpleNamespace(port=settings, pid=NOBODY)
        alive.remove(settings)

    def closed(traffic, clients, seconds):
        asked = traffic[0].connect
        return loaded(60 if asked is None else next(rates[asked.args[-1]]))

    monkeypatch.setattr(compare, "prepare", lambda peer, work: work)
    monkeypatch.setattr(compare, "running", running)
    generator, target = SimpleNamespace(closed=closed), Target.newest(REPOSITORY, GUARD)
    found = compare.compare_peer(LITSERVE, tmp_path, target, OWN, generator, [(1, 1)], 1.0, 1)
    against = [(row.what, row.note, row.per_second) for row in found if row.part == "peers"]
    assert against == [("LitServe", f"{good}; {LITSERVE.encoding}", 150), ("guard", "LitServe", 60)]
    assert len(found) == len(LITSERVE.settings) + 2 * compare.MEETINGS + len(against)
    assert max(most) == 2
    assert not alive


@pytest.mark.parametrize("failures", [1, 2])
def test_a_server_may_fail_to_start_once(tmp_path, monkeypatch, failures):
    left = dict.fromkeys(LITSERVE.settings, failures)

    @contextmanager
    def running(peer, environment, repository, guard, settings):
        if left[settings]:
            left[settings] -= 1
            raise NoisecError("its processes missed each other")
        yield SimpleNamespace(port=0, pid=NOBODY)

    monkeypatch.setattr(compare, "prepare", lambda peer, work: work)
    monkeypatch.setattr(compare, "running", running)
    generator, target = SimpleNamespace(closed=lambda traffic, clients, seconds: loaded(50)), Target.newest(REPOSITORY, GUARD)
    with pytest.raises(NoisecError, match="missed each other") if failures > 1 else nullcontext():
        found = compare.compare_peer(LITSERVE, tmp_path, target, OWN, generator, [(1, 1)], 1.0, 1)
        assert [row.what for row in found if row.part == "peers"] == ["LitServe", "guard"]


def test_servers_that_are_not_measured_stand_still(tmp_path, monkeypatch):
    peer, own = {}, {}
    seen = []

    @contextmanager
    def sleeping(known):
        with subprocess.Popen(["sh", "-c", "sleep 60 & wait"]) as shell:
            try:
                known[shell.pid] = family(shell.pid)
                yield SimpleNamespace(port=0, pid=shell.pid)
            finally:
                for process in family(shell.pid):
                    process.kill()
                del known[shell.pid]

    def closed(traffic, clients, seconds):
        measured, others = (own, peer) if traffic[0].connect is None else (peer, own)
        deadline = time.monotonic() + 1
        while moving(others) and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append((measured is own, moving(measured), moving(others)))
        return loaded(50)

    def moving(servers):
        return any(process.status() != psutil.STATUS_STOPPED for server in servers.values() for process in server)

    monkeypatch.setattr(compare, "prepare", lambda peer, work: work)
    monkeypatch.setattr(compare, "running", lambda *_: sleeping(peer))
    with sleeping(own) as server:
        guard, target = replace(OWN, pids=(server.pid, NOBODY)), Target.newest(REPOSITORY, GUARD)
        one = replace(LITSERVE, settings=LITSERVE.settings[:1])
        compare.compare_peer(one, tmp_path, target, guard, SimpleNamespace(closed=closed), [(1, 1)], 1.0, 2)
        assert seen[-4:] == [(False, True, False), (True, True, False), (True, True, False), (False, True, False)]
        assert moving(own)


def test_a_peer_is_measured_against_the_turns_that_the_guard_took_with_it():
    turns = [("LitServe", 100, 50), ("MLServer", 40, 40)]  # the machine was slower in the second one's
    found = [
        row
        for name, guard, peer in turns
        for clients in (1, MANY)
        for row in (peers_row("guard", guard, name, clients), peers_row(name, peer, "no batching; JSON", clients))
    ]
    assert [over_peer(found, name)["per_second_single_image"] for name, *_ in turns] == [2, 1]
    assert peer_figures(found, "LitServe") == dict.fromkeys(peer_figures(found, "LitServe"), 50)
    assert [measured for _, measured, _ in report._peer_goals(found)] == ["1.00 x MLServer"] * 2
    table = report.peer_table(Result(found))
    assert "| JSON | 50 | 50 | 50 | 0 |" in table
    assert "| 100 (2.00 x) | 100 (2.00 x) | 100 (2.00 x) | 0 |" in table


def test_a_peer_that_answers_nothing_spoils_no_page():
    found = [
        row for clients in (1, MANY) for row in (peers_row("guard", 9, "LitServe", clients), peers_row("LitServe", 0, "a; JSON", clients))
    ]
    assert over_peer(found, "LitServe")["per_second_1x1"] == float("inf")
    assert "| JSON | 0 | 0 | 0 | 0 |" in report.peer_table(Result(found))


def test_a_peer_is_found_by_its_name_as_it_is_written_and_as_a_command_line_takes_it():
    assert compare.peers_named(["MLServer + alibi-detect", "mlserver-alibi-detect", "LITSERVE"]) == [ALIBI, ALIBI, LITSERVE]
    with pytest.raises(NoisecError, match="--peers nobody: no such peer; there are litserve, .*, mlserver-alibi-detect"):
        compare.peers_named(["litserve", "nobody"])


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer != ALIBI], ids=lambda peer: peer.package)
def test_a_peer_has_the_onnx_runtime_of_the_guard(peer):
    assert f"onnxruntime=={version('onnxruntime')}" in peer.requirements


def test_two_threads_of_a_peer_do_not_spin():
    model = REPOSITORY / stage_model(GUARD, "classifier") / str(Target.newest(REPOSITORY, GUARD).release) / "model.onnx"
    options = open_session(model, threads=2).get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
