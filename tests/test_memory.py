"""A guard that remembers: near repeats are malicious, the same image again is not, and what came before changes nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from conftest import GUARD, REPOSITORY
from pydantic import ValidationError

from noisec import contract, manifest
from noisec.builders import variants
from noisec.builders.calibrate import NO_HEAD, REPEATED, fit_repeats
from noisec.builders.card import write_card
from noisec.builders.graphs import only
from noisec.builders.images import Splits
from noisec.builders.layout import rearrange
from noisec.builders.passes import scorer_inputs
from noisec.builders.release import Release
from noisec.builders.repository import read_widths, write_repository
from noisec.builders.scorergraph import verdict_graph
from noisec.builders.spec import DetectorSpec, GuardSpec, MemorySpec, ServingSpec
from noisec.builders.stages import StageRunner, in_process
from noisec.clients import GuardClient
from noisec.contract import stage_model
from noisec.errors import NoisecError
from noisec.manifest import verify_repository
from noisec.python_backend.scorer.detectors import View
from noisec.python_backend.scorer.guard import Guard
from noisec.python_backend.scorer.memory import Memory, Repeats
from noisec.python_backend.scorer.scoring import Scorer
from noisec.python_backend.server import EmbeddedServer

IMAGE = contract.PASSES["image"]
NEIGHBOURS, SIZE = 5, 300


def rule(neighbours: int = 3, size: int = 10) -> Repeats:
    return Repeats(np.zeros(2, np.float32), np.float32(1), np.array(neighbours), np.array(size))


def near(count: int, place: float = 0.0) -> np.ndarray:
    """Distinct rows within .1 of each other."""
    return np.stack([place + np.linspace(0, 0.1, count), np.zeros(count)], axis=1).astype(np.float32)


def test_the_fourth_of_near_inputs_repeats_three_whether_they_come_together_or_one_by_one():
    apart = Memory(rule())
    assert [bool(apart.repeated(row[None])[0]) for row in near(6)] == [False, False, False, True, True, True]
    assert Memory(rule()).repeated(near(3)).tolist() == [False] * 3
    assert Memory(rule()).repeated(near(4)).tolist() == [True] * 4


def test_the_same_input_again_and_again_is_no_repeat_and_takes_no_place():
    memory = Memory(rule())
    for rows in (near(1), np.repeat(near(1), 20, axis=0), *[near(1)] * 20):
        assert not memory.repeated(rows).any()
    assert not memory.repeated(near(3)).any()  # one of the three is remembered already
    assert memory.repeated(near(4)[1:2]).all()


def test_the_oldest_inputs_are_forgotten_first():
    memory = Memory(rule(size=4))
    memory.repeated(near(3))
    memory.repeated(np.array([[50, 0], [90, 0]], np.float32))  # two places more than are free, one of them an old one's
    assert not memory.repeated(near(4)[1:2]).any()
    large = Memory(rule(size=4))
    large.repeated(np.concatenate([near(3), near(4, 50.0)]))  # a batch larger than the memory
    assert large.repeated(near(9, 50.0)[4:5]).all()
    assert not large.repeated(near(9)[4:5]).any()


@pytest.mark.parametrize("broken", [np.nan, np.inf, 3e38])
def test_what_is_no_number_is_neither_a_repeat_nor_remembered(broken):
    memory = Memory(rule())
    rows = np.concatenate([near(3), np.full((5, 2), broken, np.float32)])
    assert not memory.repeated(rows).any()
    assert memory.repeated(near(4)[1:2]).all()


def test_a_thousandth_of_clean_inputs_is_taken_for_repeats():
    rows, labels = clustered(16000)
    found = fit_repeats(MemorySpec(size=2000, neighbours=NEIGHBOURS), view(rows[:8000], labels[:8000]), view(rows[8000:], labels[8000:]), 0)
    fresh, classes = clustered(12000, seed=1)
    for chosen in (np.full(len(fresh), True), classes == 0):  # all classes, or nothing but one
        memory = Memory(found)
        flagged = np.concatenate([memory.repeated(part) for part in np.array_split(fresh[chosen], 60)])
        assert np.mean(flagged[2000:]) <= 3 * REPEATED
        step = 0.2 * float(found.radius) * np.arange(1, 9, dtype=np.float32)[:, None] * np.eye(8, dtype=np.float32)[:1]
        assert memory.repeated(fresh[:1] + step).sum() >= 4


def clustered(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of four well separated classes, and their labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, count)
    return (generator.normal(size=(count, 8)) + 10 * labels[:, None]).astype(np.float32), labels


def view(rows: np.ndarray, labels: np.ndarray) -> View:
    return View((rows,), labels, NO_HEAD)


@pytest.mark.parametrize("far", [10, 100, 1000])
def test_the_same_input_is_known_again_far_from_the_centre_too(far):
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(20, 512)).astype(np.float32)
    rows *= far / np.linalg.norm(rows, axis=1, keepdims=True)
    memory = Memory(Repeats(np.zeros(512, np.float32), np.float32(1), np.array(3), np.array(400)))
    for batch in (rows, *rows[:, None], np.repeat(rows, 3, axis=0), rows[::-1]):
        assert not memory.repeated(batch).any()


def test_one_product_finds_the_neighbours_that_subtracting_everything_finds():
    generator = np.random.default_rng(0)
    memory = Memory(Repeats(np.ones(32, np.float32), np.float32(6), np.array(4), np.array(300)))
    answers = []
    for _ in range(60):
        batch = generator.normal(1, 1, (12, 32)).astype(np.float32)
        held = memory._points[: memory._seen, :-1] + 1
        distances = np.linalg.norm(batch[:, None] - np.concatenate([held, batch]), axis=2)
        expected = (distances <= 6).sum(axis=1) - 1 >= 4  # an input is no neighbour of its own
        answers.append(memory.repeated(batch))
        np.testing.assert_array_equal(answers[-1], expected)
    assert 0.1 < np.mean(answers) < 0.9


def test_a_memory_that_the_fit_images_do_not_fill_asks_for_as_many_neighbours_among_as_many():
    rows, labels = clustered(24000)
    calibration = view(rows[16000:], labels[16000:])
    whole, half = (
        fit_repeats(MemorySpec(size=4000, neighbours=20), view(rows[:count], labels[:count]), calibration, 0) for count in (16000, 8000)
    )
    assert half.radius == pytest.approx(whole.radius, rel=0.1)
    same = view(np.ones((200, 3), np.float32), np.zeros(200, np.intp))
    with pytest.raises(NoisecError, match="clean images repeat each other"):
        fit_repeats(MemorySpec(size=100, neighbours=2), same, same, 0)


def test_a_memory_needs_the_images_own_activations(spec):
    noise = spec.model_copy(update={"detectors": (DetectorSpec(view="noise"),), "memory": MemorySpec()})
    assert IMAGE in scorer_inputs(noise)
    assert IMAGE not in scorer_inputs(noise.model_copy(update={"memory": None}))
    with pytest.raises(ValidationError, match="30 neighbours cannot be found among 20 inputs"):
        MemorySpec(size=20, neighbours=30)


def test_a_scorer_is_fitted_anew_where_the_memory_changes(spec, report):
    splits = Splits(report, report, report, report, ())
    kinds = [spec.model_copy(update={"memory": memory}) for memory in (None, MemorySpec(), MemorySpec(neighbours=5))]
    keys = [json.dumps(variants.scorer_inputs(kind, splits, {}), sort_keys=True) for kind in kinds]
    assert len(set(keys)) == 3


def test_the_card_names_a_memory_where_there_is_one(spec, tmp_path):
    content, (widths, _) = manifest.read_manifest(REPOSITORY, GUARD), read_widths(REPOSITORY, GUARD)
    for memory, named in ((MemorySpec(), True), (None, False)):
        guard = spec.model_copy(update={"memory": memory})
        write_card(tmp_path, guard, content["classifier"], widths, content["figures"], content["precisions"])
        assert ("what 10 of the last 4096 inputs nearly repeat is malicious too" in (tmp_path / GUARD / "README.md").read_text()) == named


@pytest.fixture(scope="module", params=["staged", "fused", "single"])
def remembering(request, tmp_path_factory, report):
    """A server of the reference guard with a memory."""
    content = manifest.read_manifest(REPOSITORY, GUARD)
    release = content["release"]
    spec = GuardSpec.model_validate(content["spec"]).model_copy(update={"memory": MemorySpec(size=SIZE, neighbours=NEIGHBOURS)})
    stages = {stage: REPOSITORY / stage_model(GUARD, stage) / str(release) for stage in ("autoencoder", "classifier")}
    run = StageRunner.of(spec, in_process(stages, 1))
    tensors = run((batch.floats() for batch in report[1000:3000].batches()), 2000)
    rows, labels = tensors[IMAGE], tensors[contract.LOGITS].argmax(axis=1)
    scorer = Scorer.load(REPOSITORY / stage_model(GUARD, "scorer") / str(release) / "scorer.npz")
    scorer = replace(scorer, repeats=fit_repeats(spec.memory, view(rows[:1000], labels[:1000]), view(rows[1000:], labels[1000:]), 0))
    folder = tmp_path_factory.mktemp("remembering")
    widths, names = read_widths(REPOSITORY, GUARD)
    write_repository(folder, spec, widths, names, stages, scorer)
    manifest.write_manifest(folder, GUARD, release, {**content, "spec": spec.model_dump(mode="json")})
    rearrange(folder, GUARD, ServingSpec(layout=request.param, instances=1), folder)  # several instances have a memory each
    assert verify_repository(folder) == []
    with EmbeddedServer(folder) as running:
        yield running


def test_a_search_around_one_image_is_flagged_and_other_images_are_not(remembering, client, report):
    pixels = report[:60].pixels
    usual = client.classify(pixels)
    generator = np.random.default_rng(0)
    searching = np.clip(pixels[:1] + generator.choice([-3, 3], (30, *pixels.shape[1:])), 0, 255).astype(np.uint8)
    alone = client.classify(searching)
    with GuardClient(remembering.grpc_url, GUARD) as asking:
        for _ in range(3):  # the same images again are no repeats
            verdicts = asking.classify(pixels)
            np.testing.assert_array_equal(verdicts.is_malicious, usual.is_malicious)
        steps = [asking.classify(searching[index : index + 1]) for index in range(len(searching))]
        flagged = np.array([step.is_malicious[0] for step in steps])
        assert flagged[NEIGHBOURS + 1 :].all()
        np.testing.assert_array_equal(flagged[: NEIGHBOURS - 1], alone.is_malicious[: NEIGHBOURS - 1])
        np.testing.assert_allclose([step.scores[0] for step in steps], alone.scores, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal([step.labels[0] for step in steps], alone.labels)
        np.testing.assert_array_equal(asking.classify(pixels).is_malicious, np.append(True, usual.is_malicious[1:]))  # the image too


def test_a_graph_gives_no_verdict_of_a_scorer_with_a_memory(remembering):
    with pytest.raises(NoisecError, match="a scorer with a memory has no graph that gives its verdict; serve the guard single or fused"):
        verdict_graph(Release.newest(remembering.repository, GUARD).scorer)


def test_a_guard_in_one_graph_that_hides_what_is_remembered_does_not_load(remembering, tmp_path):
    rearrange(remembering.repository, GUARD, ServingSpec(layout="single"), tmp_path)
    graph = tmp_path / GUARD / "1" / "autoencoder" / "model.onnx"
    onnx.save(only(onnx.load(graph), [contract.LOGITS, contract.SCORE]), graph)
    with pytest.raises(ValueError, match=rf"scorer.npz needs \['{IMAGE}'\], which the graphs beside it do not make"):
        Guard(graph.parents[1], 1)
