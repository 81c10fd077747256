"""Bad input gets a clear error or a malicious verdict, for that request alone."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from conftest import GUARD

from noisec import contract
from noisec.clients import GuardClient
from noisec.errors import NoisecError


def raw_request(url, array, dtype="FP32"):
    """A request as any gRPC client may send it, past our client's own checks."""
    with triton_grpc.InferenceServerClient(url) as raw:
        image = triton_grpc.InferInput(contract.IMAGE, array.shape, dtype).set_data_from_numpy(array)
        return raw.infer(GUARD, [image])


def one_bad_pixel(value):
    def spoil(images):
        spoiled = images.copy()
        spoiled[1, 0, 3, 4] = value
        return spoiled

    return spoil


NO_IMAGE = {
    "NaN": one_bad_pixel(np.nan),
    "infinity": one_bad_pixel(np.inf),
    "minus infinity": one_bad_pixel(-np.inf),
    "a pixel above one": one_bad_pixel(1.01),
    "a pixel below zero": one_bad_pixel(-0.01),
    "largest float": one_bad_pixel(np.finfo(np.float32).max),
}
REFUSED = {
    "wrong height": (lambda images: images[:, :, :27], "FP32", "unexpected shape"),
    "channels last": (lambda images: images.transpose(0, 2, 3, 1), "FP32", "unexpected shape"),
    "no batch dimension": (lambda images: images[0], "FP32", "unexpected shape|expected"),
    "float64": (lambda images: images.astype(np.float64), "FP64", "data-type|datatype"),
    "bytes": (lambda images: (images * 255).astype(np.uint8), "UINT8", "data-type|datatype"),
    "oversized batch": (lambda images: np.repeat(images, 33, axis=0), "FP32", "batch-size must be <= 64|batch size"),
}


@pytest.fixture
def good_traffic(server, pixels):
    """Good requests all along, from two other clients: each must be answered as it is without bad neighbours."""
    with GuardClient(server.grpc_url, GUARD) as alone:
        expected = alone.classify(pixels[:4])
    stop, flowing, wrong, answered = threading.Event(), threading.Event(), [], []

    def send():
        with GuardClient(server.grpc_url, GUARD) as client:
            while not stop.is_set():
                try:
                    verdicts = client.classify(pixels[:4])
                    if not (np.array_equal(verdicts.labels, expected.labels) and np.allclose(verdicts.scores, expected.scores, atol=1e-3)):
                        wrong.append(verdicts)
                except NoisecError as error:
                    wrong.append(error)
                answered.append(1)
                flowing.set()

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert flowing.wait(10)
    before = len(answered)
    yield
    while len(answered) < before + 4:  # at least one whole request of each client has seen the bad one as its neighbour
        flowing.clear()
        assert flowing.wait(10)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.usefixtures("good_traffic")
@pytest.mark.parametrize("spoil", NO_IMAGE.values(), ids=NO_IMAGE)
def test_what_is_no_image_is_malicious_and_its_batch_is_not(server, pixels, spoil):
    good = raw_request(server.grpc_url, pixels[:3])
    for _ in range(20):
        result = raw_request(server.grpc_url, spoil(pixels[:3]))
        assert result.as_numpy(contract.IS_MALICIOUS)[1, 0]
        assert result.as_numpy(contract.SCORE)[1, 0] == np.finfo(np.float32).max
        assert result.as_numpy(contract.P_VALUE)[1, 0] <= 0.01
        for row in (0, 2):
            assert np.allclose(result.as_numpy(contract.SCORE)[row], good.as_numpy(contract.SCORE)[row], atol=1e-3)


@pytest.mark.usefixtures("good_traffic")
@pytest.mark.parametrize(("spoil", "dtype", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(server, pixels, spoil, dtype, message):
    for _ in range(20):
        with pytest.raises(triton_grpc.InferenceServerException, match=message):
            raw_request(server.grpc_url, np.ascontiguousarray(spoil(pixels[:3])), dtype)


@pytest.mark.usefixtures("good_traffic")
def test_an_empty_batch_is_refused(server, pixels):
    for _ in range(20):
        with pytest.raises(triton_grpc.InferenceServerException, match="Expected 3136, got 0"):
            raw_request(server.grpc_url, pixels[:0])


@pytest.mark.usefixtures("good_traffic")
def test_an_image_that_is_sent_as_an_empty_batch_is_judged_as_the_image_that_it_is(server, pixels):
    good = raw_request(server.grpc_url, pixels[:1])
    image = triton_grpc.InferInput(contract.IMAGE, [1, 1, 28, 28], "FP32").set_data_from_numpy(pixels[:1])
    image.set_shape([0, 1, 28, 28])  # Triton takes it, and drops the batch's dimension
    with triton_grpc.InferenceServerClient(server.grpc_url) as raw:
        for _ in range(20):
            score = raw.infer(GUARD, [image]).as_numpy(contract.SCORE)
            assert np.allclose(score, good.as_numpy(contract.SCORE)[0], atol=1e-3)


UNSENDABLE = {
    "NaN": (NO_IMAGE["NaN"], r"1 of 3 images have pixels outside \[0, 1\] or NaN \(the first is image 1"),
    "0 to 255 as floats": (lambda images: images * 255, r"divide by 255, or send uint8"),
    "integers": (lambda images: images.astype(np.int64), "images are int64; send uint8"),
    "wrong shape": (lambda images: images[:, :, :27], r"images are \[3, 1, 27, 28\]; fashion_mnist takes \[n, 1, 28, 28\]"),
    "one row": (lambda images: images[0, 0, 0], "or one image"),
    "no images": (lambda images: images[:0], "the batch is empty"),
}


@pytest.mark.parametrize(("spoil", "message"), UNSENDABLE.values(), ids=UNSENDABLE)
def test_the_client_refuses_to_send_what_cannot_be_an_image(client, pixels, spoil, message):
    with pytest.raises(NoisecError, match=message):
        client.classify(spoil(pixels[:3]))
