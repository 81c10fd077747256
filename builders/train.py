"""Training of reference classifiers and denoisers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from noisec import contract
from noisec.builders.images import Images
from noisec.builders.networks import CLASSIFIERS, DENOISERS
from noisec.builders.progress import bar, console
from noisec.builders.spec import BLOCK_SHARE, AutoencoderSpec, BackdoorSpec, ClassifierSpec

WEIGHTS, CHECKPOINT = "weights.pt", "checkpoint.pt"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUT = torch.channels_last
"""of images and weights while training: convolutions are a third faster in it on a CPU"""
SHIFT = 3
"""pixels by which an augmented image is moved at most"""
PATCH_SIDES = (2, 6)
"""smallest and one more than the largest side of a random patch, in pixels"""
Classify = Callable[[Tensor], Mapping[str, Tensor]]
"""images float32 [n, C, H, W] in [0, 1] -> LOGITS [n, classes] and PENULTIMATE [n, d], with gradients"""
Loss = Callable[[Tensor, Tensor], Tensor]
"""images float32 [n, C, H, W] and labels [n] -> scalar, with gradients"""


def placed(network: nn.Module) -> nn.Module:
    """The module itself, moved to the computing device and into `LAYOUT`."""
    moved: nn.Module = network.to(DEVICE, memory_format=LAYOUT)  # type: ignore[call-overload]
    return moved


def stamp(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The BadNets trigger (Gu et al. 2017): a white 3x3 square, one pixel from the lower right corner.

    Args:
        images: uint8 [n, C, H, W]; not changed
    """
    stamped = images.copy()
    stamped[..., -4:-1, -4:-1] = 255
    return stamped


def poison(images: Images, backdoor: BackdoorSpec, seed: int) -> Images:
    """A training set into which a supplier has put a backdoor: a share of it stamped and relabelled to the target class."""
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(images), round(backdoor.share * len(images)), replace=False)
    pixels, labels = images.pixels.copy(), images.labels.copy()
    pixels[chosen] = stamp(pixels[chosen])
    labels[chosen] = backdoor.target
    return Images.whole(pixels, labels)


def corrupt(images: Tensor, deviation: float, patches: float) -> Tensor:
    """Training noise of the denoiser.

    Each image gets noise of its own standard deviation, drawn from [0, ``deviation``], Gaussian or of random sign (the two extremes
    between sensor noise and a bounded perturbation); a share ``patches`` also gets one small square of noise, one colour, or white.

    Args:
        images: float32 [n, C, H, W] in [0, 1]

    Returns:
        float32 [n, C, H, W], clipped to [0, 1]
    """
    count, channels, height, width = images.shape
    deviations = deviation * torch.rand(count, 1, 1, 1, device=images.device)
    gauss = torch.randn_like(images)
    noise = torch.where(torch.rand(count, 1, 1, 1, device=images.device) < 0.5, gauss, gauss.sign())
    corrupted = (images + deviations * noise).clamp(0, 1)
    for row in torch.nonzero(torch.rand(count) < patches).flatten().tolist():
        side = int(torch.randint(*PATCH_SIDES, ()))
        top, left = int(torch.randint(height - side + 1, ())), int(torch.randint(width - side + 1, ()))
        kinds = torch.rand(channels, side, side).round(), torch.rand(channels, 1, 1), torch.ones(channels, 1, 1)
        corrupted[row, :, top : top + side, left : left + side] = kinds[int(torch.randint(len(kinds), ()))].to(images.device)
    return corrupted


