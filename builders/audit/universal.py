"""How far a small universal perturbation gets, towards each class (Xu et al., "USB", arXiv 2302.00747; universal perturbations:
Moosavi-Dezfooli et al. 2017).

What a trigger like a blended pattern does to every image alike, a perturbation that is the same for all images can do, and a much smaller
one than towards a class without a backdoor. The paper compares the sizes that it takes; here the size is fixed, too small for most classes,
and what counts is how far the images still are from each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from noisec.builders.audit.checks import logits_of
from noisec.builders.audit.margins import MOMENTUM, margins

ENOUGH = 5.0
"""nats beyond which an image's margin adds nothing to a perturbation's worth"""
TOGETHER = 10
"""classes whose perturbations are searched at once"""


def universal_margins(network: nn.Module, images: Tensor, judged: Tensor, labels: Tensor, classes: int, norm: float, steps: int) -> Tensor:
    """Mean margin of each class's logit, on images of other classes, under the best perturbation for it.

    Args:
        network: images float32 [n, C, H, W] in [0, 1] -> logits [n, classes], frozen
        images: that the perturbations are searched on
        judged: others, on which they are judged, and their ``labels`` int64 [m]
        norm: largest L2 norm of a perturbation

    Returns:
        float32 [classes], on the CPU; below 0 where the label is not reached
    """
    found = []
    for wanted in torch.split(torch.arange(classes, device=images.device), TOGETHER):
        for label, shift in zip(wanted, _search(network, images, wanted, norm, steps), strict=True):
            others = judged[labels != label]
            with torch.no_grad():
                reached = margins(logits_of(network((others + shift).clamp(0, 1))), label.expand(len(others)))
            found.append(reached.mean())
    return torch.stack(found).cpu()


def _search(network: nn.Module, images: Tensor, wanted: Tensor, norm: float, steps: int) -> Tensor:
    """A perturbation towards each wanted class: [k, 1, C, H, W] of int64 [k]."""
    rows = wanted.repeat_interleave(len(images))
    shifts = torch.zeros(len(wanted), 1, *images.shape[1:], device=images.device)
    moved = torch.zeros_like(shifts)
    for _ in range(steps):
        leaf = shifts.requires_grad_(True)
        logits = logits_of(network((images + leaf).clamp(0, 1).flatten(0, 1)))
        (gradient,) = torch.autograd.grad(margins(logits, rows).clamp(max=ENOUGH).sum(), leaf)
        moved = MOMENTUM * moved + 2 * norm / steps * gradient / _norms(gradient)
        shifts = leaf.detach() + moved
        shifts = shifts * (norm / _norms(shifts)).clamp(max=1)
    return shifts


def _norms(shifts: Tensor) -> Tensor:
    """L2 norm of each perturbation, above 0: [k, 1, 1, 1, 1]."""
    lengths = torch.linalg.vector_norm(shifts, dim=(1, 2, 3, 4), keepdim=True)
    above: Tensor = lengths.clamp(min=torch.finfo(shifts.dtype).tiny)
    return above
