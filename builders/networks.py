"""Reference classifiers and denoisers, by name.

Every network takes images ``float32 [batch, C, H, W]`` with pixels in [0, 1]. A classifier returns
``(logits [batch, classes], penultimate [batch, d])``; a denoiser returns a reconstruction of its input's shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from noisec.errors import NoisecError

Shape = tuple[int, int, int]
"""(C, H, W)"""


def conv_block(inputs: int, outputs: int, layers: int = 2) -> nn.Sequential:
    """``layers`` times [3x3 convolution, batch norm, ReLU]."""
    steps: list[nn.Module] = []
    for index in range(layers):
        width = inputs if index == 0 else outputs
        steps += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*steps)


class ConvClassifier(nn.Module):
    """Convolution blocks, each halved by max pooling, then fully connected layers.

    The penultimate activations are those of the last hidden layer *before* its ReLU (NoiSec section 4.2 and its authors'
    code): a mixture fits signed activations better than rectified ones.
    """

    def __init__(
        self, shape: tuple[int, int, int], classes: int, widths: tuple[int, ...], hidden: tuple[int, ...], layers: int, dropout: float
    ) -> None:
        super().__init__()
        channels, height, width = shape
        if min(height, width) >> len(widths) == 0:
            raise NoisecError(
                f"images of {height} x {width} are too small for this network; at least {1 << len(widths)} pixels a side are needed"
            )
        blocks: list[nn.Module] = []
        for outputs in widths:
            blocks += [conv_block(channels, outputs, layers), nn.MaxPool2d(2), nn.Dropout(dropout)]
            channels, height, width = outputs, height // 2, width // 2
        features = channels * height * width
        self.features = nn.Sequential(*blocks, nn.Flatten())
        dense: list[nn.Module] = []
        for index, units in enumerate(hidden):
            dense += [nn.ReLU(inplace=False)] if index else []
            dense += [nn.Linear(features, units)]
            features = units
        self.hidden = nn.Sequential(*dense)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(features, classes))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        penultimate = self.hidden(self.features(images))
        return self.head(penultimate), penultimate


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a parameter-free shortcut: strided, new channels filled with zeros (He et al. 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def forward(self, images: Tensor) -> Tensor:
        shortcut = images[:, :, :: self.stride, :: self.stride]
        if self.padding:
            shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding))
        hidden = nn.functional.relu(self.bn1(self.conv1(images)))
        return nn.functional.relu(self.bn2(self.conv2(hidden)) + shortcut)


class ResNet20(nn.Module):
    """The CIFAR-10 residual network with 20 layers (He et al. 2016, section 4.2), 64 pooled features, logits alone.

    Parameters carry the names of the widely used pretrained files, so that those load; such files want ImageNet's mean and deviation.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1)
        self.layer2 = self._stage(16, 32, 2)
        self.layer3 = self._stage(32, 64, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(ResidualBlock(inputs, outputs, stride), ResidualBlock(outputs, outputs, 1), ResidualBlock(outputs, outputs, 1))

    def forward(self, images: Tensor) -> Tensor:
        hidden = nn.functional.relu(self.bn1(self.conv1(images)))
        pooled = self.layer3(self.layer2(self.layer1(hidden))).mean(dim=(2, 3))
        logits: Tensor = self.linear(pooled)
        return logits


class UNetDenoiser(nn.Module):
    """A U-Net that predicts the noise and subtracts it: ``A(x) = x - g(x)``.

    Skip connections leave a clean image almost untouched, so that the noise ``x - A(x)`` shows the input and not the
    autoencoder's own blur. Batch norm is left out: its statistics would tie the noise level of one image to the others'.
    """

    def __init__(self, shape: tuple[int, int, int], widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        self.down = nn.ModuleList()
        channels = shape[0]
        for width in widths:
            self.down.append(self._block(channels, width))
            channels = width
        self.up = nn.ModuleList()
        self.merge = nn.ModuleList()
        for width in reversed(widths[:-1]):
            self.up.append(nn.ConvTranspose2d(channels, width, 2, stride=2))
            self.merge.append(self._block(2 * width, width))
            channels = width
        self.noise = nn.Conv2d(channels, shape[0], 3, padding=1)
        nn.init.zeros_(self.noise.weight)
        assert self.noise.bias is not None
        nn.init.zeros_(self.noise.bias)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.ReLU(inplace=True),
        )

    def forward(self, images: Tensor) -> Tensor:
        skips: list[Tensor] = []
        hidden = images
        for level, block in enumerate(self.down):
            hidden = block(nn.functional.max_pool2d(hidden, 2) if level else hidden)
            skips.append(hidden)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            hidden = merge(torch.cat([up(hidden), skips.pop()], dim=1))
        reconstruction: Tensor = images - self.noise(hidden)
        return reconstruction


class BottleneckAutoencoder(nn.Module):
    """The published autoencoder (NoiSec, appendix): convolutions to a latent vector and back, linear output."""

    def __init__(self, shape: tuple[int, int, int], latent: int) -> None:
        super().__init__()
        channels, height, width = shape
        corner = (64, height // 4, width // 4)
        flat = corner[0] * corner[1] * corner[2]
        relu = nn.ReLU
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1), relu(),
            nn.Conv2d(16, 16, 3, padding=1), relu(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), relu(),
            nn.Conv2d(32, 32, 3, padding=1), relu(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), relu(),
            nn.Conv2d(64, 64, 3, padding=1), relu(),
            nn.Flatten(), nn.Linear(flat, latent),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(latent, flat), relu(), nn.Unflatten(1, corner),
            nn.ConvTranspose2d(64, 64, 3, padding=1), relu(),
            nn.ConvTranspose2d(64, 32, 3, stride=2, padding=1, output_padding=1), relu(),
            nn.ConvTranspose2d(32, 32, 3, padding=1), relu(),
            nn.ConvTranspose2d(32, 16, 3, stride=2, padding=1, output_padding=1), relu(),
            nn.ConvTranspose2d(16, 16, 3, padding=1), relu(),
            nn.ConvTranspose2d(16, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        reconstruction: Tensor = self.decoder(self.encoder(images))
        return reconstruction


class Padded(nn.Module):
    """A network that halves its images twice, for images of any size: edges are repeated up to a multiple of four, and cut off again."""

    def __init__(self, network: Callable[[Shape], nn.Module], shape: Shape) -> None:
        super().__init__()
        channels, self.height, self.width = shape
        self.below, self.right = -self.height % 4, -self.width % 4
        self.network = network((channels, self.height + self.below, self.width + self.right))

    def forward(self, images: Tensor) -> Tensor:
        padded = nn.functional.pad(images, (0, self.right, 0, self.below), mode="replicate")
        result: Tensor = self.network(padded)[:, :, : self.height, : self.width]
        return result


def denoiser(network: Callable[[Shape], nn.Module], shape: Shape) -> nn.Module:
    """The network, padded only where the image's size asks for it."""
    return Padded(network, shape) if shape[1] % 4 or shape[2] % 4 else network(shape)


CLASSIFIERS: dict[str, Callable[[Shape, int], nn.Module]] = {
    # NoiSec's Fashion-MNIST classifier: three convolutions, three dense layers, 128 features.
    "conv3": lambda shape, classes: ConvClassifier(shape, classes, (32, 64, 128), (256, 128), layers=1, dropout=0.1),
    # NoiSec's CIFAR-10 classifier: three blocks of two convolutions, widths 32/64/128, 256 features.
    "conv6": lambda shape, classes: ConvClassifier(shape, classes, (32, 64, 128), (256,), layers=2, dropout=0.25),
}
"""name -> (image shape, number of classes) -> classifier"""

DENOISERS: dict[str, Callable[[Shape], nn.Module]] = {
    "unet": lambda shape: denoiser(UNetDenoiser, shape),
    "unet-small": lambda shape: denoiser(lambda padded: UNetDenoiser(padded, (8, 16, 32)), shape),
    "bottleneck": lambda shape: denoiser(lambda padded: BottleneckAutoencoder(padded, 256 if shape[0] == 1 else 1024), shape),
}
"""name -> image shape -> denoiser"""
