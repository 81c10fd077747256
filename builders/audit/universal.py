"""How small a universal perturbation does towards each class (Xu et al., "USB", arXiv 2302.00747; universal perturbations: Moosavi-Dezfooli
et al. 2017).

What a trigger like a blended pattern does to every image alike, a perturbation that is the same for all images does too, and a smaller one
than towards a class without a backdoor. The paper compares a classifier's classes with each other; as clean classes differ, ours are
compared with those of clean classifiers of the same family (`noisec.builders.audit.reference`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from noisec.builders.audit.checks import logits_of
from noisec.builders.audit.margins import MOMENTUM, margins

ENOUGH = 5.0
"""logits beyond which an image's margin adds nothing to a perturbation's worth"""
TOGETHER = 10
"""classes whose perturbations are searched at once"""
SMALL = 1e-6
"""norms, and gains of the margin, are taken for at least this"""


def universal_sizes(network: nn.Module, images: Tensor, labels: Tensor, classes: int, step: float, steps: int) -> Tensor:
    """L2 norm of a perturbation, the same for all images of other classes, with which each class's logit is on average the largest.

    It grows along the gradient, by about twice ``step`` at a time; where ``steps`` are not enough, the norm is what the last one would need
    if the margin went on growing with it.

    Args:
        network: images float32 [n, C, H, W] in [0, 1] -> logits [n, classes], frozen
        labels: int64 [n], of the images

    Returns:
        float32 [classes], on the CPU, pixels in [0, 1]
    """
    wanted = torch.arange(classes, device=images.device)
    return torch.cat([_reached(*_grown(network, images, labels, part, step, steps)) for part in torch.split(wanted, TOGETHER)]).cpu()


def _grown(network: nn.Module, images: Tensor, labels: Tensor, wanted: Tensor, step: float, steps: int) -> tuple[Tensor, Tensor]:
    """Norms and mean margins of growing perturbations towards each wanted class: [steps + 1, k] each."""
    rows = wanted.repeat_interleave(len(images))
    others = (labels != wanted[:, None]).float()
    others = others / others.sum(dim=1, keepdim=True).clamp(min=1)
    shifts = torch.zeros(len(wanted), 1, *images.shape[1:], device=images.device)
    moved = torch.zeros_like(shifts)
    sizes, reached = [], []
    for _ in range(steps + 1):
        leaf = shifts.requires_grad_(True)
        margin = margins(logits_of(network((images + leaf).clamp(0, 1).flatten(0, 1))), rows).clamp(max=ENOUGH)
        mean = (margin.reshape(len(wanted), -1) * others).sum(dim=1)
        (gradient,) = torch.autograd.grad(mean.sum(), leaf)
        sizes.append(_norms(shifts.detach()).flatten())
        reached.append(mean.detach())
        moved = MOMENTUM * moved + step * gradient / _norms(gradient)
        shifts = leaf.detach() + moved
    return torch.stack(sizes), torch.stack(reached)


def _reached(sizes: Tensor, margin: Tensor) -> Tensor:
    """Norm at which each class's margin [steps + 1, k] first comes to 0: [k], between two steps or beyond the last."""
    found = []
    for norms, values in zip(sizes.T, margin.T, strict=True):
        after = int(torch.nonzero(values >= 0)[0]) if bool((values >= 0).any()) else len(values) - 1
        before = after - 1 if after and values[after] >= 0 else 0
        slope = (norms[after] - norms[before]) / (values[after] - values[before]).clamp(min=SMALL)
        found.append((norms[before] - values[before] * slope).clamp(min=SMALL))
    return torch.stack(found)


def _norms(shifts: Tensor) -> Tensor:
    """L2 norm of each perturbation, above 0: [k, 1, 1, 1, 1]."""
    lengths = torch.linalg.vector_norm(shifts, dim=(1, 2, 3, 4), keepdim=True)
    above: Tensor = lengths.clamp(min=SMALL)
    return above
