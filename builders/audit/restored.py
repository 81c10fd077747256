"""An ONNX classifier as a PyTorch module that the audit can put noise on: with the batch norms that its export has folded away.

An export for inference multiplies each batch norm into the convolution before it. What the batch norm gave, that convolution then gives:
values of mean beta and standard deviation abs(gamma) over the training images. Clean images therefore tell both again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from noisec import contract
from noisec.builders.audit.checks import pieces
from noisec.builders.images import Floats, Images
from noisec.builders.torchgraph import Step, TorchGraph
from noisec.errors import NoisecError
from noisec.python_backend.scorer.session import open_session

OBSERVED = 500
"""clean images that means and deviations are taken from, at most"""
CHUNK = 50
"""of them at a time: a graph keeps every value that it computes"""
COMPARED = 8
MAX_DIFFERENCE = 1e-3
"""of logits from ONNX Runtime's, relative to their size"""
CONVOLUTIONS, LINEAR = ("Conv", "ConvTranspose"), ("Gemm", "MatMul")
PLACES = ("BatchNormalization",), CONVOLUTIONS, LINEAR
"""operations behind which batch norms belong: the first of these groups that a graph has"""


class Restored(nn.Module):
    """A graph with a batch norm behind each batch norm; where it has none, behind each convolution; where it has none of those either,
    behind each linear layer; but not behind the layer that makes the logits. In evaluation mode they change nothing: the module answers
    what the graph answers.

    Args:
        stage: ``model.onnx`` of a classifier stage
        images: clean ones

    Raises:
        NoisecError: the graph has an operation without a counterpart in torch, or no place for a batch norm, or the module answers
            something else.
    """

    def __init__(self, stage: Path, images: Images) -> None:
        super().__init__()
        self.graph = TorchGraph(stage)
        self.weights = [name for name, value in self.graph.constants.items() if isinstance(value, Tensor)]
        for index, name in enumerate(self.weights):
            self.register_buffer(f"weight{index}", self.graph.constants[name])
        self.places = {output: str(index) for index, output in enumerate(places(self.graph.steps, stage))}
        self.norms = nn.ModuleDict()
        with torch.no_grad():
            for chunk in pieces(torch.from_numpy(images[:OBSERVED].floats()), CHUNK):
                self.graph(chunk, after=self._observe)
            for norm in self.norms.values():
                assert isinstance(norm, _BatchNorm)
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.weight.copy_((norm.running_var + norm.eps).sqrt())
                norm.bias.copy_(norm.running_mean)
        self.eval()
        self._compare(stage, images[:COMPARED].floats())

    def _compare(self, stage: Path, pixels: Floats) -> None:
        wanted = open_session(stage).run([contract.LOGITS], {contract.IMAGE: pixels})[0]
        with torch.no_grad():
            difference = float(np.abs(self(torch.from_numpy(pixels)).numpy() - wanted).max())
        if not difference <= MAX_DIFFERENCE * max(1.0, float(np.abs(wanted).max())):
            raise NoisecError(
                f"audit: as torch operations the classifier's logits differ by {difference:.2g} from ONNX Runtime's; "
                'give the PyTorch module with classifier.factory, or set audit = "off"'
            )

    def forward(self, images: Tensor) -> Tensor:
        """float32 [n, C, H, W] -> logits [n, classes]"""
        weights = {name: getattr(self, f"weight{index}") for index, name in enumerate(self.weights)}
        answer = self.graph(images, weights, self._normalise)
        return answer[self.graph.outputs.index(contract.LOGITS)]

    def _normalise(self, step: Step, made: Tensor) -> Tensor:
        if step.outputs[0] not in self.places:
            return made
        normalised: Tensor = self.norms[self.places[step.outputs[0]]](made)
        return normalised

    def _observe(self, step: Step, made: Tensor) -> Tensor:
        """Add to the statistics of a place, and leave what it made as it is."""
        place = self.places.get(step.outputs[0])
        if place is not None:
            if made.ndim not in (2, 4):
                raise NoisecError(f"audit: {step.kind} makes values of shape {list(made.shape)}; noise goes on feature maps and vectors")
            if place not in self.norms:
                kind = nn.BatchNorm2d if made.ndim == 4 else nn.BatchNorm1d
                self.norms[place] = kind(made.shape[1], momentum=None)  # statistics are the mean over all batches
            self.norms[place](made)
        return made


def places(steps: list[Step], stage: Path) -> list[str]:
    """The values behind which batch norms belong, by name.

    Raises:
        NoisecError: there are none.
    """
    hidden = [step for step in steps if step.kind in (*CONVOLUTIONS, *LINEAR)][:-1]  # the last one makes the logits
    for kinds in PLACES:
        found = [step.outputs[0] for step in steps if step.kind in kinds and (step.kind == "BatchNormalization" or step in hidden)]
        if found:
            return found
    raise NoisecError(f"audit: {stage}: has no batch norm, convolution or hidden linear layer to put noise on")
