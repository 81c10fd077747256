"""The guard as one differentiable function: what an attacker who holds its weights attacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from noisec import contract
from noisec.benchmarks.detection.subject import Subject
from noisec.builders.scorergraph import scorer_graph
from noisec.builders.torchgraph import TorchGraph
from noisec.python_backend.scorer.scoring import Scorer

Whole = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images float32 [n, C, H, W] in [0, 1] -> logits [n, C] and fused score [n] in nats, with gradients"""


def differentiable(scorer: Scorer, device: str = "cpu") -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A fitted scorer with gradients: name -> float32 [n, d] or [n, 1], as the scorer's ``inputs`` list them, gives the fused score,
    float32 [n] in nats, NaN where the input is no image. None flows through the choice of noise level and predicted class.

    Args:
        scorer: the artefact that serves

    Raises:
        NoisecError: a detector's kind has no formula as a graph.
    """
    graph = TorchGraph(scorer_graph(scorer), device)
    return lambda tensors: graph(tensors)[0][:, 0]


def compose(stages: Mapping[str, Path], scorer: Scorer, noise_source: str, device: str = "cpu") -> Whole:
    """Network stages and scorer as one function: the classifier passes are those that the scorer reads, and the image's for the logits.

    Args:
        stages: ``autoencoder`` and ``classifier`` -> folder with ``model.onnx``
        noise_source: the autoencoder stage's output that the noise pass feeds to the classifier stage
        device: where everything is computed; images and answers stay on the images' own

    Raises:
        NoisecError: a stage has an operation, or the scorer a detector, that has no gradients here.
    """
    graphs = {stage: TorchGraph(folder / "model.onnx", device) for stage, folder in stages.items()}
    score = differentiable(scorer, device)
    passes = [one for one, name in contract.PASSES.items() if one not in contract.COPIES and (name in scorer.inputs or one == "image")]

    def run(stage: str, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(graphs[stage].outputs, graphs[stage](images), strict=True))

    def whole(images: Tensor) -> tuple[Tensor, Tensor]:
        moved = images.to(device)
        made = run("autoencoder", moved)
        sources = {"image": moved, "noise": made[noise_source], "reconstruction": made[contract.RECONSTRUCTION]}
        answers = {one: run("classifier", sources[one]) for one in passes}
        activations = {contract.PASSES[one]: answer[contract.PENULTIMATE] for one, answer in answers.items()}
        return answers["image"][contract.LOGITS].to(images.device), score({**made, **activations}).to(images.device)

    return whole


def whole(subject: Subject, device: str = "cpu") -> Whole:
    """A guard under test, from image to logits and score, with gradients."""
    return compose(subject.stages, subject.scorer, subject.spec.noise_source, device)
