"""Training of reference classifiers and denoisers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from noisec.builders.datasets import Images
from noisec.builders.networks import CLASSIFIERS, DENOISERS
from noisec.builders.progress import bar
from noisec.builders.spec import AutoencoderSpec, BackdoorSpec, ClassifierSpec
from torch import Tensor, nn

PATCH_SIDES = (2, 6)
"""smallest and one more than the largest side of a random patch, in pixels"""


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
    return Images(pixels, labels)


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
    deviations = deviation * torch.rand(count, 1, 1, 1)
    gauss = torch.randn_like(images)
    noise = torch.where(torch.rand(count, 1, 1, 1) < 0.5, gauss, gauss.sign())
    corrupted = (images + deviations * noise).clamp(0, 1)
    for row in torch.nonzero(torch.rand(count) < patches).flatten().tolist():
        side = int(torch.randint(*PATCH_SIDES, ()))
        top, left = int(torch.randint(height - side + 1, ())), int(torch.randint(width - side + 1, ()))
        kinds = torch.rand(channels, side, side).round(), torch.rand(channels, 1, 1), torch.ones(channels, 1, 1)
        corrupted[row, :, top : top + side, left : left + side] = kinds[int(torch.randint(len(kinds), ()))]
    return corrupted


def train_classifier(spec: ClassifierSpec, images: Images, classes: int, seed: int) -> nn.Module:
    """A reference classifier, in evaluation mode. Images are mirrored at random."""
    torch.manual_seed(seed)
    if spec.backdoor:
        images = poison(images, spec.backdoor, seed)
    network = CLASSIFIERS[spec.network](_shape(images), classes)

    def loss(batch: Tensor, labels: Tensor) -> Tensor:
        mirrored = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, batch.flip(-1), batch)
        return nn.functional.cross_entropy(network(mirrored)[0], labels)

    return _optimise(network, images, loss, spec.epochs, spec.batch_size, spec.learning_rate, "training classifier")


def train_autoencoder(spec: AutoencoderSpec, images: Images, seed: int) -> nn.Module:
    """A denoiser, in evaluation mode: minimises ``MSE(A(corrupt(x)), x)`` on clean images (NoiSec section 4.1)."""
    torch.manual_seed(seed)
    network = DENOISERS[spec.network](_shape(images))

    def loss(batch: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.mse_loss(network(corrupt(batch, spec.noise_sd, spec.patches)), batch)

    return _optimise(network, images, loss, spec.epochs, spec.batch_size, spec.learning_rate, "training autoencoder")


def _shape(images: Images) -> tuple[int, int, int]:
    _, channels, height, width = images.pixels.shape
    return channels, height, width


def _optimise(
    network: nn.Module,
    images: Images,
    loss: Callable[[Tensor, Tensor], Tensor],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    title: str,
) -> nn.Module:
    """AdamW with a one-cycle schedule."""
    steps = len(images) // min(batch_size, len(images))
    optimiser = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=epochs * steps)
    network.train()
    with bar(title, epochs * steps) as shown:
        for _ in range(epochs):
            for batch, labels in _batches(images, batch_size, steps):
                value = loss(batch, labels)
                optimiser.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
                shown.advance(f"loss {value.item():.4f}")
    return network.eval()


def _batches(images: Images, size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(images)).numpy()
    for step in range(steps):
        rows = images[order[step * size : (step + 1) * size]]
        yield torch.from_numpy(rows.floats()), torch.from_numpy(rows.labels)
