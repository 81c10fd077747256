"""A hardened copy: a second look at the image by a classifier that small changes do not lead astray.

The copy goes on from the classifier's own weights and learns to answer small changes of an image, those that move it most, as the
classifier answers the image itself: adversarial training (Madry et al. 2018) with one step of the gradient from a random start (Wong et
al. 2020), which is enough where a trained classifier is trained on (Zhao and Bagchi 2025, arXiv 2506.22602). Labels are not asked for.
What comes after the penultimate activations stays as it is, so that those of both classifiers mean the same; where they disagree, a small
change has moved one of them (decision mismatch of two models, Monteiro et al. 2018, arXiv 1802.07770). Like amplified passes it is a part
of the autoencoder stage.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from noisec import contract
from noisec.builders.classifier import read_model
from noisec.builders.graphs import save_model
from noisec.builders.images import Floats, Images
from noisec.builders.progress import console
from noisec.builders.spec import HardenedSpec
from noisec.builders.stages import in_process
from noisec.builders.torchgraph import Step, TorchGraph
from noisec.builders.train import DEVICE, Classify, Schedule, load_network, lowered, moved, optimise
from noisec.errors import NoisecError

LEARNING = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization")
"""operations whose weights and biases are trained"""
STEP = 1.25
"""of the gradient, in units of the largest change (Wong et al. 2020)"""
SAMPLE, LEAST_AGREEMENT = 1000, 0.5
"""clean images on which the copy is compared with the classifier, and the share of equal labels below which it is no copy"""
HARDENED = "hardened.json"
REMEDY = "leave detectors with view 'hardened' out"


class Copy(nn.Module):
    """A classifier stage's graph with weights of its own up to the penultimate activations.

    Args:
        stage: folder with ``model.onnx``, in fp32

    Raises:
        NoisecError: the graph has an operation without gradients, or no weights that can be trained.
    """

    def __init__(self, stage: Path) -> None:
        super().__init__()
        try:
            self._graph = TorchGraph(stage / "model.onnx", DEVICE.type)
        except NoisecError as error:
            raise NoisecError(f"the classifier cannot be hardened; {REMEDY}: {error}") from error
        constants = self._graph.constants
        named = dict.fromkeys(name for step in _before_penultimate(self._graph) if step.kind in LEARNING for name in step.inputs[1:3])
        self.names = [name for name in named if isinstance(constants.get(name), Tensor)]
        """of the weights, as the graph has them"""
        if not self.names or any(constants[name].dtype != torch.float32 for name in self.names):
            raise NoisecError(f"the classifier has no float32 weights before its penultimate activations that can be trained: {REMEDY}")
        self.weights = nn.ParameterList(nn.Parameter(constants[name].clone()) for name in self.names)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [n, C, H, W] -> logits float32 [n, classes]"""
        answers = self._graph(images, dict(zip(self.names, self.weights, strict=True)))
        return dict(zip(self._graph.outputs, answers, strict=True))[contract.LOGITS]


def _before_penultimate(graph: TorchGraph) -> list[Step]:
    """The nodes that the penultimate activations depend on, in order."""
    needed, found = {contract.PENULTIMATE}, list[Step]()
    for step in reversed(graph.steps):
        if needed.intersection(step.outputs):
            needed.update(step.inputs)
            found.append(step)
    return found[::-1]


def worst_changes(copy: nn.Module, images: Tensor, wanted: Tensor, sizes: Tensor) -> Tensor:
    """Images changed by one step along the sign of the gradient from a random start, so that the copy's answers leave those wanted.

    Args:
        images: float32 [n, C, H, W] in [0, 1]
        wanted: probabilities [n, classes]
        sizes: [n, 1, 1, 1], the largest change of each image's pixels
    """
    start = (sizes * (2 * torch.rand_like(images) - 1)).requires_grad_(True)
    (slope,) = torch.autograd.grad(divergence(copy((images + start).clamp(0, 1)), wanted), start)
    change = (start.detach() + STEP * sizes * slope.sign()).clamp(-sizes, sizes)
    return (images + change).clamp(0, 1)


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of an answer's softmax from probabilities [n, classes], in nats."""
    return nn.functional.kl_div(logits.log_softmax(dim=1), wanted, reduction="batchmean")


