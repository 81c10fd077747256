"""The throughput benchmark counts what happened: requests, failures, waiting, and the same work with and without a server."""

from __future__ import annotations

import asyncio
import csv
import json
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from conftest import GUARD, REPOSITORY

from noisec import contract, manifest
from noisec.benchmarks.throughput import statistics
from noisec.benchmarks.throughput.limit import Speed, computation, processes, settings
from noisec.benchmarks.throughput.load import Traffic, arrivals, closed_loop, generator, open_loop, triton
from noisec.benchmarks.throughput.perf import Perf, find_perf_analyzer, write_images
from noisec.benchmarks.throughput.report import as_markdown, goals
from noisec.benchmarks.throughput.rows import CLASSIFIER, MANY, choose, of_perf, of_speed
from noisec.benchmarks.throughput.run import REQUESTS, Benchmark, Plan, Result, long_enough, run_benchmark
from noisec.benchmarks.throughput.summary import PeerFigures, Summary
from noisec.benchmarks.throughput.target import Target
from noisec.builders.layout import rearrange
from noisec.builders.passes import fused_passes, passes_needed
from noisec.builders.spec import ServingSpec
from noisec.clients import GuardClient
from noisec.contract import stage_model
from noisec.errors import NoisecError

SHORT = 0.3
FIGURES = Summary(**dict.fromkeys(Summary.__annotations__, 1.0))
ROWS = [
    of_speed("one client", Speed(CLASSIFIER, 1, 1, 1, 1.0, 1.0)),
    of_perf("one client", CLASSIFIER, Perf(1, 1, 1, 1, 1, 1)),
    of_perf("side by side", "guard", Perf(1, MANY, 100, 1, 1, 1)),
]
"""without which no page is written"""
TINY = Plan(seconds=SHORT, rounds=1, batches=(8,), clients=(2,), singles=(1,), limits=(8,), loads=(0.9,))


@pytest.fixture(scope="module")
def target():
    return Target.newest(REPOSITORY, GUARD)


@pytest.fixture(scope="module")
def perf(tmp_path_factory):
    try:
        return find_perf_analyzer(tmp_path_factory.mktemp("cache"))
    except NoisecError as error:
        pytest.skip(str(error))


def asking(server, outputs=contract.OUTPUTS, model=GUARD):
    return partial(triton, server.grpc_url, model, outputs)


def counted(server, run):
    """What a load found, and what each model's statistics say of it."""
    before = statistics.read(server.grpc_url, manifest.models(GUARD))
    found = run()
    after = statistics.read(server.grpc_url, manifest.models(GUARD))
    while True:  # Triton counts a request just after it has answered
        time.sleep(0.05)
        seen, after = after, statistics.read(server.grpc_url, manifest.models(GUARD))
        if seen == after:
            return found, {stage.model: stage for stage in statistics.between(before, after)}


def test_a_closed_loop_counts_what_the_server_answered(server, pixels):
    traffic = [Traffic(asking(server), batch=3)]
    load, stages = counted(server, lambda: asyncio.run(closed_loop(traffic, pixels, clients=2, seconds=SHORT, warm_up=0)))
    assert load.failed == 0
    assert load.images == 3 * load.requests > 0
    assert 0 <= round(load.per_second * SHORT - load.images, 6) <= 2 * 3  # each client's last request counts in part
    assert 0 <= stages[GUARD].requests - load.requests <= 2  # those under way when the window closed
    assert 0 < load.p50_ms <= load.p95_ms <= load.p99_ms


def test_a_request_across_an_edge_of_the_window_counts_by_its_share(pixels):
    @asynccontextmanager
    async def slow():
        yield lambda images: asyncio.sleep(0.2)

    load = asyncio.run(closed_loop([Traffic(slow, batch=32)], pixels, clients=2, seconds=1.5, warm_up=0.05))
    assert load.images == 32 * load.requests
    assert load.per_second == pytest.approx(2 * 32 / (load.p50_ms / 1000), rel=0.1)


def test_requests_that_fail_are_no_throughput(server, pixels):
    broken = Traffic(asking(server, model="nobody"))
    load = asyncio.run(closed_loop([broken], pixels, clients=2, seconds=SHORT))
    assert (load.requests, load.images, load.per_second) == (0, 0, 0)
    assert load.failed > 0
    assert "nobody" in load.reason
    half = asyncio.run(open_loop([broken, Traffic(asking(server), batch=2)], pixels, rate=100, seconds=SHORT))
    assert half.failed > 0
    assert half.requests > 0
    assert half.failed + half.requests == len(arrivals(100, SHORT, seed=0))
    assert half.images == 2 * half.requests


def test_a_load_that_nobody_answers_is_an_error(server, pixels):
    with generator(pixels) as load, pytest.raises(NoisecError, match="not one request was answered; .* the first one with: .*nobody"):
        load.closed([Traffic(asking(server, model="nobody"))], clients=1, seconds=SHORT)


