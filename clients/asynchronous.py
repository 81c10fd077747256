"""The asyncio client."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

import numpy.typing as npt
import tritonclient.grpc.aio as triton_grpc
from tritonclient.utils import InferenceServerException

from noisec.clients.requests import GuardInterface, infer_arguments, read_answer, refusal, wanted_outputs
from noisec.clients.results import Verdicts
from noisec.errors import NoisecError

IN_FLIGHT = 8
"""requests of one client that wait for the server at once"""


class AsyncGuardClient:
    """Asks one guard over gRPC from asyncio; an async context manager, which reads the guard's interface.

    Example::

        async with AsyncGuardClient("localhost:8001", "fashion_mnist") as client:
            verdicts = await client.classify(images)

    Args:
        url: ``host:port`` of the server's gRPC endpoint
        guard: its name, that of a Triton model
        timeout: seconds for each request
    """

    interface: GuardInterface

    def __init__(self, url: str, guard: str, *, timeout: float = 30.0) -> None:
        self._url = url
        self._guard = guard
        self._timeout = timeout

    async def __aenter__(self) -> AsyncGuardClient:
        """Connect.

        Raises:
            NoisecError: the server does not answer, or has no such guard.
        """
        self._client = triton_grpc.InferenceServerClient(self._url)
        self._turns = asyncio.Semaphore(IN_FLIGHT)
        try:
            answer = await self._client.get_model_config(self._guard, client_timeout=self._timeout)
            self.interface = GuardInterface.from_config(self._guard, answer.config)
        except InferenceServerException as error:
            await self._client.close()
            raise NoisecError(f"{self._url}: guard {self._guard!r} cannot be asked: {error.message()}") from error
        except BaseException:  # asyncio.timeout cancels
            await self._client.close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        await self._client.close()

    async def classify(self, images: npt.NDArray[Any], *, labels_only: bool = False) -> Verdicts:
        """Label and verdict for each image; several requests of at most the server's largest batch at a time.

        Args:
            images: [n, C, H, W] or one image [C, H, W]; uint8, or floats in [0, 1] where the guard takes floats
            labels_only: ask only for the classifier's answer; the server then runs only the classifier

        Raises:
            NoisecError: the images do not fit, the server refused, or it left out an output; of several refusals, that of the images
                that come first.
        """
        outputs = wanted_outputs(labels_only)
        batches = self.interface.batches(self.interface.prepare(images))
        refused = asyncio.Event()
        tasks = [asyncio.create_task(self._in_turn(batch, outputs, refused)) for batch in batches]
        try:
            # What has been sent is waited for: a Triton before 26.05 may not survive that a client gives it up (docs/known-issues.md).
            parts = await asyncio.gather(*tasks)
        finally:
            await asyncio.gather(*tasks, return_exceptions=True)  # where the caller has cancelled this, until they are cancelled too
        for part in parts:
            if isinstance(part, NoisecError):
                raise part
        return Verdicts.join([part for part in parts if isinstance(part, Verdicts)])

    async def _in_turn(self, batch: npt.NDArray[Any], outputs: tuple[str, ...], refused: asyncio.Event) -> Verdicts | NoisecError | None:
        """The answer, or why there is none; None where another request was refused before this one was sent."""
        async with self._turns:
            if refused.is_set():
                return None
            try:
                return await self._ask(batch, outputs)
            except NoisecError as error:
                refused.set()
                return error

    async def _ask(self, batch: npt.NDArray[Any], outputs: tuple[str, ...]) -> Verdicts:
        try:
            result = await self._client.infer(client_timeout=self._timeout, **infer_arguments(self.interface, batch, outputs))
        except InferenceServerException as error:
            raise NoisecError(f"{self._guard}: {refusal(error, self._timeout, len(batch))}") from error
        return read_answer(result, outputs)
