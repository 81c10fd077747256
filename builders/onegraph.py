"""A guard in fewer graphs than it has passes: in one process of the Python backend, or in one graph and no process of ours at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from onnx import ModelProto

from noisec import contract
from noisec.builders.classifier import read_model
from noisec.builders.graphs import apart, beside, with_image_pass, with_scorer, without_repeats
from noisec.builders.passes import fused_passes
from noisec.builders.scorergraph import scorer_graph, verdict_graph
from noisec.builders.spec import GuardSpec
from noisec.python_backend.scorer.scoring import Scorer


def guard_graph(spec: GuardSpec, stages: Mapping[str, Path], scorer: Scorer) -> ModelProto:
    """IMAGE in; LOGITS and the verdict out.

    Args:
        stages: ``autoencoder`` and ``classifier`` -> folder with ``model.onnx``, arranged as the specification says

    Raises:
        NoisecError: a detector has no graph, the scorer has a memory, or the graphs do not hold together.
    """
    autoencoder, classifier = _read(stages)
    if spec.copies:
        passes = without_repeats(beside(*apart(autoencoder, classifier)))
    elif fused_passes(spec):
        passes = with_image_pass(autoencoder)
    else:
        passes = beside(autoencoder, classifier)
    return with_scorer(passes, verdict_graph(scorer), contract.OUTPUTS)


def process_graphs(spec: GuardSpec, stages: Mapping[str, Path], scorer: Scorer) -> dict[str, ModelProto]:
    """The graphs of a guard in one process that are not those of its stages: name -> graph.

    Passes of the classifier's copies are in ``image``, beside the image's own, whose first layers the amplified ones share, and not in the
    autoencoder's graph as they are where stages are models of their own. Without copies the image's pass is one with the others, and the
    scorer's graph is behind them in the same one.

    Args:
        stages: as for :func:`guard_graph`

    Raises:
        NoisecError: a detector has no graph, or the graphs do not hold together.
    """
    scores = scorer_graph(scorer)
    if spec.copies:
        autoencoder, image = apart(*_read(stages))
        return {"scorer": scores, "autoencoder": autoencoder, "image": image}
    if fused_passes(spec):
        autoencoder, _ = _read(stages)
        remembered = [contract.PASSES["image"]] if scorer.repeats else []
        return {"autoencoder": with_scorer(with_image_pass(autoencoder), scores, [contract.LOGITS, contract.SCORE, *remembered])}
    return {"scorer": scores}


def _read(stages: Mapping[str, Path]) -> tuple[ModelProto, ModelProto]:
    return read_model(stages["autoencoder"] / "model.onnx"), read_model(stages["classifier"] / "model.onnx")