def test_latency_in_an_open_loop_includes_the_wait_for_a_server_that_is_behind(pixels):
    turn = asyncio.Lock()

    @asynccontextmanager
    async def one_at_a_time():
        async def send(images):
            async with turn:
                await asyncio.sleep(0.02)

        yield send

    load = asyncio.run(open_loop([Traffic(one_at_a_time)], pixels, rate=100, seconds=0.5))
    expected = 20 * load.requests - 500  # all the work, less the time in which it arrived
    assert load.failed == 0
    assert load.p99_ms > 0.8 * expected > 100
    assert load.seconds >= 0.02 * load.requests


def test_arrivals_are_a_poisson_process():
    times = arrivals(1000, 20, seed=1)
    gaps = np.diff(times)
    assert len(times) == pytest.approx(20_000, rel=0.03)
    assert (gaps >= 0).all()
    assert times[-1] < 20
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)


def test_the_limit_computes_what_the_server_answers(target, client, pixels, tmp_path):
    served = client.classify(pixels)
    layouts = ("single", "graph")
    for layout in layouts:
        rearrange(REPOSITORY, GUARD, ServingSpec(layout=layout), tmp_path / layout)
    for one in (target, *(Target.newest(tmp_path / layout, GUARD) for layout in layouts)):
        limit = computation(one, threads=1)
        verdict = limit.verdict(pixels)
        assert np.array_equal(verdict[contract.LOGITS].argmax(axis=1), served.labels)
        assert np.array_equal(verdict[contract.IS_MALICIOUS][:, 0], served.is_malicious)
        assert np.array_equal(limit.label(pixels)[contract.LOGITS].argmax(axis=1), served.labels)


def test_processes_compute_side_by_side(target, pixels):
    assert settings(4) == [(1, 4), (2, 2), (4, 1)]
    with processes(target, pixels, count=2, threads=1) as running:
        speed = running.measure("guard", batch=10, seconds=SHORT)
        classifier = running.measure("classifier", batch=10, seconds=SHORT)
    assert (speed.what, speed.processes, speed.batch) == ("guard", 2, 10)
    assert speed.per_second == pytest.approx(2 * 10 / (speed.p50_ms / 1000), rel=0.6)
    assert classifier.per_second > speed.per_second


def test_statistics_tell_every_request_and_the_batches_that_were_made(server, target, pixels):
    def ask():
        with GuardClient(server.grpc_url, GUARD) as client:
            for start in range(0, 21, 3):
                client.classify(pixels[start : start + 3])
            for image in pixels[:5]:
                client.classify(image, labels_only=True)

    _, stages = counted(server, ask)
    assert {model: stage.requests for model, stage in stages.items()} == {
        GUARD: 12,
        stage_model(GUARD, "autoencoder"): 7,
        stage_model(GUARD, "classifier"): 7 * len({*passes_needed(target.spec)} - {*fused_passes(target.spec)}) + 5,
        stage_model(GUARD, "scorer"): 7,
    }
    for stage in stages.values():
        assert stage.failed == 0
        if stage.model != GUARD:
            assert sum(size * count for size, count in stage.batches.items()) == stage.images
            assert sum(stage.batches.values()) == stage.executions
            assert stage.infer_ms > 0
    assert stages[stage_model(GUARD, "autoencoder")].batches == {3: 7}


def test_the_servers_processes_are_seen(server):
    own = statistics.server_processes()
    before = statistics.usage(own)
    with GuardClient(server.grpc_url, GUARD) as client:
        client.classify(np.full((200, 1, 28, 28), 0.5, np.float32))
    after = statistics.usage(own)
    assert len(own) >= 2, "the server, and a process of its Python backend"
    assert after.cpu_seconds > before.cpu_seconds
    assert 20 < after.memory_mb < 10_000


def test_perf_analyzer_measures_a_served_guard_with_real_images(server, perf, pixels, tmp_path):
    data = write_images(tmp_path / "images.json", pixels)
    found, stages = counted(server, lambda: perf.measure(server.grpc_url, GUARD, data, batch=4, clients=2, seconds=SHORT))
    assert (found.batch, found.clients) == (4, 2)
    assert found.per_second > 0
    assert 0 < found.p50_ms <= found.p95_ms <= found.p99_ms
    assert stages[GUARD].images == 4 * stages[GUARD].requests > 0
    with pytest.raises(NoisecError, match="unknown model"):
        perf.measure(server.grpc_url, "nobody", data, batch=1, clients=1, seconds=SHORT)


@pytest.mark.parametrize("evenly", [False, True])
def test_perf_analyzer_keeps_to_the_rate_that_is_asked_for(server, perf, pixels, tmp_path, evenly):
    data = write_images(tmp_path / "images.json", pixels)
    found = perf.measure(server.grpc_url, GUARD, data, batch=1, clients=0, seconds=2, rate=100, evenly=evenly)
    assert (found.batch, found.clients) == (1, 0)
    assert found.per_second == pytest.approx(100, rel=0.02 if evenly else 0.2)


def test_perf_analyzer_waits_for_as_many_large_requests_as_of_small_ones():
    assert long_enough(1.0, 1, 5000) == 1.0
    assert long_enough(1.0, 64, 640) == pytest.approx(REQUESTS * 0.1)
    assert long_enough(3.0, 64, 1e6) == 3.0


