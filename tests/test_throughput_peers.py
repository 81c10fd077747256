"""Other servers compute the same guard, and nothing of them is left when they have ended."""

from __future__ import annotations

import asyncio
import shutil
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from conftest import GUARD, REPOSITORY

from noisec.benchmarks.throughput.peers import registry
from noisec.benchmarks.throughput.peers.environments import STAMP, prepare
from noisec.benchmarks.throughput.peers.registry import LITSERVE, PEERS, PYTRITON, describe_classifier
from noisec.benchmarks.throughput.peers.running import check, running
from noisec.benchmarks.throughput.peers.servers.compute import ANSWERS, columns, encode, open_guard
from noisec.builders.layout import rearrange
from noisec.builders.spec import ServingSpec
from noisec.errors import NoisecError
from noisec.python_backend.scorer.guard import PART

SCORE_DIFFERENCE = 1e-2
"""largest difference, of scores relative to 1 + score: batches of other sizes round differently, and the scales are steep in places"""
OWN = Path(sys.prefix)
"""PyTriton is installed here"""


@pytest.fixture(scope="module")
def images(pixels):
    """Clean ones, and as many with a sign pattern that the guard flags."""
    pattern = np.sign(np.random.default_rng(0).standard_normal(pixels.shape[1:])).astype(np.float32)
    return np.concatenate([pixels[:100], np.clip(pixels[100:] + 0.1 * pattern, 0, 1)])


@pytest.fixture(scope="module")
def computing():
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    yield open_guard(REPOSITORY, GUARD)
    sys.dont_write_bytecode = before


@pytest.fixture
def served(client, images):
    verdicts = client.classify(images)
    assert 0 < verdicts.is_malicious.sum() < len(images), "images of one kind cannot tell right from wrong verdicts"
    return dict(zip(ANSWERS, (verdicts.labels, verdicts.scores, verdicts.p_values, verdicts.is_malicious), strict=True))


def assert_same(answers, expected):
    assert np.array_equal(answers["label"], expected["label"])
    assert np.array_equal(answers["is_malicious"], expected["is_malicious"])
    assert (np.abs(answers["score"] - expected["score"]) < SCORE_DIFFERENCE * (1 + np.abs(expected["score"]))).all()
    assert np.abs(answers["p_value"] - expected["p_value"]).max() < SCORE_DIFFERENCE


def test_what_every_peer_computes_is_what_this_server_answers(computing, images, served):
    assert_same(computing(images), served)


def test_a_peer_of_a_fused_guard_makes_no_pass_twice(computing, images, served, tmp_path):
    rearrange(REPOSITORY, GUARD, ServingSpec(layout="fused"), tmp_path)
    fused, seen = open_guard(tmp_path, GUARD), []
    run = fused._classifier.run
    fused._classifier = SimpleNamespace(run=lambda outputs, inputs: seen.append(len(inputs["IMAGE"])) or run(outputs, inputs))
    assert_same(fused(images), served)
    assert seen == [len(images)], "the noise and the reconstruction are the autoencoder stage's"


@pytest.mark.parametrize("layout", ["single", "graph"])
def test_a_peer_of_a_guard_in_one_model_computes_its_one_graph(layout, images, served, tmp_path):
    rearrange(REPOSITORY, GUARD, ServingSpec(layout=layout), tmp_path)
    assert_same(open_guard(tmp_path, GUARD)(images), served)


def test_a_peer_of_a_guard_in_one_process_computes_as_many_images_at_a_time(images, served, tmp_path):
    rearrange(REPOSITORY, GUARD, ServingSpec(layout="single"), tmp_path)
    single, seen = open_guard(tmp_path, GUARD), []
    run = single._whole.run
    single._whole = SimpleNamespace(
        run=lambda outputs, inputs: seen.append(len(inputs["IMAGE"])) or run(outputs, inputs), get_outputs=single._whole.get_outputs
    )
    assert_same(single(images), served)
    assert max(seen) == PART
    assert sum(seen) == len(images)


def test_requests_joined_by_a_peer_keep_their_own_answers(computing, images, served):
    edges = [0, 1, 3, 3 + 40, len(images)]
    answers = computing.together([images[start:stop] for start, stop in pairwise(edges)])
    assert [len(one["label"]) for one in answers] == [1, 2, 40, len(images) - 43]
    assert_same({name: np.concatenate([one[name] for one in answers]) for name in ANSWERS}, served)


def test_images_and_answers_survive_the_json_encoding(computing, images):
    assert np.array_equal(computing.decode(encode(images)), images)
    answers = computing(images)
    for name, column in zip(ANSWERS, columns(answers).T, strict=True):
        assert np.array_equal(column.astype(answers[name].dtype), answers[name])


def test_pytriton_as_a_peer_answers_the_same_and_ends(images, served):
    settings = replace(PYTRITON.settings[0], preferred=4)
    with running(PYTRITON, OWN, REPOSITORY, GUARD, settings) as server:
        family = psutil.Process(server.pid).children(recursive=True)

        async def ask():
            parts = await asyncio.gather(*(server.ask(images[start : start + 8]) for start in range(0, len(images), 8)))
            async with server.connect() as send:
                await send(images[:3])
                with pytest.raises(NoisecError, match=str(settings.batch)):
                    await send(images[: settings.batch + 1])
            return {name: np.concatenate([part[name] for part in parts]) for name in ANSWERS}

        assert_same(asyncio.run(ask()), served)
    assert family
    assert not any(process.is_running() for process in family)
    assert not psutil.pid_exists(server.pid)


def test_a_peer_that_cannot_start_says_why(tmp_path):
    repository = shutil.copytree(REPOSITORY, tmp_path / "repository")
    next(repository.glob("*_scorer/*/scorer.npz")).unlink()
    with (
        pytest.raises(NoisecError, match=r"(?s)stopped while it started.*scorer\.npz"),
        running(PYTRITON, OWN, repository, GUARD, PYTRITON.settings[0]),
    ):
        pass


def test_a_missing_answer_is_a_failure():
    with pytest.raises(NoisecError, match="4 images"):
        check(LITSERVE, {"label": np.zeros(3)}, 4)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.package)
def test_every_requirement_is_pinned(peer):
    assert all(line.count("==") == 1 and line.split("==")[1][:1].isdigit() for line in peer.requirements)
    assert peer.version in {line.split("==")[1] for line in peer.requirements if line.startswith(f"{peer.package}==")}
    assert len(set(peer.settings)) == len(peer.settings) > 1


def test_an_environment_that_cannot_be_made_says_why_and_is_not_taken_for_finished(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(registry, "REQUIREMENTS", tmp_path)
    (tmp_path / "no-such-server.txt").write_text("no-such-server==1.0\n")
    peer = replace(LITSERVE, package="no-such-server")
    with pytest.raises(NoisecError, match="No matching distribution found for no-such-server==1.0"):
        prepare(peer, tmp_path / "work")
    assert not (tmp_path / "work" / peer.package / STAMP).exists()


def test_the_classifier_is_described_layer_by_layer():
    network = describe_classifier(REPOSITORY, GUARD)
    assert network["shape"] == (28, 28, 1)
    assert [kind for kind, *_ in network["layers"]] == [*(["conv", "pool"] * 3), *(["dense"] * 3)]
    assert network["layers"][-2:] == [("dense", 128, 0, 0), ("dense", 10, 0, 0)]
