"""Many requests, one computation, one answer each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

Arrays = Mapping[str, npt.NDArray[Any]]
Compute = Callable[[Any, Sequence[str]], Any]
"""(input name -> [n, ...], wanted output names) -> output name -> [n, ...]"""


class Joint(NamedTuple):
    """How requests' tensors become one batch and its answers tensors again."""

    read: Callable[[Any], Any]
    """Triton's tensor -> array [n, ...]"""
    join: Callable[[list[Any]], Any]
    """arrays [n, ...] -> array [sum of n, ...]"""
    write: Callable[[str, Any], Any]
    """name, array [n, ...] -> Triton's tensor"""


ARRAYS = Joint(lambda tensor: tensor.as_numpy(), np.concatenate, lambda name, rows: pb_utils.Tensor(name, rows))
"""NumPy arrays on the host"""


def answer(requests: Sequence[Any], inputs: Sequence[str], compute: Compute, joint: Joint = ARRAYS) -> list[Any]:
    """One response for each request, computed together.

    Where the joint computation fails, every request is tried on its own, so that an error answers only the request that caused it.
    """
    try:
        return _answer_together(requests, inputs, compute, joint)
    except Exception as error:
        if len(requests) == 1:
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{type(error).__name__}: {error}"))]
        return [answer([request], inputs, compute, joint)[0] for request in requests]


def _answer_together(requests: Sequence[Any], inputs: Sequence[str], compute: Compute, joint: Joint) -> list[Any]:
    sent = [{tensor.name(): tensor for tensor in request.inputs()} for request in requests]
    arrays = {name: [joint.read(tensors[name]) for tensors in sent] for name in inputs}
    joined = {name: parts[0] if len(parts) == 1 else joint.join(parts) for name, parts in arrays.items()}
    wanted = [request.requested_output_names() for request in requests]
    results = compute(joined, sorted({name for names in wanted for name in names}))
    if len(requests) == 1:
        return [pb_utils.InferenceResponse([joint.write(name, results[name]) for name in wanted[0]])]
    responses, start = [], 0
    for names, part in zip(wanted, arrays[inputs[0]], strict=True):
        stop = start + len(part)
        responses.append(pb_utils.InferenceResponse([joint.write(name, results[name][start:stop]) for name in names]))
        start = stop
    return responses
