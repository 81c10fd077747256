"""LitServe: one file, a class with ``setup`` and ``predict``.

Without postponed annotations: LitServe reads those of ``decode_request``.
"""

from typing import Any

import litserve
import numpy as np
import numpy.typing as npt

from .compute import Computation, Task, columns

Images = npt.NDArray[np.float32]


class GuardApi(litserve.LitAPI):  # type: ignore[misc]
    """``{"images": [base64, ...]}`` -> rows of ``ANSWERS``."""

    guard: Computation

    def setup(self, device: str) -> None:
        self.guard = Task.read().load()

    def decode_request(self, request: dict[str, Any]) -> Images:
        return self.guard.decode(request["images"])

    def batch(self, inputs: list[Images]) -> list[Images]:
        return inputs

    def predict(self, inputs: list[Images] | Images) -> list[Any] | Any:
        """Requests in a list where LitServe joins them, else one."""
        if isinstance(inputs, list):
            return [columns(answers) for answers in self.guard.together(inputs)]
        return columns(self.guard(inputs))

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: Any) -> Any:
        return output.tolist()


def main() -> None:
    task = Task.read()
    api = GuardApi(max_batch_size=task.batch, batch_timeout=task.delay_ms / 1000)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=task.workers, fast_queue=True)
    server.run(host="127.0.0.1", port=task.ports[0], generate_client_file=False, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
