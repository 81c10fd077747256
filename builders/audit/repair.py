"""Taking a backdoor out: fine-tuning that keeps the classes under neuron noise (BAN section 3.4)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from noisec.builders.audit.checks import check, logits_of, pieces, tensors
from noisec.builders.audit.neurons import adversarial_noise, noisy_logits
from noisec.builders.images import Images
from noisec.builders.progress import bar
from noisec.builders.train import DEVICE, placed


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
    seed: int = 0


def repair(network: nn.Module, images: Images, classes: int, settings: RepairSettings | None = None) -> nn.Module:
    """A repaired copy of a classifier, in evaluation mode, on the CPU; the one that is given is not changed.

    It minimises CE(clean) + noise_weight CE(under one-step adversarial neuron noise), which unlearns the neurons that a backdoor
    hangs on. Running statistics of batch norms learn from clean passes alone.

    Args:
        images: clean and labelled

    Raises:
        NoisecError: images or network cannot be used (`noisec.builders.audit.checks`).
    """
    settings = settings or RepairSettings()
    check(network, images, classes)
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
                batch, truth = pixels[rows], labels[rows]
                noise = adversarial_noise(repaired, batch, truth, settings.eps, steps=1, seed=int(torch.randint(2**31, ())))
                clean = nn.functional.cross_entropy(logits_of(repaired(batch)), truth)
                loss = clean + settings.noise_weight * nn.functional.cross_entropy(noisy_logits(repaired, noise, batch), truth)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                falling.step()
            shown.advance(f"loss {loss.item():.3f}, epoch {epoch + 1}")
    repaired.zero_grad(set_to_none=True)
    return repaired.cpu().eval()
