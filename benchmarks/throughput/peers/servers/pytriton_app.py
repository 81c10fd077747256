"""PyTriton: a function with ``@batch``, bound to a model name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from .compute import Computation, Task

OUTPUTS = {"label": np.int64, "score": np.float32, "p_value": np.float32, "is_malicious": np.bool_}


def judge(guard: Computation) -> Callable[..., Any]:
    @batch  # type: ignore[untyped-decorator]
    def infer(IMAGE: Any) -> dict[str, Any]:
        return {name: rows[:, None] for name, rows in guard(IMAGE).items()}

    return infer  # type: ignore[no-any-return]


def main() -> None:
    task = Task.read()
    guards = [task.load() for _ in range(task.workers)]
    http, grpc, metrics = task.ports[1], task.ports[0], task.ports[2]
    config = TritonConfig(http_port=http, grpc_port=grpc, metrics_port=metrics, http_address="127.0.0.1", grpc_address="127.0.0.1")
    preferred = [task.preferred] if task.preferred else None
    batcher = DynamicBatcher(max_queue_delay_microseconds=int(task.delay_ms * 1000), preferred_batch_size=preferred)
    with Triton(config=config) as triton:
        triton.bind(
            model_name=task.guard,
            infer_func=[judge(guard) for guard in guards],
            inputs=[Tensor(name="IMAGE", dtype=np.float32, shape=guards[0].shape)],
            outputs=[Tensor(name=name, dtype=dtype, shape=(1,)) for name, dtype in OUTPUTS.items()],
            config=ModelConfig(max_batch_size=task.batch, batcher=batcher),
            strict=False,
        )
        triton.serve()


if __name__ == "__main__":
    main()
