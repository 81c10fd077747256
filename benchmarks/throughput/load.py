"""Load from a process of its own: closed loops, open loops, and mixed traffic.

A closed loop has a fixed number of clients, each of which sends its next request when the last one is answered: it finds the throughput.
An open loop sends at arrival times that were drawn beforehand and counts each latency from the arrival, whether or not the generator or the
server was late: it finds the latency that users see (no coordinated omission).
"""

from __future__ import annotations

import asyncio
import multiprocessing
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype

from noisec import contract
from noisec.errors import NoisecError

Images = npt.NDArray[Any]
"""[n, C, H, W], as the server takes them"""
Sender = Callable[[Images], Awaitable[None]]
"""Sends a request of n >= 1 images, waits for the answer and raises where there is none."""
Connect = Callable[[], AbstractAsyncContextManager[Sender]]
"""Connects to a server; it travels to the load's process, so it has to pickle."""

GRACE = 30.0
"""seconds that requests in flight have at the end"""
BACKOFF = 0.01
"""seconds that a client waits after a failed request"""


@dataclass(frozen=True)
class Load:
    """What a load found. Failed requests count only in ``failed``."""

    requests: int
    images: int
    seconds: float
    per_second: float
    """images answered per second; in a closed loop, a request that reaches across an edge of the window counts by the share of its time
    that lies inside"""
    p50_ms: float
    p95_ms: float
    p99_ms: float
    failed: int
    reason: str = ""
    """why the first of them did"""


@dataclass(frozen=True)
class Traffic:
    """One kind of request, and its share of all."""

    connect: Connect
    batch: int = 1
    weight: float = 1.0


@dataclass
class _Tally:
    latencies: list[float] = field(default_factory=list)
    images: int = 0
    failed: int = 0
    reason: str = ""

    def load(self, seconds: float, images: float) -> Load:
        """``images`` are those that the throughput is made of."""
        p50, p95, p99 = np.percentile(self.latencies, [50, 95, 99]) * 1000 if self.latencies else (float("nan"),) * 3
        return Load(
            len(self.latencies), self.images, seconds, images / seconds, float(p50), float(p95), float(p99), self.failed, self.reason
        )


class Requests:
    """Images cut into requests, kind by kind.

    Args:
        images: every batch is taken from them, round and round
    """

    def __init__(self, traffic: Sequence[Traffic], images: Images, seed: int) -> None:
        weights = np.array([one.weight for one in traffic])
        self._kinds = np.random.default_rng(seed).choice(len(traffic), 4096, p=weights / weights.sum())
        largest = max(one.batch for one in traffic)
        self._images = images[np.arange(len(images) + largest) % len(images)]
        self._batches = [one.batch for one in traffic]
        self._count = len(images)
        self._at = self._sent = 0

    def next(self) -> tuple[int, Images]:
        """The kind of the next request, and its images."""
        kind = int(self._kinds[self._sent % len(self._kinds)])
        start, batch = self._at, self._batches[kind]
        self._sent, self._at = self._sent + 1, (self._at + batch) % self._count
        return kind, self._images[start : start + batch]


async def closed_loop(
    traffic: Sequence[Traffic], images: Images, clients: int, seconds: float, warm_up: float = 0.3, seed: int = 0
) -> Load:
    """``clients`` clients, each with one request under way at any time. Requests answered within the window count.

    The throughput counts a request that reaches across an edge of the window by the share of its time that lies inside: whole ones would
    make it as coarse as a request's images over ``seconds``, which few large requests turn into per cents.

    Args:
        seconds: length of the window, after ``warm_up`` seconds
    """
    tally, requests, inside = _Tally(), Requests(traffic, images, seed), list[float]()
    async with AsyncExitStack() as stack:
        senders = [[await stack.enter_async_context(one.connect()) for one in traffic] for _ in range(clients)]
        start = time.perf_counter() + warm_up
        stop = start + seconds

        async def client(own: Sequence[Sender]) -> None:
            while (begin := time.perf_counter()) < stop:
                kind, batch = requests.next()
                failure = await _failure(own[kind], batch)
                end = time.perf_counter()
                if start <= end <= stop:
                    _note(tally, end - begin, len(batch), failure)
                if failure:
                    await asyncio.sleep(BACKOFF)
                else:
                    inside.append(len(batch) * (max(0.0, min(end, stop) - max(begin, start)) / (end - begin)))

        unanswered = await _finish([asyncio.create_task(client(own)) for own in senders], seconds + warm_up + GRACE)
    tally.failed += unanswered
    return tally.load(seconds, sum(inside))


