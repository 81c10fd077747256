"""Neuron noise: relative changes of a network's neurons that make it fail (BAN section 3.2).

A backdoored network is more sensitive to such noise than a clean one, and what it then answers is mostly the backdoor's target. That
holds where batch norms take their statistics under the noise (`batch_statistics`). With the statistics of training, every layer's
noise adds up to a shift that all images share, and clean networks collapse to one class just like backdoored ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from noisec.builders.audit.checks import logits_of, pieces
from noisec.errors import NoisecError

CHUNK = 128
"""images in one forward and backward pass, and behind one estimate of batch statistics"""
WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Noise = dict[str, Tensor]
"""parameter name -> relative change of each output channel, float32, of a shape that broadcasts over the parameter's"""


def noise_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """The noise's shape for each parameter that takes one.

    Batch norms: y = gamma (1 + delta) norm(x) + beta (1 + xi), one delta and one xi for each channel (BAN equation 3). A network without
    batch norms: the same for each output channel of the weights and biases of its convolutions and linear layers.

    Raises:
        NoisecError: the network has none of these.
    """
    shapes = _shapes(network, (_BatchNorm,)) or _shapes(network, (*WEIGHTED, *TRANSPOSED))
    if not shapes:
        raise NoisecError("audit: the classifier has no batch norm, convolution or linear layer with parameters of its own to put noise on")
    return shapes


def _shapes(network: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False) if isinstance(module, kinds) else ():
            channels = 1 if name == "weight" and isinstance(module, TRANSPOSED) else 0
            full = f"{path}.{name}" if path else name
            shapes[full] = tuple(size if axis == channels else 1 for axis, size in enumerate(parameter.shape))
    return shapes


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Batch norms normalise by the mean and variance of the batch that they see; nothing else is in training mode.

    The running statistics do not change in passes of `noisy_logits` or with `perturbed`."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    modes = [module.training for module in norms]
    for module in norms:
        module.train()
    try:
        yield
    finally:
        for module, mode in zip(norms, modes, strict=True):
            module.train(mode)


def random_noise(network: nn.Module, eps: float, seed: int) -> Noise:
    """Noise drawn from U(-eps, eps)."""
    generator = torch.Generator().manual_seed(seed)
    device = next(network.parameters()).device
    return {name: ((2 * torch.rand(shape, generator=generator) - 1) * eps).to(device) for name, shape in noise_shapes(network).items()}


def perturbed(network: nn.Module, noise: Noise) -> dict[str, Tensor]:
    """Parameters with noise on them, and copies of the buffers: what stands in for the module's own, which never change."""
    parameters = {name: parameter * (1 + noise[name]) for name, parameter in network.named_parameters() if name in noise}
    return {**parameters, **{name: buffer.clone() for name, buffer in network.named_buffers()}}


def noisy_logits(network: nn.Module, noise: Noise, images: Tensor) -> Tensor:
    """Logits [n, classes] of images [n, C, H, W] with the noise on."""
    return replaced_logits(network, images, perturbed(network, noise))


def replaced_logits(network: nn.Module, images: Tensor, replacing: dict[str, Tensor]) -> Tensor:
    """Logits [n, classes] of images [n, C, H, W] with other parameters and buffers."""
    return logits_of(functional_call(network, replacing, (images,)))


def adversarial_noise(network: nn.Module, images: Tensor, labels: Tensor, eps: float, steps: int, seed: int = 0) -> Noise:
    """The noise within +-eps that makes the cross-entropy of clean images large (BAN algorithm 1).

    It starts at U(-eps, eps) and takes ``steps`` steps of size eps / steps along the gradient's sign, each projected back to +-eps.

    Args:
        images: float32 [n, C, H, W] in [0, 1]
        labels: int64 [n]
    """
    noise = random_noise(network, eps, seed)
    for _ in range(steps):
        gradient = _gradient(network, noise, images, labels)
        noise = {name: (noise[name] + eps / steps * gradient[name].sign()).clamp(-eps, eps) for name in noise}
    return noise


def _gradient(network: nn.Module, noise: Noise, images: Tensor, labels: Tensor) -> Noise:
    """Gradient of the mean cross-entropy over all images by the noise."""
    total = {name: torch.zeros_like(values) for name, values in noise.items()}
    for chunk, truth in zip(pieces(images, CHUNK), pieces(labels, CHUNK), strict=True):
        leaves = {name: values.detach().requires_grad_() for name, values in noise.items()}
        loss = nn.functional.cross_entropy(noisy_logits(network, leaves, chunk), truth, reduction="sum") / len(images)
        parts = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for name, part in zip(leaves, parts, strict=True):
            if part is not None:
                total[name] += part
    return total
