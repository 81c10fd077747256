"""How well a classifier does its work, and its attacker's."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from noisec.builders.audit.checks import frozen, logits_of, tensors
from noisec.builders.audit.triggers import Trigger
from noisec.builders.images import Images


def predictions(network: nn.Module, images: Images) -> npt.NDArray[np.int64]:
    """The labels that a classifier gives: int64 [n]."""
    copied = frozen(network)
    with torch.no_grad():
        return np.concatenate([logits_of(copied(tensors(batch)[0])).argmax(1).cpu().numpy() for batch in images.batches()])


def accuracy(network: nn.Module, images: Images) -> float:
    """Share of images that get their true label."""
    return float((predictions(network, images) == images.labels).mean())


def attack_success(network: nn.Module, images: Images, trigger: Trigger, target: int, seed: int = 0) -> float:
    """Share of images of other classes that the trigger sends to the target class."""
    others = images[np.flatnonzero(images.labels != target)]
    return float((predictions(network, Images.whole(trigger.apply(others.pixels, seed), others.labels)) == target).mean())
