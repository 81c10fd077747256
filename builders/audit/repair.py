"""Taking a backdoor out: fine-tuning that keeps the classes under neuron noise (BAN section 3.4) or, where an audit suspects a target
class, on images that lean towards it.

Neuron noise finds the neurons that clean images are most sensitive to, which are not always the backdoor's. The suspected target says
more: images moved towards it by a small change take the backdoor's shortcut, and learning their true labels closes it (adversarial
unlearning as of Zeng et al. 2022 and Wei et al. 2023, who have no suspect). Both together leave more of a backdoor than the second alone.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from noisec.builders.audit.checks import check, logits_of, pieces, tensors
from noisec.builders.audit.neurons import adversarial_noise, noisy_logits
from noisec.builders.images import Images
from noisec.builders.progress import bar
from noisec.builders.train import DEVICE, placed
from noisec.errors import NoisecError


@dataclass(frozen=True)
class RepairSettings:
    """The paper's settings, but that the learning rate falls; they are meant for 5 % of the training data, clean."""

    epochs: int = 25
    batch_size: int = 128
    learning_rate: float = 0.005
    """at the start; it falls to 0 along half a cosine, which gives back clean accuracy"""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    noise_weight: float = 0.5
    """weight of the loss under noise"""
    eps: float = 0.3
    """largest relative change of a neuron"""
    moved_weight: float = 0.2
    """weight of the loss on images moved towards the suspected target"""
    bound: float = 0.1
    """largest change of a pixel in [0, 1] with which they are moved"""
    moves: int = 3
    """steps of the gradient's sign that move them, of half the bound each"""
    seed: int = 0


def repair(
    network: nn.Module, images: Images, classes: int, settings: RepairSettings | None = None, target: int | None = None
) -> nn.Module:
    """A repaired copy of a classifier, in evaluation mode, on the CPU; the one that is given is not changed.

    Without a target it minimises CE(clean) + noise_weight CE(under one-step adversarial neuron noise), which unlearns the neurons that a
    backdoor hangs on; running statistics of batch norms learn from clean passes alone. With one it minimises CE(clean) + moved_weight
    CE(moved towards the target) of clean and moved images in one pass: with batch statistics of their own, moved images would be learnt as
    another kind of image, and the backdoor would stay.

    Args:
        images: clean and labelled
        target: the class that an audit suspects (`Evidence.suspect`); None repairs under neuron noise

    Raises:
        NoisecError: target, images or network cannot be used (`noisec.builders.audit.checks`).
    """
    settings = settings or RepairSettings()
    check(network, images, classes)
    if target is not None and not 0 <= target < classes:
        raise NoisecError(f"repair: target {target} is no class; the classifier's are 0 to {classes - 1}")
    repaired = placed(copy.deepcopy(network)).train().requires_grad_(True)
    optimiser = torch.optim.SGD(
        repaired.parameters(), lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    pixels, labels = tensors(images)
    steps = settings.epochs * len(pieces(pixels, settings.batch_size))
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with torch.random.fork_rng(devices=[]), bar("repairing", settings.epochs) as shown:
        torch.manual_seed(settings.seed)
        for epoch in range(settings.epochs):
            for rows in pieces(torch.randperm(len(pixels)).to(DEVICE), settings.batch_size):
                if len(rows) < 2:  # batch norm has no statistics of one image
                    continue
                loss = _loss(repaired, pixels[rows], labels[rows], target, settings)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                falling.step()
            shown.advance(f"loss {loss.item():.3f}, epoch {epoch + 1}")
    repaired.zero_grad(set_to_none=True)
    return repaired.cpu().eval()


def _loss(network: nn.Module, batch: Tensor, truth: Tensor, target: int | None, settings: RepairSettings) -> Tensor:
    entropy = nn.functional.cross_entropy
    if target is None:
        noise = adversarial_noise(network, batch, truth, settings.eps, steps=1, seed=int(torch.randint(2**31, ())))
        return entropy(logits_of(network(batch)), truth) + settings.noise_weight * entropy(noisy_logits(network, noise, batch), truth)
    moved = moved_towards(network, batch, target, settings.bound, settings.moves)
    logits = logits_of(network(torch.cat([batch, moved])))
    return entropy(logits[: len(batch)], truth) + settings.moved_weight * entropy(logits[len(batch) :], truth)


def moved_towards(network: nn.Module, images: Tensor, target: int, bound: float, steps: int) -> Tensor:
    """Images whose pixels are changed by up to ``bound`` so that the network, in evaluation mode, leans towards a class; its mode stays.

    Args:
        images: float32 [n, C, H, W] in [0, 1]
        steps: of bound / 2 along the gradient's sign

    Returns:
        float32 [n, C, H, W] in [0, 1]
    """
    wanted = torch.full((len(images),), target, device=images.device)
    was_training = network.training
    network.eval()
    moved = images
    for _ in range(steps):
        leaf = moved.detach().requires_grad_()
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(logits_of(network(leaf)), wanted, reduction="sum"), leaf)
        moved = (moved - bound / 2 * slope.sign()).clamp(images - bound, images + bound).clamp(0, 1)
    network.train(was_training)
    return moved.detach()
