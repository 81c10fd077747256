"""The feature mask: which activations of the last feature map carry the classes, and which are left for a backdoor (BAN section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from noisec.builders.audit.checks import logits_of, pieces
from noisec.builders.audit.neurons import CHUNK, replaced_logits
from noisec.errors import NoisecError

LEARNING_RATE = 0.01
START = 0.5
"""the mask before training, everywhere"""
MASK_BATCH = 32
"""images in one step of the mask's training"""


@dataclass(frozen=True)
class Place:
    """One output of one module."""

    module: str
    call: int
    """0 for the first call of the module in a forward pass"""
    shape: tuple[int, ...]
    """(C, H, W)"""


class SplitNetwork:
    """A network cut at its last feature map: a body, images -> features [n, C, H, W], and a head, features -> logits [n, classes].

    The feature map is the last output of a submodule that has four dimensions and more than one pixel; where every map has one
    pixel, the last of those. Nothing of the network is rewritten: hooks, removed after each pass, read or replace that output. The
    head alone is run by replacing it while the body sees a single blank image.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        """Find the feature map.

        Args:
            network: in evaluation mode, without gradients of its own (`noisec.builders.audit.checks.frozen`)
            images: float32 [n, C, H, W], a few to try it on

        Raises:
            NoisecError: there is no feature map, or more than it leads to the logits.
        """
        self.network = network
        self.place = last_feature_map(network, images[:2])
        self.blank = torch.zeros_like(images[:1])
        self.alone = True
        self.alone = self._head_answers(images[:3])
        if not self.alone and not self._head_answers(images[:3]):
            raise NoisecError(
                f"audit: the classifier's logits depend on more than its last feature map ({self.place.module}); "
                "give a module in which every path leads through it"
            )

    def _head_answers(self, images: Tensor) -> bool:
        """Whether body and head in turn answer as the whole network does."""
        with torch.no_grad():
            whole = logits_of(self.network(images))
            try:
                parts = self.head(self.features(images))
            except (RuntimeError, ValueError):  # the head reads the body's batch size
                return False
        return whole.shape == parts.shape and torch.allclose(whole, parts, rtol=1e-3, atol=1e-3)

    def features(self, images: Tensor) -> Tensor:
        """The feature map [n, C, H, W] of images, without gradients."""
        with torch.no_grad():
            return torch.cat([self.tracked_features(chunk) for chunk in pieces(images, CHUNK)])

    def tracked_features(self, images: Tensor) -> Tensor:
        """The feature map [n, C, H, W] of images, with gradients by the images."""
        seen: list[Tensor] = []

        def keep(output: Tensor) -> Tensor:
            seen.append(output.clone())  # a later step may work in place
            return output

        with self._changed(keep):
            self.network(images)
        return seen[0]

    def head(self, features: Tensor) -> Tensor:
        """Logits [n, classes] of feature maps [n, C, H, W]."""
        blank = self.blank if self.alone else self.blank.expand(len(features), -1, -1, -1)
        with self._changed(lambda output: features.clone()):
            return logits_of(self.network(blank))

    def masked(self, images: Tensor, mask: Tensor, replacing: dict[str, Tensor] | None = None) -> Tensor:
        """Logits [n, classes] of images whose feature map is multiplied by a mask [1, C, H, W].

        Args:
            replacing: tensors that stand in for parameters and buffers (`noisec.builders.audit.neurons.perturbed`)
        """
        with self._changed(lambda output: output * mask):
            return replaced_logits(self.network, images, replacing or {})

    @contextmanager
    def _changed(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """The feature map changed on its way to the head, for one forward pass."""
        calls = 0

        def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return change(output) if calls == self.place.call + 1 else output

        handle = self.network.get_submodule(self.place.module).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def last_feature_map(network: nn.Module, images: Tensor) -> Place:
    """Where the last feature map before pooling comes out.

    Raises:
        NoisecError: no submodule gives a tensor of four dimensions.
    """
    places: list[Place] = []
    calls: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            call = calls[name] = calls.get(name, -1) + 1
            if isinstance(output, Tensor) and output.dim() == 4:
                places.append(Place(name, call, tuple(output.shape[1:])))

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in network.named_modules() if name]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    if not places:
        raise NoisecError(
            "audit: no submodule of the classifier gives a feature map [n, C, H, W]; the audit is for convolutional classifiers"
        )
    return next((place for place in reversed(places) if place.shape[1] * place.shape[2] > 1), places[-1])


def feature_mask(split: SplitNetwork, images: Tensor, labels: Tensor, weight: float, epochs: int, seed: int) -> Tensor:
    """A mask m [1, C, H, W] in [0, 1] over the feature map f that keeps what the classes need and nothing else.

    It minimises CE(h(m f), y) - CE(h((1 - m) f), y) + weight ||m|| / stopgrad(||m||) in L1 (BAN equation 6), so that 1 - m keeps what the
    classes do not need: a backdoor's features, if there are any. The body is fixed, so f is computed once.

    Args:
        images: float32 [n, C, H, W] in [0, 1]
        labels: int64 [n]
    """
    features = split.features(images)
    mask = torch.full((1, *split.place.shape), START, device=images.device, requires_grad=True)
    optimiser = torch.optim.Adam([mask], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in pieces(torch.randperm(len(features), generator=generator).to(images.device), MASK_BATCH):
            loss = mask_loss(split, mask, features[rows], labels[rows], weight)
            (mask.grad,) = torch.autograd.grad(loss, [mask])
            optimiser.step()
            mask.data.clamp_(0, 1)
    return mask.detach()


def mask_loss(split: SplitNetwork, mask: Tensor, features: Tensor, labels: Tensor, weight: float) -> Tensor:
    """The objective of `feature_mask`, a scalar."""
    kept = nn.functional.cross_entropy(split.head(mask * features), labels)
    rest = nn.functional.cross_entropy(split.head((1 - mask) * features), labels)
    norm = mask.abs().sum()
    return kept - rest + weight * norm / norm.detach().clamp_min(1e-12)
