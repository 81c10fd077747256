"""What both clients send and how they read the answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton_grpc
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from noisec import contract
from noisec.clients.results import Verdicts
from noisec.errors import NoisecError

Pixels = npt.NDArray[np.float32 | np.uint8]
"""float32 in [0, 1], or uint8 for a guard that takes bytes"""


@dataclass(frozen=True)
class GuardInterface:
    """The part of a guard's configuration that a client needs, read from the server."""

    guard: str
    shape: tuple[int, int, int]
    """(C, H, W)"""
    max_batch_size: int
    class_names: tuple[str, ...]
    takes_bytes: bool = False
    """whether IMAGE is uint8 in [0, 255] instead of float32 in [0, 1]"""
    label_model: str = ""
    """Triton model that is asked where only labels are wanted; the guard itself where it is empty"""

    @classmethod
    def from_config(cls, guard: str, config: Any) -> GuardInterface:
        """From the ``ModelConfig`` message that the server answers.

        Raises:
            NoisecError: the model is no guard.
        """
        inputs = {entry.name: tuple(entry.dims) for entry in config.input}
        missing = set(contract.OUTPUTS) - {entry.name for entry in config.output}
        if set(inputs) != {contract.IMAGE} or missing:
            raise NoisecError(
                f"{guard!r} is not a guard: its inputs are {sorted(inputs)}, and of a guard's outputs it lacks {sorted(missing)}"
            )
        channels, height, width = inputs[contract.IMAGE]
        names, label_model = (_parameter(config, key) for key in ("class_names", contract.LABEL_MODEL))
        takes_bytes = config.input[0].data_type == model_config_pb2.TYPE_UINT8
        classes = tuple(names.split("\n")) if names else ()
        return cls(guard, (channels, height, width), config.max_batch_size, classes, takes_bytes, label_model)

    def name_of(self, label: int) -> str:
        """Name of a class, or its number."""
        return self.class_names[label] if label < len(self.class_names) else str(label)

    def prepare(self, images: npt.NDArray[Any]) -> Pixels:
        """Images as the guard wants them.

        Args:
            images: [n, C, H, W] or one image [C, H, W]; uint8, or floats in [0, 1] where the guard takes floats

        Returns:
            float32 [n, C, H, W] in [0, 1]; uint8 for a guard that takes bytes

        Raises:
            NoisecError: shape, dtype or range is wrong; nothing has been sent.
        """
        batch = images[None] if images.ndim == 3 else images
        if batch.shape[1:] != self.shape or batch.ndim != 4:
            raise NoisecError(f"images are {list(images.shape)}; {self.guard} takes [n, {', '.join(map(str, self.shape))}] or one image")
        if len(batch) == 0:
            raise NoisecError("no images: the batch is empty")
        if self.takes_bytes:
            if batch.dtype != np.uint8:
                raise NoisecError(f"images are {batch.dtype}; {self.guard} takes bytes: send the pixels as uint8 in [0, 255]")
            return np.ascontiguousarray(batch)
        if batch.dtype == np.uint8:
            return batch.astype(np.float32) / np.float32(255)
        if not np.issubdtype(batch.dtype, np.floating):
            raise NoisecError(f"images are {batch.dtype}; send uint8 in [0, 255] or floats in [0, 1]")
        floats = np.ascontiguousarray(batch, dtype=np.float32)
        low, high = -contract.PIXEL_TOLERANCE, 1 + contract.PIXEL_TOLERANCE
        outside = ~((floats >= low) & (floats <= high)).all(axis=(1, 2, 3))
        if outside.any():
            first = int(np.argmax(outside))
            raise NoisecError(
                f"{int(outside.sum())} of {len(floats)} images have pixels outside [0, 1] or NaN (the first is image {first}, "
                f"{np.min(floats[first])} to {np.max(floats[first])}); divide by 255, or send uint8"
            )
        return floats

    def batches(self, images: Pixels) -> Iterator[Pixels]:
        """Views of at most the server's largest batch."""
        size = max(1, self.max_batch_size)
        return (images[start : start + size] for start in range(0, len(images), size))


def _parameter(config: Any, key: str) -> str:
    """A parameter of a model's configuration; empty where it has none of that name."""
    return str(config.parameters[key].string_value) if key in config.parameters else ""


def wanted_outputs(labels_only: bool) -> tuple[str, ...]:
    return (contract.LOGITS,) if labels_only else contract.OUTPUTS


def infer_arguments(interface: GuardInterface, batch: Pixels, outputs: tuple[str, ...]) -> dict[str, Any]:
    """``model_name``, ``inputs`` and ``outputs`` of tritonclient's ``infer``."""
    model = interface.label_model if outputs == (contract.LOGITS,) and interface.label_model else interface.guard
    image = triton_grpc.InferInput(contract.IMAGE, batch.shape, "UINT8" if batch.dtype == np.uint8 else "FP32").set_data_from_numpy(batch)
    return {"model_name": model, "inputs": [image], "outputs": [triton_grpc.InferRequestedOutput(name) for name in outputs]}


def read_answer(result: Any, outputs: tuple[str, ...]) -> Verdicts:
    """A Triton result as verdicts.

    Raises:
        NoisecError: a requested output is missing or empty. Nothing is ever filled in: a missing verdict is not a benign one.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name in outputs:
        try:
            array = result.as_numpy(name)
        except ValueError as error:  # fewer values than its shape says
            raise NoisecError(
                f"the server answered {name} without its values ({error}), as the Python backend of Triton 24.10 does where it finds "
                "NumPy 2: give it a NumPy below 2"
            ) from error
        if array is None:
            raise NoisecError(f"the server answered without {name}, which was asked for; is its response cache on? It has to be off")
        arrays[name] = array if name == contract.LOGITS else array[:, 0]
    logits = arrays[contract.LOGITS]
    return Verdicts(np.argmax(logits, axis=1), logits, *(arrays.get(name) for name in contract.VERDICT))


def refusal(error: InferenceServerException, timeout: float, images: int) -> str:
    """Why a request of so many images has no answer.

    Args:
        timeout: seconds that it was given
    """
    if error.status() == "StatusCode.DEADLINE_EXCEEDED":
        return f"no answer to {images} images within timeout = {timeout:g} s: give a longer one, or send fewer images at a time"
    return str(error.message())
