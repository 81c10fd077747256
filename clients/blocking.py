"""The blocking client."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy.typing as npt
import tritonclient.grpc as triton_grpc

from noisec.clients.requests import GuardInterface, infer_arguments, read_answer, refusal, wanted_outputs
from noisec.clients.results import Verdicts
from noisec.errors import NoisecError


class GuardClient:
    """Asks one guard over gRPC; safe to share between threads; a context manager.

    Example::

        with GuardClient("localhost:8001", "fashion_mnist") as client:
            verdicts = client.classify(images)
            print(verdicts.labels, verdicts.is_malicious)

    Args:
        url: ``host:port`` of the server's gRPC endpoint
        guard: its name, that of a Triton model
        timeout: seconds for each request

    Raises:
        NoisecError: the server does not answer, or has no such guard.
    """

    def __init__(self, url: str, guard: str, *, timeout: float = 30.0) -> None:
        self._timeout = timeout
        self._client = triton_grpc.InferenceServerClient(url)
        try:
            config = self._client.get_model_config(guard, client_timeout=timeout).config
            self.interface = GuardInterface.from_config(guard, config)
        except triton_grpc.InferenceServerException as error:
            self.close()
            raise NoisecError(f"{url}: guard {guard!r} cannot be asked: {error.message()}") from error
        except BaseException:
            self.close()
            raise

    def classify(self, images: npt.NDArray[Any], *, labels_only: bool = False) -> Verdicts:
        """Label and verdict for each image, in requests of at most the server's largest batch.

        Args:
            images: [n, C, H, W] or one image [C, H, W]; uint8, or floats in [0, 1] where the guard takes floats
            labels_only: ask only for the classifier's answer; the server then runs only the classifier

        Raises:
            NoisecError: the images do not fit, the server refused, or it left out an output.
        """
        outputs = wanted_outputs(labels_only)
        return Verdicts.join([self._ask(batch, outputs) for batch in self.interface.batches(self.interface.prepare(images))])

    def _ask(self, batch: npt.NDArray[Any], outputs: tuple[str, ...]) -> Verdicts:
        try:
            result = self._client.infer(client_timeout=self._timeout, **infer_arguments(self.interface, batch, outputs))
        except triton_grpc.InferenceServerException as error:
            raise NoisecError(f"{self.interface.guard}: {refusal(error, self._timeout, len(batch))}") from error
        return read_answer(result, outputs)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> GuardClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
