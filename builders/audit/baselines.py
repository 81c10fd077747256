"""Other ways of finding a backdoor in a classifier, written anew from their papers, behind the interface of `ban.audit`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from noisec.builders.audit.ban import balanced_halves, label_shares
from noisec.builders.audit.checks import check, frozen, logits_of, pieces, tensors
from noisec.builders.audit.evidence import Evidence
from noisec.builders.audit.masks import SplitNetwork, feature_mask
from noisec.builders.audit.neurons import CHUNK
from noisec.builders.images import Images
from noisec.builders.networks import Padded, UNetDenoiser
from noisec.builders.progress import bar

MAD_TO_SD = 1.4826
"""median absolute deviation -> standard deviation of a normal distribution"""


@dataclass(frozen=True)
class CleanseSettings:
    """Neural Cleanse's settings (Wang et al. 2019, section 5), with the steps counted one by one."""

    samples: int = 500
    steps: int = 300
    """of Adam for each class"""
    batch_size: int = 64
    learning_rate: float = 0.1
    success: float = 0.99
    """attack success that a mask keeps while it shrinks"""
    cost: float = 1e-3
    """weight of the mask's L1 norm at the start"""
    patience: int = 5
    """steps above or below `success` before that weight is changed"""
    threshold: float = 2.0
    """anomaly index above which a classifier is called backdoored"""
    seed: int = 0


@dataclass(frozen=True)
class Inverted:
    """A patch that sends images to one class."""

    mask: Tensor
    """float32 [1, 1, H, W] in [0, 1]"""
    pattern: Tensor
    """float32 [1, C, H, W] in [0, 1]"""

    def on(self, images: Tensor) -> Tensor:
        """Images [n, C, H, W] with the patch on."""
        return (1 - self.mask) * images + self.mask * self.pattern

    @property
    def norm(self) -> float:
        """L1 norm of the mask, in pixels."""
        return float(self.mask.detach().sum())


def neural_cleanse(network: nn.Module, images: Images, classes: int, settings: CleanseSettings | None = None) -> Evidence:
    """Neural Cleanse (Wang et al. 2019): find the smallest patch that sends images to each class; one that is much smaller than the
    others' is a backdoor's. The classifier is not changed.

    Raises:
        NoisecError: images or network cannot be audited (`noisec.builders.audit.checks`).
    """
    settings = settings or CleanseSettings()
    started = time.perf_counter()
    check(network, images, classes)
    copied = frozen(network)
    found, judged = balanced_halves(images, settings.samples, settings.seed)
    pixels, _ = tensors(found)
    patches = []
    with bar("inverting triggers", classes) as shown:
        for target in range(classes):
            patches.append(invert(copied, pixels, target, settings))
            shown.advance(f"L1 {patches[-1].norm:.1f}")
    norms = [patch.norm for patch in patches]
    index, target = anomaly(norms)
    held_out, labels = tensors(judged)
    quiet, noisy = _logits(copied, held_out), _logits(copied, patches[target].on(held_out))
    shares = label_shares(noisy, classes)
    return Evidence(
        method="neural-cleanse",
        backdoored=index > settings.threshold,
        score=index,
        threshold=settings.threshold,
        target=target,
        top_class_share=float(shares.max()),
        share_without_noise=float(label_shares(quiet, classes).max()),
        histogram=tuple(shares.tolist()),
        loss=nn.functional.cross_entropy(noisy, labels).item(),
        seconds=time.perf_counter() - started,
        norms=tuple(norms),
    )


def invert(network: nn.Module, images: Tensor, target: int, settings: CleanseSettings) -> Inverted:
    """The smallest patch that sends images [n, C, H, W] to a class (Neural Cleanse section 4.2): it minimises
    CE(network(patched), target) + cost ||mask||_1; the cost grows while the attack succeeds and shrinks while it does not."""
    generator = torch.Generator().manual_seed(settings.seed + target)
    raw_mask = torch.randn(1, 1, *images.shape[2:], generator=generator).to(images.device).requires_grad_()
    raw_pattern = torch.randn(1, *images.shape[1:], generator=generator).to(images.device).requires_grad_()
    optimiser = torch.optim.Adam([raw_mask, raw_pattern], lr=settings.learning_rate, betas=(0.5, 0.9))
    labels = torch.full((settings.batch_size,), target, device=images.device)
    cost, streak = settings.cost, 0
    best: Inverted | None = None
    for _ in range(settings.steps):
        rows = torch.randint(len(images), (settings.batch_size,), generator=generator).to(images.device)
        patch = Inverted(torch.sigmoid(raw_mask), torch.sigmoid(raw_pattern))
        logits = logits_of(network(patch.on(images[rows])))
        loss = nn.functional.cross_entropy(logits, labels) + cost * patch.mask.sum()
        optimiser.zero_grad()
        loss.backward(inputs=[raw_mask, raw_pattern])  # type: ignore[no-untyped-call]
        optimiser.step()
        works = float((logits.argmax(1) == target).float().mean()) >= settings.success
        if works and (best is None or patch.norm < best.norm):
            best = Inverted(patch.mask.detach(), patch.pattern.detach())
        streak = max(streak, 0) + 1 if works else min(streak, 0) - 1
        if abs(streak) >= settings.patience:
            cost, streak = (cost * 1.5 if works else cost / 1.5**1.5), 0
    return best or Inverted(torch.sigmoid(raw_mask).detach(), torch.sigmoid(raw_pattern).detach())


