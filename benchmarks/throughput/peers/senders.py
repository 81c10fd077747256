"""How a client asks each peer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import triton_to_np_dtype

from noisec import contract
from noisec.benchmarks.throughput.peers.servers.compute import ANSWERS, encode
from noisec.errors import NoisecError

Images = npt.NDArray[np.float32]
"""float32 [n, C, H, W]"""
Answers = Mapping[str, npt.NDArray[Any]]
"""name -> [n]"""
Ask = Callable[[Images], Awaitable[Answers]]
Open = Callable[[int, str], AbstractAsyncContextManager[Ask]]
"""(port, guard) -> one client's connection"""
SECONDS = 60.0
"""until a request counts as failed"""


def over_http(path: str) -> Open:
    """JSON with each image's bytes in base64; the reply holds a row of ``ANSWERS`` for each."""

    @asynccontextmanager
    async def connect(port: int, guard: str) -> AsyncIterator[Ask]:
        import aiohttp

        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(SECONDS)) as session:

            async def ask(images: Images) -> Answers:
                try:
                    async with session.post(f"http://127.0.0.1:{port}{path}", json={"images": encode(images)}) as reply:
                        if reply.status != 200:
                            raise NoisecError(f"port {port}: status {reply.status}: {(await reply.text())[:200]}")
                        rows = np.asarray(await reply.json())
                except (aiohttp.ClientError, TimeoutError) as error:
                    raise NoisecError(f"port {port}: {type(error).__name__}: {error}") from error
                return dict(zip(ANSWERS, rows.T, strict=True))

            yield ask

    return connect


def over_grpc(outputs: tuple[str, ...], *, channels_last: bool = False) -> Open:
    """The v2 protocol with binary tensors, asked as this server is."""

    @asynccontextmanager
    async def connect(port: int, guard: str) -> AsyncIterator[Ask]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
            wanted = [service_pb2.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs]

            async def ask(images: Images) -> Answers:
                sent = images.transpose(0, 2, 3, 1) if channels_last else images
                image = service_pb2.ModelInferRequest.InferInputTensor(name=contract.IMAGE, datatype="FP32", shape=sent.shape)
                request = service_pb2.ModelInferRequest(
                    model_name=guard, inputs=[image], outputs=wanted, raw_input_contents=[sent.tobytes()]
                )
                try:
                    reply = await infer(request, timeout=SECONDS)
                except grpc.aio.AioRpcError as error:
                    raise NoisecError(f"port {port}: {error.code().name}: {error.details()}") from error
                parts = zip(reply.outputs, reply.raw_output_contents, strict=True)
                return {output.name: np.frombuffer(raw, triton_to_np_dtype(output.datatype)) for output, raw in parts}

            yield ask

    return connect