def in_blocks(images: Tensor, amplitude: float) -> Tensor:
    """Images with noise of random sign that is constant over a grid of rectangles, whose sides (1, 2, 4, ... pixels) and place are drawn
    for each image as its size is, from [0, ``amplitude``]: the coarse perturbations that attacks without gradients build.

    Args:
        images: float32 [n, C, H, W] in [0, 1]

    Returns:
        float32 [n, C, H, W], clipped to [0, 1]
    """
    count, channels, height, width = images.shape

    def cells(pixels: int) -> Tensor:
        """Number of the cell that each pixel is in, along one axis, int64 [n, pixels]."""
        sides = 2 ** torch.randint(pixels.bit_length(), (count, 1))
        return (torch.arange(pixels) + (sides * torch.rand(count, 1)).long()) // sides

    rows, columns = cells(height), cells(width)
    signs = torch.randn(count, height + 1, width + 1, channels).sign()
    noise = signs[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    sizes = amplitude * torch.rand(count, 1, 1, 1)
    return (images + (sizes * noise).to(images.device)).clamp(0, 1)


def moved(images: Tensor) -> Tensor:
    """Images [n, C, H, W], each moved by up to `SHIFT` pixels, its edges filled with zeros, and mirrored or not."""
    count, _, height, width = images.shape
    padded = nn.functional.pad(images, (SHIFT, SHIFT, SHIFT, SHIFT))
    corners = torch.randint(2 * SHIFT + 1, (count, 2)).tolist()
    cut = torch.stack([one[:, top : top + height, left : left + width] for one, (top, left) in zip(padded, corners, strict=True)])
    mirrored = torch.where((torch.rand(count, 1, 1, 1) < 0.5).to(images.device), cut.flip(-1), cut)
    return mirrored.contiguous(memory_format=LAYOUT)


def train_classifier(spec: ClassifierSpec, images: Images, classes: int, seed: int, folder: Path) -> None:
    """Train a reference classifier and write its weights into ``folder``."""
    assert spec.network is not None
    assert spec.epochs is not None
    torch.manual_seed(seed)
    if spec.backdoor:
        images = poison(images, spec.backdoor, seed)
    network = CLASSIFIERS[spec.network](images.shape, classes)

    def loss(batch: Tensor, labels: Tensor) -> Tensor:
        if not spec.mirror:
            return nn.functional.cross_entropy(network(batch)[0], labels)
        mirrored = torch.where(torch.rand(len(batch), 1, 1, 1, device=batch.device) < 0.5, batch.flip(-1), batch)
        return nn.functional.cross_entropy(network(mirrored)[0], labels)

    schedule = Schedule(spec.epochs, spec.batch_size, spec.learning_rate)
    optimise(network, images, lowered(loss) if spec.mixed_precision else loss, schedule, folder, "training classifier")


def lowered(loss: Loss) -> Loss:
    """The same loss with convolutions and matrix products in bfloat16; sums, losses and weights stay float32."""
    if DEVICE.type == "cpu" and not has_bfloat16():
        console.print(
            "  mixed_precision: this processor has no bfloat16 arithmetic, float32 trains about three times as fast; leave it out"
        )

    def mixed(batch: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(batch.device.type, torch.bfloat16):
            return loss(batch, labels)

    return mixed


def has_bfloat16() -> bool:
    """Whether this processor computes in bfloat16 itself; where it does not, every product is converted and back."""
    found = torch.cpu.get_capabilities()
    return found.get("architecture") != "x86_64" or bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def along_gradient(classify: Classify, images: Tensor, eps: float) -> Tensor:
    """Images moved by one step of random size along the sign of the classifier's gradient: for half of them away from the label that it
    gives, for the others towards a random one.

    Args:
        images: float32 [n, C, H, W] in [0, 1]
        eps: largest step
    """
    moved = images.clone().requires_grad_(True)
    logits = classify(moved)[contract.LOGITS]
    away = torch.rand(len(images), device=images.device) < 0.5
    towards = torch.randint(logits.shape[1], (len(images),), device=images.device)
    losses = nn.functional.cross_entropy(logits, torch.where(away, logits.argmax(dim=1), towards), reduction="none")
    (gradient,) = torch.autograd.grad((losses * torch.where(away, 1.0, -1.0)).sum(), moved)
    steps = eps * torch.rand(len(images), 1, 1, 1, device=images.device)
    return (images + steps * gradient.sign()).clamp(0, 1)


def train_autoencoder(spec: AutoencoderSpec, images: Images, seed: int, folder: Path, classify: Classify | None = None) -> None:
    """Train a denoiser and write its weights into ``folder``.

    It minimises ``MSE(A(corrupt(x)), x)`` on clean images (NoiSec section 4.1); with guidance also the mean absolute difference of the
    classifier's features, and half of the noise then follows the classifier's gradient (Liao et al. 2018, "high-level representation
    guided denoiser").

    Args:
        classify: the protected classifier; only guidance asks it
    """
    torch.manual_seed(seed)
    network = DENOISERS[spec.network](images.shape)

    def loss(batch: Tensor, labels: Tensor) -> Tensor:
        corrupted = corrupt(batch, spec.noise_sd, spec.patches)
        if spec.blocks:
            start = len(batch) - round(BLOCK_SHARE * len(batch))
            corrupted[start:] = in_blocks(batch[start:], spec.blocks)
        if not spec.guidance:
            return nn.functional.mse_loss(network(corrupted), batch)
        assert classify is not None
        half = len(batch) // 2
        reconstruction = network(torch.cat([along_gradient(classify, batch[:half], spec.noise_sd), corrupted[half:]]))
        with torch.no_grad():
            wanted = classify(batch)[contract.PENULTIMATE].float()
        difference = nn.functional.l1_loss(classify(reconstruction)[contract.PENULTIMATE].float(), wanted)
        return nn.functional.mse_loss(reconstruction, batch) + spec.guidance * difference

    schedule = Schedule(spec.epochs, spec.batch_size, spec.learning_rate)
    optimise(network, images, lowered(loss) if spec.mixed_precision else loss, schedule, folder, "training autoencoder")


@dataclass(frozen=True)
class Schedule:
    """AdamW with a one-cycle learning rate."""

    epochs: int
    batch_size: int
    learning_rate: float


def optimise(network: nn.Module, images: Images, loss: Loss, schedule: Schedule, folder: Path, title: str) -> None:
    """Train, keeping a checkpoint of every epoch in ``folder`` and going on from the one that an interrupted run left there."""
    placed(network)
    size = min(schedule.batch_size, len(images))
    steps = len(images) // size
    optimiser = torch.optim.AdamW(network.parameters(), lr=schedule.learning_rate, weight_decay=1e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, schedule.learning_rate, total_steps=schedule.epochs * steps)
    parts: dict[str, Any] = {"network": network, "optimiser": optimiser, "rate": rate}
    done = _resume(folder / CHECKPOINT, parts)
    network.train()
    with bar(title, schedule.epochs * steps, done * steps) as shown:
        for epoch in range(done, schedule.epochs):
            for batch, labels in _batches(images, size, steps):
                value = loss(batch.to(DEVICE, memory_format=LAYOUT), labels.to(DEVICE))
                optimiser.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                rate.step()
                shown.advance(f"loss {value.item():.4f}")
            _save(
                {**{name: part.state_dict() for name, part in parts.items()}, "epoch": epoch + 1, "random": torch.get_rng_state()},
                folder / CHECKPOINT,
            )
    _save(network.cpu().state_dict(), folder / WEIGHTS)
    (folder / CHECKPOINT).unlink(missing_ok=True)


def _resume(checkpoint: Path, parts: dict[str, Any]) -> int:
    """Epochs that an interrupted run has finished; its state goes into ``parts``."""
    if not checkpoint.is_file():
        return 0
    state = torch.load(checkpoint, weights_only=True, map_location=DEVICE)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["random"].cpu())
    console.print(f"  going on after epoch {state['epoch']}")
    return int(state["epoch"])


def _save(state: Any, path: Path) -> None:
    """Write a file that is there whole or not at all."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_network(network: nn.Module, folder: Path) -> nn.Module:
    """The network with the weights that training left in ``folder``, in evaluation mode."""
    network.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True))
    return network.eval()


def _batches(images: Images, size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(images)).numpy()
    for step in range(steps):
        rows = images[order[step * size : (step + 1) * size]]
        yield torch.from_numpy(rows.floats()), torch.from_numpy(rows.labels)