def anomaly(norms: Sequence[float]) -> tuple[float, int]:
    """How far the smallest norm lies below the median, in robust standard deviations, and which class it is (Neural Cleanse 4.3)."""
    values = np.asarray(norms)
    median = float(np.median(values))
    deviation = MAD_TO_SD * float(np.median(np.abs(values - median)))
    target = int(values.argmin())
    return (median - float(values[target])) / max(deviation, 1e-9), target


@dataclass(frozen=True)
class DecouplingSettings:
    """BTI-DBF's settings (Xu et al. 2024, section 4)."""

    samples: int = 500
    mask_epochs: int = 20
    mask_weight: float = 0.0
    """weight of the mask's norm; BTI-DBF has no such term, BAN adds it"""
    epochs: int = 30
    """of the generator"""
    batch_size: int = 64
    learning_rate: float = 5e-3
    bound: float = 0.3
    """largest change of a pixel, in [0, 1]"""
    threshold: float = 0.75
    """share of images moved to one class above which a classifier is called backdoored; `noisec.builders.audit.ban.calibrate` fits it"""
    seed: int = 0


class BoundedChange(nn.Module):
    """Images -> images that differ by at most ``bound`` in each pixel."""

    def __init__(self, shape: tuple[int, int, int], bound: float) -> None:
        super().__init__()
        self.network = Padded(lambda padded: _open(UNetDenoiser(padded, (8, 16, 32))), shape)
        self.bound = bound

    def forward(self, images: Tensor) -> Tensor:
        change = self.bound * torch.tanh(self.network(images) - images)
        return (images + change).clamp(0, 1)


def _open(network: UNetDenoiser) -> UNetDenoiser:
    """Without the zeros it starts from: where nothing is changed yet, the distance to the unchanged features has no slope."""
    nn.init.normal_(network.noise.weight, std=0.05)
    return network


def bti_dbf(network: nn.Module, images: Images, classes: int, settings: DecouplingSettings | None = None) -> Evidence:
    """BTI-DBF (Xu et al., ICLR 2024): split the last feature map into benign features and the rest, then train a generator that changes
    the rest and leaves the benign ones, within a bound on the pixels; it finds a backdoor if there is one, and then moves most images
    to one class. The classifier is not changed.

    Written from the paper's idea: generator, bound and verdict (the share of held-out images that are moved to one class) are this
    implementation's.

    Raises:
        NoisecError: images or network cannot be audited (`noisec.builders.audit.checks`).
    """
    settings = settings or DecouplingSettings()
    started = time.perf_counter()
    check(network, images, classes)
    copied = frozen(network)
    found, judged = balanced_halves(images, settings.samples, settings.seed)
    pixels, truth = tensors(found)
    split = SplitNetwork(copied, pixels)
    mask = feature_mask(split, pixels, truth, settings.mask_weight, settings.mask_epochs, settings.seed)
    change = train_change(split, mask, pixels, settings)
    held_out, labels = tensors(judged)
    with torch.no_grad():
        moved = torch.cat([change(chunk) for chunk in pieces(held_out, CHUNK)])
    quiet, noisy = _logits(copied, held_out), _logits(copied, moved)
    shares = label_shares(noisy, classes)
    share = float(shares.max())
    return Evidence(
        method="bti-dbf",
        backdoored=share > settings.threshold,
        score=share,
        threshold=settings.threshold,
        target=int(shares.argmax()),
        top_class_share=share,
        share_without_noise=float(label_shares(quiet, classes).max()),
        histogram=tuple(shares.tolist()),
        loss=nn.functional.cross_entropy(noisy, labels).item(),
        seconds=time.perf_counter() - started,
    )


def train_change(split: SplitNetwork, mask: Tensor, images: Tensor, settings: DecouplingSettings) -> BoundedChange:
    """A generator G that minimises ||m (f(G(x)) - f(x))|| - ||(1 - m) (f(G(x)) - f(x))|| (BTI-DBF equation 3), each norm in units
    of the masked features' own, without which the larger half decides alone, for images [n, C, H, W]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        channels, height, width = images.shape[1:]
        change = BoundedChange((channels, height, width), settings.bound).to(images.device)
        before = split.features(images)
        optimiser = torch.optim.Adam(change.parameters(), lr=settings.learning_rate)
        with bar("inverting the backdoor", settings.epochs) as shown:
            for _ in range(settings.epochs):
                for rows in pieces(torch.randperm(len(images)).to(images.device), settings.batch_size):
                    moved = split.tracked_features(change(images[rows])) - before[rows]
                    loss = _distance(moved, before[rows], mask) - _distance(moved, before[rows], 1 - mask)
                    optimiser.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
                shown.advance(f"loss {loss.item():.3f}")
    return change.eval()


def _distance(moved: Tensor, before: Tensor, mask: Tensor) -> Tensor:
    """Change [n, C, H, W] of the features [n, C, H, W] that a mask [1, C, H, W] keeps, in units of their own norm: a scalar."""
    distance: Tensor = (mask * moved).flatten(1).norm(dim=1).mean() / (mask * before).flatten(1).norm(dim=1).mean().clamp_min(1e-6)
    return distance


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    """Logits [n, classes] of images [n, C, H, W]."""
    with torch.no_grad():
        return torch.cat([logits_of(network(chunk)) for chunk in pieces(images, CHUNK)])
