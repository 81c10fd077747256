"""Input that no audit can judge, refused in words."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from noisec.builders.images import Images
from noisec.builders.train import DEVICE, placed
from noisec.errors import NoisecError

FEWEST = 40
"""images, whatever the number of classes"""
FEWEST_A_CLASS = 4
"""images for each class, on average"""
SHOWN = 300
"""characters of a foreign error message"""


def check(network: nn.Module, images: Images, classes: int) -> None:
    """Refuse what cannot be audited or repaired.

    Args:
        network: images float32 [n, C, H, W] in [0, 1] -> logits [n, classes], or a tuple that begins with them

    Raises:
        NoisecError: labels, classes, images or weights are not as they must be.
    """
    check_labels(images, classes)
    check_weights(network)
    check_answer(network, images, classes)


def check_labels(images: Images, classes: int) -> None:
    """Refuse images that say too little about a classifier.

    Raises:
        NoisecError: labels are missing, out of range, or all the same; or there are too few images.
    """
    labels = np.asarray(images.labels)
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise NoisecError("audit: the images have no labels; it needs clean images, each with its class number")
    if len(labels) and labels.min() < 0:
        raise NoisecError(
            f"audit: {int((labels < 0).sum())} of {len(labels)} images have no label (a negative one); label them or leave them out"
        )
    if len(labels) and labels.max() >= classes:
        raise NoisecError(f"audit: labels go up to {labels.max()}; a classifier of {classes} classes has labels from 0 to {classes - 1}")
    needed = max(FEWEST, FEWEST_A_CLASS * classes)
    if len(labels) < needed:
        raise NoisecError(f"audit: {len(labels)} images are too few for {classes} classes; give at least {needed} clean, labelled images")
    if len(np.unique(labels)) < 2:
        raise NoisecError(f"audit: all {len(labels)} images are of class {labels[0]}; give images of every class")


def check_weights(network: nn.Module) -> None:
    """Refuse weights that gradients cannot be taken through.

    Raises:
        NoisecError: parameters or buffers are not float32, or not finite, or there are none.
    """
    tensors = [*network.named_parameters(), *network.named_buffers()]
    floating = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
    if not floating:
        raise NoisecError("audit: the classifier has no floating-point weights; give the float32 module, before it was quantised")
    for name, tensor in floating:
        if tensor.dtype != torch.float32:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise NoisecError(f"audit: the classifier's {name} is {kind}; the audit takes gradients in float32: give network.float()")
        if not bool(torch.isfinite(tensor).all()):
            raise NoisecError(f"audit: the classifier's {name} holds NaN or infinite values; load its weights again or train it anew")


def check_answer(network: nn.Module, images: Images, classes: int) -> None:
    """Refuse a classifier that does not take these images or has another number of classes.

    Raises:
        NoisecError: it does not run, or answers with another shape.
    """
    try:
        with torch.no_grad():
            shape = tuple(logits_of(frozen(network)(tensors(images[:2])[0])).shape)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:SHOWN]}"
        raise NoisecError(f"audit: the classifier does not run on images of {list(images.shape)}: {text}") from error
    if len(shape) != 2:
        raise NoisecError(f"audit: the classifier answers 2 images with shape {list(shape)}; expected logits [2, {classes}]")
    if shape[1] != classes:
        raise NoisecError(
            f"audit: the classifier has {shape[1]} classes, the data {classes}; give images labelled as the classifier labels them"
        )


def logits_of(answer: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The logits [n, classes] of a classifier that returns them alone or first."""
    return answer[0] if isinstance(answer, (tuple, list)) else answer


def frozen(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode, on the computing device, without gradients for its parameters: the caller's module is never touched."""
    return placed(copy.deepcopy(network).eval().requires_grad_(False))


def tensors(images: Images) -> tuple[Tensor, Tensor]:
    """Pixels float32 [n, C, H, W] in [0, 1] and labels int64 [n], on the computing device."""
    return torch.from_numpy(images.floats()).to(DEVICE), torch.from_numpy(np.asarray(images.labels, dtype=np.int64)).to(DEVICE)


def pieces(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """The rows in order, in the fewest pieces of at most ``size`` rows, of nearly equal length: batch statistics need no tiny last one."""
    return rows.tensor_split(max(1, -(-len(rows) // size)))
