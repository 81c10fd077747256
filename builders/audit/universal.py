"""How small a universal perturbation does towards each class (Xu et al., "USB", arXiv 2302.00747; universal perturbations: Moosavi-Dezfooli
et al. 2017).

What a trigger like a blended pattern does to every image alike, a perturbation that is the same for all images does too, and a smaller one
than towards a class without a backdoor. The paper compares a classifier's classes with each other; as clean classes differ, ours are
compared with those of clean classifiers of the same family (`noisec.builders.audit.reference`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from noisec.builders.audit.checks import logits_of
from noisec.builders.audit.margins import MOMENTUM, margins
from noisec.errors import NoisecError

ENOUGH = 5.0
"""logits beyond which an image's margin adds nothing to a perturbation's worth"""
TOGETHER = 10
"""classes whose perturbations are searched at once"""
FURTHEST = 10.0
"""ways of all steps beyond which nobody guesses what a class takes"""
SMALL = 1e-6
"""norms are taken for at least this"""


def universal_sizes(network: nn.Module, images: Tensor, labels: Tensor, classes: int, step: float, steps: int) -> Tensor:
    """L2 norm of a perturbation, the same for all images of other classes, with which each class's logit is on average the largest.

    It grows along the gradient, by about twice ``step`` at a time; where ``steps`` are not enough, the norm is what the last one would need
    if the margin went on growing with it, at most `FURTHEST` times the way of all steps.

    Args:
        network: images float32 [n, C, H, W] in [0, 1] -> logits [n, classes], frozen
        labels: int64 [n], of the images

    Returns:
        float32 [classes], on the CPU, pixels in [0, 1]

    Raises:
        NoisecError: a size is not finite.
    """
    parts = torch.split(torch.arange(classes, device=images.device), TOGETHER)
    norms, reached = (
        torch.cat(found, dim=1) for found in zip(*(_grown(network, images, labels, one, step, steps) for one in parts), strict=True)
    )
    furthest = FURTHEST * step * steps
    sizes = torch.tensor([_crossing(*path, furthest) for path in zip(norms.T.tolist(), reached.T.tolist(), strict=True)])
    if not bool(torch.isfinite(sizes).all()):
        raise NoisecError("audit: the classifier's logits or gradients are not finite on perturbed images; no verdict rests on that")
    return sizes


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


def _crossing(norms: Sequence[float], margin: Sequence[float], furthest: float) -> float:
    """Norm at which one class's margin first comes to 0, between two steps or beyond the last."""
    over = [place for place, value in enumerate(margin) if value >= 0]
    if over[:1] == [0]:
        return norms[0]
    before, after = (over[0] - 1, over[0]) if over else (0, len(margin) - 1)
    gained = margin[after] - margin[before]
    return furthest if gained <= 0 else min(norms[before] - margin[before] * (norms[after] - norms[before]) / gained, furthest)


def _norms(shifts: Tensor) -> Tensor:
    """L2 norm of each perturbation, above 0: [k, 1, 1, 1, 1]."""
    lengths = torch.linalg.vector_norm(shifts, dim=(1, 2, 3, 4), keepdim=True)
    above: Tensor = lengths.clamp(min=SMALL)
    return above
