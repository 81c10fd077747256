"""MLServer: a custom runtime for the v2 protocol."""

from __future__ import annotations

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from .compute import ANSWERS, Task


class GuardRuntime(MLModel):  # type: ignore[misc]
    """IMAGE -> ``ANSWERS``."""

    async def load(self) -> bool:
        self.guard = Task.read().load()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        answers = self.guard(NumpyCodec.decode_input(payload.inputs[0]))
        outputs = [NumpyCodec.encode_output(name, answers[name][:, None]) for name in ANSWERS]
        return InferenceResponse(model_name=self.name, outputs=outputs)
