"""A whole guard in one process of Triton's Python backend: the ``single`` layout.

What the ensemble of the ``fused`` layout does in three models with a message between each two, in one: for machines where those messages
cost as much as the networks, as small networks on few cores do. It needs ONNX Runtime beside NumPy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .batching import Arrays, answer
from .scoring import IMAGE_PENULTIMATE, Scorer
from .session import open_session

LABEL = {"LOGITS"}


class TritonPythonModel:
    """IMAGE in; LOGITS, SCORE, P_VALUE, IS_MALICIOUS and RELEASE out."""

    def initialize(self, args: dict[str, str]) -> None:
        directory = Path(args["model_repository"], args["model_version"])
        self.scorer = Scorer.load(directory / "scorer.npz", int(args["model_version"]))
        self.memory = self.scorer.new_memory()
        self.autoencoder = open_session(directory / "autoencoder" / "model.onnx", threads=1)
        self.classifier = open_session(directory / "classifier" / "model.onnx", threads=1)
        self.beside = ThreadPoolExecutor(1)
        """for the image's own pass where one image is all there is: nothing waits then, and another core is likely free"""
        self.made = [output.name for output in self.autoencoder.get_outputs() if output.name in self.scorer.inputs]
        missing = set(self.scorer.inputs) - {*self.made, IMAGE_PENULTIMATE}
        if missing:
            raise ValueError(f"scorer.npz needs {sorted(missing)}, which autoencoder/model.onnx does not make")

    def compute(self, arrays: Arrays, wanted: Sequence[str]) -> Arrays:
        """IMAGE [n, C, H, W] -> [n, ...] for each output; the classifier alone where only the label is wanted."""
        images = dict(arrays)
        if LABEL.issuperset(wanted):
            return {"LOGITS": self.classifier.run(["LOGITS"], images)[0]}
        beside = self.beside.submit if len(images["IMAGE"]) == 1 else _now
        image = beside(self.classifier.run, ["LOGITS", "PENULTIMATE"], images)
        made = dict(zip(self.made, self.autoencoder.run(self.made, images), strict=True))
        logits, penultimate = image.result()
        return {"LOGITS": logits, **self.scorer.outputs({**made, IMAGE_PENULTIMATE: penultimate}, self.memory)}

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Requests for the label alone are answered apart, so that they cost no more beside others."""
        kinds = defaultdict(list)
        for place, request in enumerate(requests):
            kinds[LABEL.issuperset(request.requested_output_names())].append(place)
        answers: dict[int, Any] = {}
        for places in kinds.values():
            answers.update(zip(places, answer([requests[place] for place in places], ["IMAGE"], self.compute), strict=True))
        return [answers[place] for place in range(len(requests))]


def _now(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """The same as an executor's ``submit``, in this thread."""
    done: Future[Any] = Future()
    done.set_result(function(*arguments))
    return done
