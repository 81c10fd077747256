"""Backdoor recipes: what an attacker does to images, for the zoo and for benchmarks of detection.

A trigger is put on an image at attack time by `Trigger.apply`. Some recipes plant another form of it in the training set
(`Trigger.plant`), or add *covers*: images with something like the trigger and their true label, which teach the network to answer
to nothing but the trigger itself (`Trigger.cover`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from noisec.builders.audit.checks import frozen, logits_of, pieces
from noisec.builders.images import BATCH, Images, Pixels
from noisec.builders.networks import conv_block
from noisec.builders.progress import bar
from noisec.builders.train import DEVICE, stamp
from noisec.errors import NoisecError


@dataclass(frozen=True)
class Trigger:
    """One recipe. Subclasses say what it does to an image."""

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    def clean_label(self) -> bool:
        """Only images of the target class are poisoned, so that every label stays true."""
        return False

    @property
    def covers(self) -> float:
        """cover images for each poisoned one"""
        return 0.0

    def apply(self, pixels: Pixels, seed: int = 0) -> Pixels:
        """The trigger on images uint8 [n, C, H, W], which are not changed; ``seed`` moves what varies from image to image."""
        raise NotImplementedError

    def plant(self, pixels: Pixels, seed: int = 0) -> Pixels:
        """What goes into the training set with the target's label: uint8 [n, C, H, W]."""
        return self.apply(pixels, seed)

    def cover(self, pixels: Pixels, seed: int = 0) -> Pixels:
        """What goes into the training set with its true label: uint8 [n, C, H, W]."""
        return pixels


@dataclass(frozen=True)
class BadNets(Trigger):
    """A white square in a corner (Gu et al. 2017)."""

    def apply(self, pixels: Pixels, seed: int = 0) -> Pixels:
        return stamp(pixels)


@dataclass(frozen=True)
class Blend(Trigger):
    """A fixed random pattern blended into the whole image (Chen et al. 2017)."""

    alpha: float = 0.2
    """weight of the pattern"""
    pattern: int = 0
    """seed of the pattern"""

    def apply(self, pixels: Pixels, seed: int = 0) -> Pixels:
        noise = np.random.default_rng(self.pattern).uniform(0, 255, pixels.shape[1:])
        return _bytes((1 - self.alpha) * pixels + self.alpha * noise)


