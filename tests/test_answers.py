"""The served ensemble answers what its parts compute in process."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from conftest import GUARD, REPOSITORY, images_answered
from tritonclient.grpc import service_pb2

from noisec import contract
from noisec.builders.images import in_batches
from noisec.builders.passes import passes_needed
from noisec.builders.stages import StageRunner, in_process
from noisec.clients import AsyncGuardClient, GuardClient
from noisec.clients.requests import read_answer
from noisec.contract import stage_model
from noisec.errors import NoisecError
from noisec.python_backend.scorer.scoring import Scorer

SUBSETS = [names for count in range(1, len(contract.OUTPUTS) + 1) for names in combinations(contract.OUTPUTS, count)]
LOGIT_DIFFERENCE = 1e-4
SCORE_DIFFERENCE = 1e-3
"""largest absolute differences: batches of other sizes round differently"""


@pytest.fixture(scope="module")
def computed(spec, pixels):
    folder = REPOSITORY / stage_model(GUARD, "scorer") / "1"
    stages = {stage: REPOSITORY / stage_model(GUARD, stage) / "1" for stage in ("autoencoder", "classifier")}
    tensors = StageRunner(in_process(stages), passes_needed(spec), spec.noise_source)(in_batches(pixels), len(pixels))
    return tensors[contract.LOGITS], Scorer.load(folder / "scorer.npz").verdict(tensors)


def test_served_answers_equal_the_same_models_in_process(client, pixels, computed):
    logits, verdict = computed
    served = client.classify(pixels)
    assert np.abs(served.logits - logits).max() < LOGIT_DIFFERENCE
    assert np.abs(served.scores - verdict.score).max() < SCORE_DIFFERENCE
    assert np.array_equal(served.labels, logits.argmax(axis=1))
    assert np.array_equal(served.is_malicious, verdict.is_malicious)
    assert (served.releases == 1).all()


def test_an_image_gets_the_same_answer_alone_and_in_a_batch(client, pixels):
    together = client.classify(pixels[:20])
    alone = [client.classify(image) for image in pixels[:20]]
    assert np.abs(together.scores - [one.scores[0] for one in alone]).max() < SCORE_DIFFERENCE
    assert np.array_equal(together.labels, [one.labels[0] for one in alone])


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_every_subset_of_outputs_can_be_requested(server, client, pixels, names):
    full = client.classify(pixels[:3])
    expected = dict(zip(contract.OUTPUTS, (full.logits, full.scores, full.p_values, full.is_malicious, full.releases), strict=True))
    with triton_grpc.InferenceServerClient(server.grpc_url) as raw:
        image = triton_grpc.InferInput(contract.IMAGE, (3, 1, 28, 28), "FP32").set_data_from_numpy(pixels[:3])
        result = raw.infer(GUARD, [image], outputs=[triton_grpc.InferRequestedOutput(name) for name in names])
    for name in names:
        assert np.allclose(result.as_numpy(name).reshape(expected[name].shape), expected[name], atol=SCORE_DIFFERENCE)
    assert {output.name for output in result.get_response().outputs} == set(names)


def test_label_only_requests_run_only_the_classifier(server, client, pixels):
    before = images_answered(server.grpc_url)
    labels = client.classify(pixels[:50], labels_only=True)
    after = images_answered(server.grpc_url)
    assert {name: after[name] - before[name] for name in after} == {
        GUARD: 50,
        stage_model(GUARD, "autoencoder"): 0,
        stage_model(GUARD, "classifier"): 50,
        stage_model(GUARD, "scorer"): 0,
    }
    assert labels.scores is labels.p_values is labels.is_malicious is labels.releases is None
    assert np.array_equal(labels.labels, client.classify(pixels[:50]).labels)


def test_bytes_and_floats_get_the_same_answer(client, report):
    images = report[:100]
    assert np.array_equal(client.classify(images.pixels).scores, client.classify(images.floats()).scores)


def test_batches_above_the_servers_maximum_are_split_and_joined_in_order(client, pixels):
    assert client.interface.max_batch_size < len(pixels)
    whole = client.classify(pixels)
    parts = [client.classify(pixels[start : start + 7]) for start in range(0, len(pixels), 7)]
    assert len(whole) == len(pixels)
    assert np.array_equal(whole.labels, np.concatenate([part.labels for part in parts]))


def test_a_client_that_gets_no_verdict_raises(pixels):
    class WithoutVerdict:
        def as_numpy(self, name):
            return None if name == contract.IS_MALICIOUS else np.zeros((1, 1), np.float32)

    with pytest.raises(NoisecError, match="answered without IS_MALICIOUS"):
        read_answer(WithoutVerdict(), contract.OUTPUTS)


def test_a_verdict_without_values_is_none():
    """As Triton 24.10's Python backend makes them where it finds NumPy 2."""
    answer = service_pb2.ModelInferResponse(model_name=GUARD)
    for name, values in ((contract.LOGITS, np.zeros(10, np.float32).tobytes()), (contract.SCORE, b"")):
        answer.outputs.add(name=name, datatype="FP32", shape=[1, len(values) // 4 or 1])
        answer.raw_output_contents.append(values)
    with pytest.raises(NoisecError, match="answered SCORE without its values .*: give it a NumPy below 2"):
        read_answer(triton_grpc.InferResult(answer), (contract.LOGITS, contract.SCORE))


def test_unknown_guards_and_stages_are_refused(server):

    with pytest.raises(NoisecError, match="guard 'nobody' cannot be asked: .*not found"):
        GuardClient(server.grpc_url, "nobody")
    with pytest.raises(NoisecError, match="is not a guard: .*IS_MALICIOUS"):
        GuardClient(server.grpc_url, stage_model(GUARD, "classifier"))
    with pytest.raises(NoisecError, match="cannot be asked"):
        GuardClient("127.0.0.1:9", GUARD, timeout=2)


def test_the_asyncio_client_gives_the_same_answers(server, client, pixels):
    async def ask():
        async with AsyncGuardClient(server.grpc_url, GUARD) as connected:
            return await connected.classify(pixels), await connected.classify(pixels[:5], labels_only=True)

    everything, labels = asyncio.run(ask())
    expected = client.classify(pixels)
    assert np.array_equal(everything.labels, expected.labels)
    assert np.abs(everything.scores - expected.scores).max() < SCORE_DIFFERENCE
    assert labels.scores is None


@pytest.mark.parametrize(("at_once", "answered"), [(4, 64), (1, 0)])
def test_after_a_refusal_what_was_sent_is_waited_for_and_nothing_more_is_sent(server, pixels, at_once, answered):
    async def ask():
        async with AsyncGuardClient(server.grpc_url, GUARD) as connected:
            connected.interface = replace(connected.interface, max_batch_size=200)  # the server's is 64
            connected._turns = asyncio.Semaphore(at_once)
            with pytest.raises(NoisecError, match="batch-size must be <= 64"):
                await connected.classify(np.concatenate([pixels] * 3 + [pixels[:64]]))
            return len(asyncio.all_tasks())

    before = images_answered(server.grpc_url)[GUARD]
    assert asyncio.run(ask()) == 1
    assert images_answered(server.grpc_url)[GUARD] - before == answered


def test_the_asyncio_client_names_what_is_wrong(server, pixels):
    async def ask(guard, images):
        async with AsyncGuardClient(server.grpc_url, guard) as connected:
            return await connected.classify(images)

    with pytest.raises(NoisecError, match="guard 'nobody' cannot be asked"):
        asyncio.run(ask("nobody", pixels))
    with pytest.raises(NoisecError, match="divide by 255"):
        asyncio.run(ask(GUARD, pixels * 255))
