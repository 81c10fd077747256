"""The largest margin of each class (Wang et al., "MM-BD", IEEE S&P 2024, arXiv 2205.06900, section 4).

A backdoor lets a few pixels outvote everything else in an image. Its target's logit can therefore be driven further above all others than
that of a class without one, by whatever kind of trigger; no trigger has to be found for that. The paper compares a classifier's classes
with each other; as clean classes differ by several times, ours are compared with those of clean classifiers of the same family
(`noisec.builders.audit.reference`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from noisec.builders.audit.checks import logits_of
from noisec.errors import NoisecError

STEP, MOMENTUM = 1.0, 0.5
"""of the ascent: L2 norm of a step, and the share of the last one that goes on"""


def largest_margins(network: nn.Module, images: Tensor, classes: int, starts: int, steps: int, seed: int) -> Tensor:
    """How far gradient ascent on the pixels drives each class's logit above the largest other one.

    Args:
        network: images float32 [n, C, H, W] in [0, 1] -> logits [n, classes], frozen
        images: to begin with; ``starts`` of them are drawn, the same ones for each class, of which the best counts

    Returns:
        float32 [classes], on the CPU

    Raises:
        NoisecError: a margin is not finite.
    """
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:starts]
    wanted = torch.arange(classes, device=images.device).repeat_interleave(len(drawn))
    pixels = images[drawn.to(images.device)].repeat(classes, 1, 1, 1)
    moved = torch.zeros_like(pixels)
    for _ in range(steps):
        leaf = pixels.requires_grad_(True)
        (gradient,) = torch.autograd.grad(margins(logits_of(network(leaf)), wanted).sum(), leaf)
        norms = gradient.flatten(1).norm(dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)
        moved = MOMENTUM * moved + STEP * gradient / norms[:, None, None, None]
        pixels = (leaf.detach() + moved).clamp(0, 1)
    with torch.no_grad():
        reached = margins(logits_of(network(pixels)), wanted)
    if not bool(torch.isfinite(reached).all()):
        raise NoisecError("audit: the classifier's logits overflow float32 on images that it has not seen; no verdict rests on that")
    return reached.reshape(classes, len(drawn)).amax(1).cpu()


def margins(logits: Tensor, wanted: Tensor) -> Tensor:
    """How far each row's wanted logit lies above its largest other one: [n] of [n, classes] and [n]."""
    others = logits.scatter(1, wanted[:, None], -torch.inf).amax(1)
    return logits.gather(1, wanted[:, None])[:, 0] - others