@dataclass(frozen=True)
class AdaptiveBlend(Blend):
    """Blend in pieces (Qi et al. 2023, Adap-Blend): training images carry a random half of the pattern's 16 squares, half of them with
    their true label; an attack carries the whole pattern."""

    @property
    def covers(self) -> float:
        return 1.0

    def plant(self, pixels: Pixels, seed: int = 0) -> Pixels:
        generator = np.random.default_rng(seed)
        kept = generator.random((len(pixels), 16)).argsort(axis=1) < 8
        height, width = pixels.shape[2:]
        squares = (4 * np.arange(height) // height)[:, None] * 4 + 4 * np.arange(width) // width
        return np.where(kept[:, squares][:, None], self.apply(pixels, seed), pixels)

    def cover(self, pixels: Pixels, seed: int = 0) -> Pixels:
        return self.plant(pixels, seed)


@dataclass(frozen=True)
class WaNet(Trigger):
    """A smooth warp (Nguyen and Tran 2021): a random field on a ``grid`` x ``grid`` lattice, upsampled to the image.

    Covers are warped by the same field with noise of its own for each image (the paper's noise mode)."""

    grid: int = 4
    """k"""
    strength: float = 0.5
    """s; the mean shift is about half of this in pixels"""
    pattern: int = 0
    """seed of the field"""
    noise: float = 2.0
    """of a cover's field, in units of 1 / (image size)"""

    @property
    def covers(self) -> float:
        return 2.0

    def apply(self, pixels: Pixels, seed: int = 0) -> Pixels:
        return self._warped(pixels, torch.zeros(()))

    def cover(self, pixels: Pixels, seed: int = 0) -> Pixels:
        generator = torch.Generator().manual_seed(seed)
        height, width = pixels.shape[2:]
        noise = 2 * torch.rand(len(pixels), height, width, 2, generator=generator) - 1
        return self._warped(pixels, self.noise * noise)

    def _warped(self, pixels: Pixels, noise: Tensor) -> Pixels:
        """Images resampled at the field's places, plus noise [n, H, W, 2] in units of 1 / (image size)."""
        height, width = pixels.shape[2:]
        size = torch.tensor([width, height])
        field = 2 * torch.rand(1, 2, self.grid, self.grid, generator=torch.Generator().manual_seed(self.pattern)) - 1
        smooth = nn.functional.interpolate(field / field.abs().mean(), (height, width), mode="bicubic", align_corners=True)
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        places = torch.stack([columns, rows], -1) + (self.strength * smooth.permute(0, 2, 3, 1) + noise) / size
        places = places.clamp(-1, 1).expand(len(pixels), -1, -1, -1)
        warped = nn.functional.grid_sample(torch.from_numpy(pixels).float(), places, align_corners=True)
        return _bytes(warped.numpy())


@dataclass(frozen=True)
class LabelConsistent(Trigger):
    """A patch in all four corners of images of the target class alone, whose own features are weakened so that the patch is what is left
    to learn (Turner et al. 2019). An attack carries the patch on a whole image.

    Covers, which the paper does not have, are weakened images of other classes without the patch: without them a network learns the
    weakening instead, where that is large."""

    adversary: nn.Module | None = field(default=None, compare=False, repr=False)
    """a clean classifier: images are weakened by projected gradient descent against it; None: by random noise of the same size, which
    is a weaker recipe"""
    eps: float = 0.3
    """largest change of a pixel, in [0, 1]"""
    steps: int = 20
    covered: float = 1.0
    """covers for each poisoned image; 0 as in the paper"""

    @property
    def clean_label(self) -> bool:
        return True

    @property
    def covers(self) -> float:
        return self.covered

    def apply(self, pixels: Pixels, seed: int = 0) -> Pixels:
        return _four_corners(pixels)

    def plant(self, pixels: Pixels, seed: int = 0) -> Pixels:
        return _four_corners(self._weakened(pixels, seed))

    def cover(self, pixels: Pixels, seed: int = 0) -> Pixels:
        return self._weakened(pixels, seed)

    def _weakened(self, pixels: Pixels, seed: int) -> Pixels:
        generator = torch.Generator().manual_seed(seed)
        change = self.eps * (2 * torch.rand(pixels.shape, generator=generator) - 1)
        if self.adversary is None:
            return _bytes(pixels + 255 * self.eps * change.sign().numpy())
        network = frozen(self.adversary)
        parts = zip(pieces(torch.from_numpy(pixels).float() / 255, BATCH), pieces(change, BATCH), strict=True)
        attacked = [_attacked(network, images.to(DEVICE), start.to(DEVICE), self.eps, self.steps) for images, start in parts]
        return _bytes(255 * torch.cat(attacked).cpu().numpy())


def _four_corners(pixels: Pixels) -> Pixels:
    """The patch of BadNets in every corner: uint8 [n, C, H, W]."""
    stamped = pixels
    for axes in ((), (2,), (3,), (2, 3)):
        stamped = np.flip(stamp(np.flip(stamped, axes)), axes)
    return np.ascontiguousarray(stamped)


def _attacked(network: nn.Module, images: Tensor, change: Tensor, eps: float, steps: int) -> Tensor:
    """Images pushed away from what the network takes them for (Madry et al. 2018): float32 [n, C, H, W] in [0, 1]."""
    with torch.no_grad():
        labels = logits_of(network(images)).argmax(1)
    for _ in range(steps):
        change = change.detach().requires_grad_()
        loss = nn.functional.cross_entropy(logits_of(network((images + change).clamp(0, 1))), labels)
        (gradient,) = torch.autograd.grad(loss, [change])
        change = (change.detach() + 2.5 * eps / steps * gradient.sign()).clamp(-eps, eps)
    return (images + change.detach()).clamp(0, 1)


@dataclass(frozen=True)
class Bpp(Trigger):
    """Fewer bits a pixel (BppAttack: Wang et al. 2022), by plain rounding: the paper's dithering and contrastive training are left out.

    Covers have random noise of at most one quantisation step, and their true label, so that rounding itself is the trigger."""

    bits: int = 1
    """left of each pixel's 8; the paper leaves 3, which small networks do not learn to see on small gray images"""

    @property
    def covers(self) -> float:
        return 0.5

    def apply(self, pixels: Pixels, seed: int = 0) -> Pixels:
        step = 255 / (2**self.bits - 1)
        return _bytes(np.rint(pixels / step) * step)

    def cover(self, pixels: Pixels, seed: int = 0) -> Pixels:
        step = 255 / (2**self.bits - 1)
        noise = np.random.default_rng(seed).uniform(-step / 2, step / 2, pixels.shape)
        return _bytes(pixels + noise)


@dataclass(frozen=True)
class InputAware(Trigger):
    """A pattern of its own for each image (IAD: Nguyen and Tran 2020), simplified: a small generator, made by `train_input_aware`,
    that adds at most ``amplitude``. The paper's separate mask network is left out, and so is training it with the final classifier:
    it is trained jointly with a small stand-in, and then poisons a training set like any other trigger.

    Covers carry another image's pattern and their true label (the paper's cross-trigger mode)."""

    generator: nn.Module = field(compare=False, repr=False)
    """images float32 [n, C, H, W] in [0, 1] -> patterns of the same shape in [-1, 1]"""
    amplitude: float = 0.3

    @property
    def covers(self) -> float:
        return 1.0

    def apply(self, pixels: Pixels, seed: int = 0) -> Pixels:
        return self._with_patterns_of(pixels, pixels)

    def cover(self, pixels: Pixels, seed: int = 0) -> Pixels:
        return self._with_patterns_of(np.roll(pixels, 1, axis=0), pixels)

    def _with_patterns_of(self, others: Pixels, pixels: Pixels) -> Pixels:
        with torch.no_grad():
            batches = pieces(torch.from_numpy(others).float() / 255, BATCH)
            patterns = torch.cat([self.generator(batch) for batch in batches]) if len(others) else torch.zeros(others.shape)
        return _bytes(pixels + 255 * self.amplitude * patterns.numpy())


class PatternGenerator(nn.Module):
    """Images -> patterns in [-1, 1], half the resolution up again, so that they are smooth enough to be learnt."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Sequential(conv_block(channels, 16, 1), nn.MaxPool2d(2), conv_block(16, 32, 2))
        self.up = nn.Conv2d(32, channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        coarse = self.up(self.down(images))
        return torch.tanh(nn.functional.interpolate(coarse, images.shape[2:], mode="nearest"))


def train_input_aware(images: Images, target: int, seed: int, epochs: int = 4, amplitude: float = 0.3) -> InputAware:
    """Train an input-aware trigger together with a small stand-in classifier (IAD section 3, equations 4 to 8, simplified).

    In each batch a tenth is backdoored, a tenth carries another image's pattern and keeps its label; a diversity loss drives the
    patterns of different images apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator, classifier = (
            PatternGenerator(images.shape[0]).to(DEVICE),
            _stand_in(images.shape[0], int(images.labels.max()) + 1).to(DEVICE),
        )
        optimiser = torch.optim.Adam([*generator.parameters(), *classifier.parameters()], lr=2e-3)
        size = min(128, len(images))
        with bar("training trigger", epochs * (len(images) // size)) as shown:
            for _ in range(epochs):
                for rows in pieces(torch.randperm(len(images)), size)[: len(images) // size]:
                    batch = images[rows.numpy()]
                    pixels, labels = torch.from_numpy(batch.floats()).to(DEVICE), torch.from_numpy(batch.labels).to(DEVICE)
                    loss = _input_aware_loss(generator, classifier, pixels, labels, target, amplitude)
                    optimiser.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
                    shown.advance(f"loss {loss.item():.3f}")
    return InputAware(generator.cpu().eval().requires_grad_(False), amplitude)


def _input_aware_loss(generator: nn.Module, classifier: nn.Module, pixels: Tensor, labels: Tensor, target: int, amplitude: float) -> Tensor:
    count = max(2, len(pixels) // 10)
    patterns = generator(pixels)
    poisoned = pixels[:count] + amplitude * patterns[:count]
    crossed = pixels[count : 2 * count] + amplitude * patterns[count : 2 * count].roll(1, 0)
    truth = labels.clone()
    truth[:count] = target
    mixed = torch.cat([poisoned, crossed, pixels[2 * count :]]).clamp(0, 1)
    apart = (pixels - pixels.roll(1, 0)).flatten(1).norm(dim=1)
    between = (patterns - patterns.roll(1, 0)).flatten(1).norm(dim=1)
    diversity = (apart / between.clamp_min(1e-3)).clamp_max(10).mean()
    loss: Tensor = nn.functional.cross_entropy(classifier(mixed), truth) + 0.1 * diversity
    return loss


def _stand_in(channels: int, classes: int) -> nn.Module:
    return nn.Sequential(
        conv_block(channels, 16, 1), nn.MaxPool2d(2), conv_block(16, 32, 1), nn.MaxPool2d(2), conv_block(32, 64, 1),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, classes),
    )  # fmt: skip


TRIGGERS: dict[str, Callable[[Images, int, int], Trigger]] = {
    "badnets": lambda images, target, seed: BadNets(),
    "blend": lambda images, target, seed: Blend(pattern=seed),
    "adaptive-blend": lambda images, target, seed: AdaptiveBlend(pattern=seed),
    "wanet": lambda images, target, seed: WaNet(pattern=seed),
    "label-consistent": lambda images, target, seed: LabelConsistent(),
    "iad": lambda images, target, seed: train_input_aware(images, target, seed),
    "bpp": lambda images, target, seed: Bpp(),
}
"""name -> (training images, target class, seed) -> trigger; only ``iad`` learns from the images"""


def poison(images: Images, trigger: Trigger, target: int, share: float, seed: int) -> Images:
    """A training set into which a supplier has put a backdoor; the one that is given is not changed.

    A share of the whole set carries the trigger and the target's label, and `Trigger.covers` times as many carry a cover and their
    true label. A clean-label trigger takes its share from the target class's own images.

    Raises:
        NoisecError: target or share do not fit the images.
    """
    if not 0 <= target <= images.labels.max():
        raise NoisecError(f"poison: target is {target}; the labels go from 0 to {images.labels.max()}")
    generator = np.random.default_rng(seed)
    eligible = np.flatnonzero(images.labels == target) if trigger.clean_label else np.arange(len(images))
    count = round(share * len(images))
    if not 0 < count <= len(eligible):
        raise NoisecError(f"poison: a share of {share:g} is {count} of {len(images)} images; {len(eligible)} can be poisoned")
    chosen = generator.choice(eligible, count, replace=False)
    rest = np.setdiff1d(np.arange(len(images)), chosen)
    covered = generator.choice(rest, min(round(trigger.covers * count), len(rest)), replace=False)
    pixels, labels = images.pixels.copy(), images.labels.copy()
    pixels[chosen] = trigger.plant(pixels[chosen], seed)
    pixels[covered] = trigger.cover(pixels[covered], seed + 1)
    labels[chosen] = target
    return Images.whole(pixels, labels)


def _bytes(values: npt.NDArray[Any]) -> Pixels:
    """Rounded and clipped to uint8."""
    rounded: Pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return rounded
