"""Attacks on a classifier, from the Adversarial Robustness Toolbox."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from noisec.builders.datasets import Images, with_natural_noise
from noisec.builders.progress import tracked
from noisec.builders.spec import BackdoorSpec
from noisec.builders.train import stamp
from torch import Tensor, nn

BATCH = 250
PGD_STEP, PGD_STEPS = 0.01, 25
"""NoiSec's settings for PGD and BIM, in the pixel scale [0, 1]"""


@dataclass(frozen=True)
class AttackSpec:
    """One white-box L-infinity attack on the classifier."""

    method: str
    """``fgsm`` (Goodfellow et al. 2015) or ``pgd`` (Madry et al. 2018)"""
    eps: float
    """largest change of a pixel, in [0, 1]"""

    @property
    def name(self) -> str:
        return f"{self.method}-{self.eps:g}"


DEFAULT_ATTACKS = (
    AttackSpec("fgsm", 0.05),
    AttackSpec("fgsm", 0.1),
    AttackSpec("pgd", 0.02),
    AttackSpec("pgd", 0.05),
    AttackSpec("pgd", 0.1),
)


@dataclass(frozen=True)
class AttackedImages:
    """What an attacker sends."""

    pixels: npt.NDArray[np.float32]
    """float32 [n, C, H, W] in [0, 1]"""
    labels: npt.NDArray[np.int64]
    """int64 [n], the true classes"""
    target: int | None = None
    """the class that the attacker wants; None: any wrong one"""

    def succeeded(self, predicted: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether each input got what the attacker wants: bool [n] from the classifier's labels int64 [n]."""
        wrong: npt.NDArray[np.bool_] = predicted != self.labels if self.target is None else predicted == self.target
        return wrong


class _LogitsOnly(nn.Module):
    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(images)[0]
        return logits


def white_box(classifier: nn.Module, images: Images, attack: AttackSpec, seed: int) -> AttackedImages:
    """Attack every image with the classifier's own gradients, from its true label.

    Args:
        classifier: images -> (logits, penultimate), in evaluation mode
    """
    with _quiet():
        from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch
        from art.estimators.classification import PyTorchClassifier
    np.random.seed(seed)
    torch.manual_seed(seed)
    _, *shape = images.pixels.shape
    with torch.no_grad():
        classes = classifier(torch.from_numpy(images[:1].floats()))[0].shape[1]
    estimator = PyTorchClassifier(
        _LogitsOnly(classifier), nn.CrossEntropyLoss(), tuple(shape), classes, clip_values=(0.0, 1.0), device_type="cpu"
    )
    if attack.method == "fgsm":
        method = FastGradientMethod(estimator, eps=attack.eps, batch_size=BATCH)
    else:
        step = min(PGD_STEP, attack.eps / 4)
        method = ProjectedGradientDescentPyTorch(
            estimator, eps=attack.eps, eps_step=step, max_iter=PGD_STEPS, num_random_init=1, batch_size=BATCH, verbose=False
        )
    parts = [
        method.generate(batch.floats(), y=np.eye(classes, dtype=np.float32)[batch.labels])
        for batch in tracked(_in_batches(images), f"attack {attack.name}", -(-len(images) // BATCH))
    ]
    return AttackedImages(np.concatenate(parts).astype(np.float32), images.labels)


def backdoored(images: Images, backdoor: BackdoorSpec) -> AttackedImages:
    """The trigger on every image that is not of the target class anyway."""
    rows = np.flatnonzero(images.labels != backdoor.target)
    chosen = images[rows]
    return AttackedImages(Images(stamp(chosen.pixels), chosen.labels).floats(), chosen.labels, target=backdoor.target)


def attack_all(
    classifier: nn.Module, images: Images, attacks: Sequence[AttackSpec], backdoor: BackdoorSpec | None, seed: int
) -> dict[str, AttackedImages]:
    """Every attack by name, the backdoor's trigger among them where the classifier has one."""
    results = {attack.name: white_box(classifier, images, attack, seed) for attack in attacks}
    if backdoor:
        results["badnets"] = backdoored(images, backdoor)
    return results


def noisy_clean(images: Images, deviation: float, seed: int) -> npt.NDArray[np.float32]:
    """Clean images with sensor noise: float32 [n, C, H, W]."""
    return with_natural_noise(images.floats(), deviation, seed)


def _in_batches(images: Images) -> Iterator[Images]:
    return (images[start : start + BATCH] for start in range(0, len(images), BATCH))


class _quiet:
    """Hides what ART logs while it is imported."""

    def __enter__(self) -> None:
        logging.disable(logging.WARNING)

    def __exit__(self, *error: object) -> None:
        logging.disable(logging.NOTSET)
