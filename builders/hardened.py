"""A hardened copy: a second look at the image by a classifier that small changes do not lead astray.

The copy goes on from the classifier's own weights and learns to answer small changes of an image, those that move it most, as the
classifier answers the image itself: adversarial training (Madry et al. 2018) with one step of the gradient from a random start (Wong et
al. 2020), which is enough where a trained classifier is trained on (Zhao and Bagchi 2025, arXiv 2506.22602). Labels are not asked for.
The last layer stays as it is, so that both classifiers' penultimate activations mean the same; where they disagree, a small change has
moved one of them (decision mismatch of two models, Monteiro et al. 2018, arXiv 1802.07770). Like amplified passes it is a part of the
autoencoder stage.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from torch import Tensor, nn

from noisec import contract
from noisec.builders.classifier import Graph, find_head, read_model
from noisec.builders.graphs import save_model
from noisec.builders.images import Floats, Images
from noisec.builders.progress import console
from noisec.builders.spec import HardenedSpec
from noisec.builders.stages import in_process
from noisec.builders.torchgraph import TorchGraph
from noisec.builders.train import DEVICE, Classify, Schedule, load_network, moved, optimise
from noisec.errors import NoisecError

LEARNING = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization")
"""operations whose weights and biases are trained"""
STEP = 1.25
"""of the gradient, in units of the largest change (Wong et al. 2020)"""
SAMPLE = 1000
"""clean images on which the copy is compared with the classifier"""
HARDENED = "hardened.json"


class Copy(nn.Module):
    """A classifier stage's graph with weights of its own, all but the last layer's.

    Args:
        stage: folder with ``model.onnx``

    Raises:
        NoisecError: nothing before the last layer can be trained, or the graph has an operation without gradients.
    """

    def __init__(self, stage: Path) -> None:
        super().__init__()
        head = find_head(Graph(read_model(stage / "model.onnx")), contract.LOGITS)
        self._graph = TorchGraph(stage / "model.onnx", DEVICE.type)
        named = dict.fromkeys(name for step in self._graph.steps if step.kind in LEARNING for name in step.inputs[1:3])
        kept = set(head.input if head else ())
        self.names = [name for name in named if name not in kept and isinstance(self._graph.constants.get(name), Tensor)]
        """of the weights, as the graph has them"""
        if not self.names:
            raise NoisecError("no layer before the classifier's last one can be trained: leave detectors with view 'hardened' out")
        self.weights = nn.ParameterList(nn.Parameter(self._graph.constants[name].clone()) for name in self.names)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [n, C, H, W] -> logits float32 [n, classes]"""
        answers = self._graph(images, dict(zip(self.names, self.weights, strict=True)))
        return dict(zip(self._graph.outputs, answers, strict=True))[contract.LOGITS]


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
    """What the copy's answers differ by from the classifier's: on half of the images as they are, and on half changed for the worst."""
    images = moved(images)
    with torch.no_grad():
        wanted = classify(images)[contract.LOGITS].softmax(dim=1)
    half = -(-len(images) // 2)
    sizes = eps * torch.rand(half, 1, 1, 1, device=images.device)
    changed = worst_changes(copy, images[:half], wanted[:half], sizes)
    answers = copy(torch.cat([changed, images[half:]]))
    calm = divergence(answers[half:], wanted[half:]) if half < len(images) else answers.new_zeros(())
    return divergence(answers[:half], wanted[:half]) + calm


def harden(spec: HardenedSpec, classifier: Path, images: Images, clean: Images, seed: int, folder: Path) -> None:
    """Train a classifier stage's hardened copy, and write it and how it compares.

    Args:
        classifier: folder with ``model.onnx``, in fp32
        images: to train on; their labels are not looked at
        clean: others, to compare on
        folder: gets ``model.onnx``, and ``hardened.json`` with the share of clean images to which the copy gives the classifier's label

    Raises:
        NoisecError: the graph cannot be trained.
    """
    torch.manual_seed(seed)
    copy, classify = Copy(classifier), TorchGraph(classifier / "model.onnx", DEVICE.type).named
    schedule = Schedule(spec.epochs, spec.batch_size, spec.learning_rate)
    optimise(copy, images, lambda batch, labels: loss_of(copy, classify, spec.eps, batch), schedule, folder, "hardening classifier")
    load_network(copy, folder)
    weights = {name: weight.detach().cpu().numpy() for name, weight in zip(copy.names, copy.weights, strict=True)}
    save_model(with_weights(read_model(classifier / "model.onnx"), weights), folder)
    label = partial(_labels, images=clean[:SAMPLE])
    agreement = float(np.mean(label(classifier) == label(folder)))
    console.print(f"  hardened copy: the classifier's label for {100 * agreement:.1f} % of clean images")
    (folder / HARDENED).write_text(json.dumps({"eps": spec.eps, "epochs": spec.epochs, "agreement": agreement}))


def _labels(stage: Path, images: Images) -> npt.NDArray[np.int64]:
    ask, name = in_process({"classifier": stage}), contract.LOGITS
    return np.concatenate([ask("classifier", batch.floats(), [name])[name].argmax(axis=1) for batch in images.batches()])


def with_weights(model: ModelProto, weights: dict[str, Floats]) -> ModelProto:
    """The same graph with other weights, by name, where an initializer or a Constant held the old ones."""
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.initializer[:], result.graph.node[:]
    result.graph.initializer.extend(_tensor(weights, tensor) for tensor in model.graph.initializer)
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] in weights:
            result.graph.initializer.append(numpy_helper.from_array(weights[node.output[0]], node.output[0]))
        else:
            result.graph.node.append(node)
    return result


def _tensor(weights: dict[str, Floats], tensor: TensorProto) -> TensorProto:
    return numpy_helper.from_array(weights[tensor.name], tensor.name) if tensor.name in weights else tensor