async def open_loop(traffic: Sequence[Traffic], images: Images, rate: float, seconds: float, connections: int = 4, seed: int = 0) -> Load:
    """Requests at Poisson arrivals; each latency counts from the arrival. Every arrival counts, until its answer.

    Args:
        rate: requests per second
        seconds: length of the schedule
    """
    schedule = arrivals(rate, seconds, seed)
    tally, requests, tasks = _Tally(), Requests(traffic, images, seed), list[asyncio.Task[None]]()
    async with AsyncExitStack() as stack:
        senders = [[await stack.enter_async_context(one.connect()) for one in traffic] for _ in range(connections)]
        for own in senders:
            for one, kind in zip(own, traffic, strict=True):
                await _failure(one, images[: kind.batch])  # opens the connection
        start, all_sent, loop = time.perf_counter() + 0.05, asyncio.Event(), asyncio.get_running_loop()

        async def send(arrival: float) -> None:
            kind, batch = requests.next()
            failure = await _failure(senders[len(tasks) % connections][kind], batch)
            _note(tally, time.perf_counter() - arrival, len(batch), failure)

        def arrive(arrival: float) -> None:
            tasks.append(loop.create_task(send(arrival)))

        def dispatch() -> None:  # in a thread: asyncio's own timers are whole milliseconds
            for arrival in (start + schedule).tolist():
                time.sleep(max(0.0, arrival - time.perf_counter()))
                loop.call_soon_threadsafe(arrive, arrival)
            loop.call_soon_threadsafe(all_sent.set)

        threading.Thread(target=dispatch, daemon=True).start()
        await all_sent.wait()
        tally.failed += await _finish(tasks, GRACE)
        return tally.load(time.perf_counter() - start, tally.images)


def arrivals(rate: float, seconds: float, seed: int) -> npt.NDArray[np.float64]:
    """Times of a Poisson process, ascending in [0, seconds)."""
    generator = np.random.default_rng(seed)
    times: npt.NDArray[np.float64] = generator.exponential(1 / rate, int(rate * seconds * 1.2 + 50)).cumsum()
    return times[times < seconds]


async def _failure(send: Sender, images: Images) -> str:
    """Why a request was not answered; nothing where it was."""
    try:
        await send(images)
    except Exception as error:  # whatever a sender raises is a request that was not answered
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def _note(tally: _Tally, latency: float, images: int, failure: str) -> None:
    if failure:
        tally.failed += 1
        tally.reason = tally.reason or failure
    else:
        tally.latencies.append(latency)
        tally.images += images


async def _finish(tasks: Sequence[asyncio.Task[None]], timeout: float) -> int:
    """Wait for every task; those that do not end are cancelled, and counted."""
    if not tasks:
        return 0
    done, pending = await asyncio.wait(tasks, timeout=timeout)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()
    return len(pending)


@asynccontextmanager
async def triton(url: str, model: str, outputs: Sequence[str]) -> AsyncIterator[Sender]:
    """Connect to a model of a Triton server over gRPC, on a connection of its own.

    Args:
        outputs: the outputs that are asked for
    """
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(url, options=options) as channel:
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        wanted = [service_pb2.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs]

        async def send(images: Images) -> None:
            image = service_pb2.ModelInferRequest.InferInputTensor(
                name=contract.IMAGE, datatype=np_to_triton_dtype(images.dtype), shape=images.shape
            )
            request = service_pb2.ModelInferRequest(model_name=model, inputs=[image], outputs=wanted, raw_input_contents=[images.tobytes()])
            answer = await infer(request)
            if len(answer.outputs) != len(wanted):
                raise triton_grpc.InferenceServerException(f"{len(answer.outputs)} outputs where {len(wanted)} were asked for")

        yield send


class Generator:
    """Makes load in its own process; :func:`generator` makes one."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def closed(self, traffic: Sequence[Traffic], clients: int, seconds: float) -> Load:
        """:func:`closed_loop`

        Raises:
            NoisecError: not one request was answered.
        """
        return _answered(self._pool.submit(_closed, tuple(traffic), clients, seconds).result())

    def open(self, traffic: Sequence[Traffic], rate: float, seconds: float, seed: int = 0) -> Load:
        """:func:`open_loop`

        Raises:
            NoisecError: not one request was answered.
        """
        return _answered(self._pool.submit(_open, tuple(traffic), rate, seconds, seed).result())


def _answered(load: Load) -> Load:
    if not load.requests:
        raise NoisecError(f"not one request was answered; {load.failed} failed, the first one with: {load.reason or 'no answer in time'}")
    return load


@contextmanager
def generator(images: Images) -> Iterator[Generator]:
    """A process that makes load of these images, [n, C, H, W] as the server takes them."""
    context = multiprocessing.get_context("spawn")
    with stored(images) as file, ProcessPoolExecutor(1, context, initializer=_keep, initargs=(file,)) as pool:
        yield Generator(pool)


@contextmanager
def stored(images: Images) -> Iterator[Path]:
    """Images in an .npy file for other processes: sent to one that dies as it starts, they would overfill its pipe, and block for ever."""
    with tempfile.TemporaryDirectory(prefix="noisec-images-") as folder:
        file = Path(folder, "images.npy")
        np.save(file, images)
        yield file


_kept: Images
"""the images, in the load's process"""


def _keep(file: Path) -> None:
    global _kept
    _kept = np.load(file)


def _closed(traffic: Sequence[Traffic], clients: int, seconds: float) -> Load:
    return asyncio.run(closed_loop(traffic, _kept, clients, seconds))


def _open(traffic: Sequence[Traffic], rate: float, seconds: float, seed: int) -> Load:
    return asyncio.run(open_loop(traffic, _kept, rate, seconds, seed=seed))