def loss_of(copy: nn.Module, classify: Classify, eps: float, images: Tensor) -> Tensor:
    """What the copy's answers differ by from the classifier's to the same images, each moved and mirrored at random: on half of them as
    they then are, and on the other half changed for the worst."""
    images = moved(images)
    with torch.no_grad():
        wanted = classify(images)[contract.LOGITS].softmax(dim=1)
    half = -(-len(images) // 2)
    sizes = eps * torch.rand(half, 1, 1, 1, device=images.device)
    changed = worst_changes(copy, images[:half], wanted[:half], sizes)
    answers = copy(torch.cat([changed, images[half:]]))
    calm = divergence(answers[half:], wanted[half:]) if half < len(images) else answers.new_zeros(())
    return divergence(answers[:half], wanted[:half]) + calm


def train_copy(spec: HardenedSpec, classifier: Path, images: Images, seed: int, folder: Path) -> None:
    """Train a classifier stage's hardened copy and write its weights into ``folder``.

    Args:
        classifier: folder with ``model.onnx``, in fp32
        images: to train on, moved and mirrored; their labels are not looked at

    Raises:
        NoisecError: the graph cannot be trained.
    """
    torch.manual_seed(seed)
    copy, classify = Copy(classifier), TorchGraph(classifier / "model.onnx", DEVICE.type).named
    schedule = Schedule(spec.epochs, spec.batch_size, spec.learning_rate)

    def loss(batch: Tensor, labels: Tensor) -> Tensor:
        return loss_of(copy, classify, spec.eps, batch)

    optimise(copy, images, lowered(loss) if spec.mixed_precision else loss, schedule, folder, "hardening classifier")


def export_copy(spec: HardenedSpec, classifier: Path, weights: Path, clean: Images, folder: Path) -> None:
    """Write a trained copy as a stage, and how it compares.

    Args:
        classifier: folder with ``model.onnx``
        weights: folder of :func:`train_copy`
        clean: images that it was not trained on, to compare with the classifier on
        folder: gets ``model.onnx``, and ``hardened.json`` with the share of clean images to which the copy gives the classifier's label

    Raises:
        NoisecError: the copy has come to say something else than the classifier.
    """
    copy = Copy(classifier)
    load_network(copy, weights)
    arrays = {name: weight.detach().cpu().numpy() for name, weight in zip(copy.names, copy.weights, strict=True)}
    save_model(with_weights(read_model(classifier / "model.onnx"), arrays), folder)
    agreement = float(np.mean(_labels(classifier, clean[:SAMPLE]) == _labels(folder, clean[:SAMPLE])))
    finite = all(np.isfinite(array).all() for array in arrays.values())
    if not finite or agreement < LEAST_AGREEMENT:
        raise NoisecError(
            f"hardened copy: the classifier's label for {100 * agreement:.1f} % of clean images, {100 * LEAST_AGREEMENT:.0f} % are the "
            f"least{'' if finite else ', and weights that are not finite'}: lower hardened.eps or learning_rate, or give more epochs"
        )
    console.print(f"  hardened copy: the classifier's label for {100 * agreement:.1f} % of clean images")
    (folder / HARDENED).write_text(json.dumps({"eps": spec.eps, "epochs": spec.epochs, "agreement": agreement}))


def _labels(stage: Path, images: Images) -> npt.NDArray[np.int64]:
    ask, name = in_process({"classifier": stage}), contract.LOGITS
    return np.concatenate([ask("classifier", batch.floats(), [name])[name].argmax(axis=1) for batch in images.batches()])


def with_weights(model: ModelProto, weights: dict[str, Floats]) -> ModelProto:
    """The same graph with other weights, by name, where an initializer or a Constant held the old ones.

    Raises:
        NoisecError: the graph has no weights of such a name.
    """
    left = dict(weights)
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.initializer[:], result.graph.node[:]
    for tensor in model.graph.initializer:
        new = left.pop(tensor.name, None)
        result.graph.initializer.append(tensor if new is None else numpy_helper.from_array(new, tensor.name))
    for node in model.graph.node:
        new = left.pop(node.output[0], None) if node.op_type == "Constant" else None
        if new is None:
            result.graph.node.append(node)
        else:
            result.graph.initializer.append(numpy_helper.from_array(new, node.output[0]))
    if left:
        raise NoisecError(f"the classifier's graph holds no weights {', '.join(left)}: {REMEDY}")
    return result
