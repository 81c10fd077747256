"""Three families of small classifiers with batch norm: images float32 [n, C, H, W] in [0, 1] -> logits [n, classes].

Each has the make of a large one that audits are published for (ResNet-18, VGG-16, DenseNet-121), and takes 10 to 15 million
multiplications an image of 1 x 28 x 28.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from noisec.builders.networks import Shape, conv_block


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut, a 1x1 convolution where the shape changes (He et al. 2016, option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        changed = stride != 1 or inputs != outputs
        projection = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = projection if changed else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.relu(self.body(images) + self.shortcut(images))
        return result


class Dense(nn.Module):
    """Batch norm, ReLU, 3x3 convolution; what comes out is put beside what went in (Huang et al. 2017)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, growth, 3, padding=1, bias=False))

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images, self.body(images)], dim=1)


def resnet(shape: Shape, classes: int) -> nn.Module:
    """A stem, four residual blocks and average pooling."""
    return nn.Sequential(
        conv_block(shape[0], 16, 1),
        Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2), Residual(64, 64, 1),
        *_averaged(64, classes),
    )  # fmt: skip


def vgg(shape: Shape, classes: int) -> nn.Module:
    """Seven convolutions, halved by max pooling three times, and a hidden fully connected layer."""
    flat = 80 * (shape[1] // 8) * (shape[2] // 8)
    return nn.Sequential(
        conv_block(shape[0], 20, 2), nn.MaxPool2d(2), conv_block(20, 40, 2), nn.MaxPool2d(2), conv_block(40, 80, 3), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(flat, 128), nn.ReLU(), nn.Linear(128, classes),
    )  # fmt: skip


def densenet(shape: Shape, classes: int) -> nn.Module:
    """Three dense blocks with transitions that halve channels and size."""
    steps: list[nn.Module] = [nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)]
    channels = 16
    for index, (layers, growth) in enumerate(((3, 8), (4, 12), (4, 16))):
        if index:
            halved = channels // 2
            steps += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, halved, 1, bias=False), nn.AvgPool2d(2)]
            channels = halved
        for _ in range(layers):
            steps.append(Dense(channels, growth))
            channels += growth
    return nn.Sequential(*steps, nn.BatchNorm2d(channels), nn.ReLU(), *_averaged(channels, classes))


def _averaged(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


FAMILIES: dict[str, Callable[[Shape, int], nn.Module]] = {"resnet": resnet, "vgg": vgg, "densenet": densenet}
"""name -> (image shape, number of classes) -> classifier"""