def test_a_soak_that_a_failed_request_ends_is_told_as_such(server, target, perf, pixels, tmp_path):
    data = write_images(tmp_path / "images.json", pixels)
    with generator(pixels) as load:
        benchmark = Benchmark(target, server.grpc_url, replace(TINY, soak=1), perf, data, pixels, load, here=True)
        benchmark.rows += ROWS
        benchmark.soak()
        assert [(row.rate, row.failed) for row in choose(benchmark.rows, "soak")] == [(80, 0)]
        assert [met for goal, _, met in goals(GUARD, benchmark.result, FIGURES) if goal.startswith("80% load")] == [True, True]
        benchmark.url = "127.0.0.1:1"
        benchmark.soak()
    assert [row.failed for row in choose(benchmark.rows, "soak")] == [0, 1]
    assert ("80% load: no failed request", "1", False) in goals(GUARD, benchmark.result, FIGURES)
    page = as_markdown(GUARD, benchmark.result, FIGURES, {"command": "noisec bench throughput"})
    assert "in 1 parts" in page
    assert "perf_analyzer, fashion_mnist, batch 1, 80 requests a second: exit code" in page.split("## Soak")[1]


def test_what_cannot_be_measured_is_refused_before_anything_is(server, tmp_path):
    rearrange(REPOSITORY, GUARD, ServingSpec(input="uint8"), tmp_path / "bytes")
    for repository, plan, url, reason in (
        (REPOSITORY, replace(TINY, soak=600), server.grpc_url, "--soak 600 with --url"),
        (REPOSITORY, replace(TINY, soak=6), None, "--soak 6: whether memory grows takes 30 s at least"),
        (
            tmp_path / "bytes",
            replace(TINY, peers=("litserve",)),
            None,
            '--peers litserve: fashion_mnist takes bytes .serving.input = "uint8"',
        ),
    ):
        with pytest.raises(NoisecError, match=reason):
            run_benchmark(repository, GUARD, plan, tmp_path, None, url, "")
    with pytest.raises(NoisecError, match="no statistics: .* has to have loaded fashion_mnist, fashion_mnist_autoencoder, .*nobody"):
        statistics.read(server.grpc_url, [*manifest.models(GUARD), "nobody"])


def test_the_limit_takes_no_batch_that_there_are_too_few_images_for(target, pixels):
    benchmark = Benchmark(target, "", replace(TINY, limits=(8, 128)), None, None, pixels[:10], None, here=False)
    benchmark.limit()
    assert {row.batch for row in benchmark.rows} == {8}


def test_mixed_traffic_keeps_to_the_largest_batch_that_is_taken(server, target, pixels, monkeypatch):
    monkeypatch.setattr(Target, "largest", 2)
    with generator(pixels) as load:
        benchmark = Benchmark(target, server.grpc_url, TINY, None, None, pixels, load, here=True)
        _, stages = counted(server, benchmark.mixed)
    assert stages[GUARD].requests < stages[GUARD].images < 2 * stages[GUARD].requests
    assert [row.failed for row in benchmark.rows] == [0, 0]
    assert 0 < benchmark.result.observations[0].cpu_ms < 1000


def test_labels_are_no_goal_where_the_classifier_itself_answers_them():
    told = {own: [goal for goal, _, _ in goals(GUARD, Result(ROWS, own_labels=own), FIGURES)] for own in (True, False)}
    assert [goal for goal in told[True] if goal not in told[False]] == ["labels alone: >= 97% of the bare classifier"]


def test_a_run_writes_every_figure_and_keeps_those_of_other_guards(server, perf, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "summary.json").write_text(json.dumps({"another": dict.fromkeys(Summary.__annotations__, 1.0)}))
    summary = run_benchmark(REPOSITORY, GUARD, TINY, tmp_path, out, server.grpc_url, "noisec bench throughput")
    written = json.loads((out / "summary.json").read_text())
    assert set(written) == {"another", GUARD}
    assert written[GUARD] == summary
    assert set(summary) == {
        "limit_per_second",
        "served_per_second",
        "served_over_limit",
        "single_image_per_second",
        "single_image_over_limit",
        "label_only_over_bare",
        "added_latency_ms",
        "p50_ms",
        "p99_ms",
        "peers",
    }
    assert set(PeerFigures.__annotations__) == {"per_second_1x1", "per_second_single_image", "per_second_saturated"}
    assert summary["served_over_limit"] == pytest.approx(summary["served_per_second"] / summary["limit_per_second"])
    page = (out / GUARD / "README.md").read_text()
    assert "noisec bench throughput" in page
    assert page.count("met") >= 5
    assert "labels alone: >= 97%" in page
    assert page.count("half the load") == 2
    with (out / GUARD / "measurements.csv").open() as file:
        parts = {row["part"] for row in csv.DictReader(file)}
    assert parts == {"limit", "batches and clients", "single images", "side by side", "labels", "one client", "arrivals", "mixed"}
    for name in ("throughput.png", "latency.png", "stages.csv"):
        assert (out / GUARD / name).stat().st_size > 100
