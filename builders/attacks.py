"""Attacks on a classifier, from the Adversarial Robustness Toolbox."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from noisec.builders.images import BATCH, Floats, Images, natural
from noisec.builders.progress import tracked
from noisec.builders.protect import Protected
from noisec.builders.spec import BackdoorSpec, GuardSpec
from noisec.builders.train import stamp
from noisec.errors import NoisecError

PGD_STEP, PGD_STEPS = 0.01, 25
"""NoiSec's settings for PGD and BIM, in the pixel scale [0, 1]"""
SQUARE_QUERIES = 250
"""NoiSec's setting for Fashion-MNIST"""
UAP_IMAGES, UAP_ROUNDS = 300, 5
"""images that a universal perturbation is made of, and how often all of them are gone through"""
CW_STEPS, CW_SEARCHES = 30, 3
BLACK_BOX = ("square", "hopskipjump")
"""methods that use the classifier's answers alone"""
UNBOUNDED = ("cw", "deepfool", "hopskipjump")
"""methods without a largest change: they make it as small as they can"""
METHODS = ("fgsm", "bim", "pgd", "autoattack", "uap", "square", *UNBOUNDED)


@dataclass(frozen=True)
class AttackSpec:
    """One L-infinity attack on the classifier."""

    method: str
    """``fgsm`` (Goodfellow et al. 2015), ``bim`` (Kurakin et al. 2017), ``pgd`` (Madry et al. 2018), ``autoattack`` (Croce and Hein 2020),
    ``uap`` (Moosavi-Dezfooli et al. 2017), ``cw`` (Carlini and Wagner 2017) and ``deepfool`` (Moosavi-Dezfooli et al. 2016) use its
    gradients, ``square`` (Andriushchenko et al. 2020) and ``hopskipjump`` (Chen et al. 2020) its answers"""
    eps: float
    """largest change of a pixel, in [0, 1]; ``cw``, ``deepfool`` and ``hopskipjump`` have no bound and make it as small as they can"""

    @classmethod
    def parse(cls, name: str) -> AttackSpec:
        """From ``method-epsilon``, or ``method`` alone where it has no bound.

        Raises:
            NoisecError: there is no such method, or an epsilon is missing, superfluous or out of (0, 1].
        """
        method, _, eps = name.partition("-")
        if method not in METHODS:
            raise NoisecError(f"attack {name!r}: no method {method!r}; there are {', '.join(METHODS)}")
        if method in UNBOUNDED and not eps:
            return cls(method, 0.0)
        if method in UNBOUNDED or not re.fullmatch(r"0?\.\d*[1-9]\d*|1", eps):
            wanted = method if method in UNBOUNDED else f"{method}-EPS with EPS in (0, 1], such as {method}-0.05"
            raise NoisecError(f"attack {name!r}: expected {wanted}")
        return cls(method, float(eps))

    @property
    def name(self) -> str:
        return f"{self.method}-{self.eps:g}"


WITH_GRADIENTS = ("fgsm-0.05", "fgsm-0.1", "pgd-0.02", "pgd-0.05", "pgd-0.1")
WITHOUT_GRADIENTS = ("square-0.05", "square-0.1")
TRIGGER = "badnets"


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

    def save(self, path: Path) -> None:
        np.savez(path, pixels=self.pixels, labels=self.labels, target=np.array(-1 if self.target is None else self.target))

    @classmethod
    def load(cls, path: Path) -> AttackedImages:
        with np.load(path, allow_pickle=False) as arrays:
            target = int(arrays["target"])
            return cls(arrays["pixels"], arrays["labels"], None if target < 0 else target)


def attack(protected: Protected, images: Images, spec: AttackSpec, seed: int, queries: int = SQUARE_QUERIES) -> AttackedImages:
    """Attack every image from its true label, white-box with gradients or with the classifier's answers alone.

    Args:
        queries: of Square; HopSkipJump's steps follow from it
    """
    with _quiet():
        from art.estimators.classification import BlackBoxClassifierNeuralNetwork, PyTorchClassifier
    np.random.seed(seed)
    torch.manual_seed(seed)
    if spec.method in BLACK_BOX:
        estimator = BlackBoxClassifierNeuralNetwork(
            protected.original, images.shape, protected.classes, channels_first=True, clip_values=(0.0, 1.0)
        )
    else:
        estimator = PyTorchClassifier(
            protected.network, nn.CrossEntropyLoss(), images.shape, protected.classes, clip_values=(0.0, 1.0), device_type="cpu"
        )
    if spec.method == "uap":
        return AttackedImages(_universal(estimator, images, spec.eps), images.labels)
    method = _method(estimator, spec, queries)
    parts = [
        method.generate(batch.floats(), y=np.eye(protected.classes, dtype=np.float32)[batch.labels])
        for batch in tracked(images.batches(), f"attack {spec.name}", -(-len(images) // BATCH))
    ]
    return AttackedImages(np.concatenate(parts).astype(np.float32), images.labels)


def _method(estimator: Any, spec: AttackSpec, queries: int) -> Any:
    """The attack of the Adversarial Robustness Toolbox."""
    with _quiet():
        from art.attacks import evasion
    shown: dict[str, Any] = {"batch_size": BATCH, "verbose": False}
    step = min(PGD_STEP, spec.eps / 4)
    made: dict[str, Callable[[], Any]] = {
        "fgsm": lambda: evasion.FastGradientMethod(estimator, eps=spec.eps, batch_size=BATCH),
        "bim": lambda: evasion.BasicIterativeMethod(estimator, eps=spec.eps, eps_step=step, max_iter=PGD_STEPS, **shown),
        "pgd": lambda: evasion.ProjectedGradientDescentPyTorch(
            estimator, eps=spec.eps, eps_step=step, max_iter=PGD_STEPS, num_random_init=1, **shown
        ),
        "autoattack": lambda: evasion.AutoAttack(estimator, eps=spec.eps, eps_step=step, batch_size=BATCH),
        "cw": lambda: evasion.CarliniL2Method(estimator, max_iter=CW_STEPS, binary_search_steps=CW_SEARCHES, **shown),
        "deepfool": lambda: evasion.DeepFool(estimator, max_iter=50, **shown),
        "square": lambda: evasion.SquareAttack(estimator, eps=spec.eps, max_iter=queries, nb_restarts=1, **shown),
        "hopskipjump": lambda: evasion.HopSkipJump(estimator, max_iter=10, max_eval=queries, init_eval=20, **shown),
    }
    return made[spec.method]()


def _universal(estimator: Any, images: Images, eps: float) -> Floats:
    """One perturbation for all images, made of the first ``UAP_IMAGES`` (Moosavi-Dezfooli et al. 2017; inner attack FGSM)."""
    with _quiet():
        from art.attacks.evasion import UniversalPerturbation
    inner = {"eps": eps, "norm": np.inf}
    method = UniversalPerturbation(estimator, "fgsm", inner, delta=0.05, max_iter=UAP_ROUNDS, eps=eps, norm=np.inf, verbose=False)
    method.generate(images[:UAP_IMAGES].floats())
    shifted: Floats = np.concatenate([np.clip(batch.floats() + method.noise, 0, 1) for batch in images.batches()]).astype(np.float32)
    return shifted


def backdoored(images: Images, backdoor: BackdoorSpec) -> AttackedImages:
    """The trigger on every image that is not of the target class anyway."""
    rows = np.flatnonzero(images.labels != backdoor.target)
    chosen = images[rows]
    return AttackedImages(stamp(chosen.pixels).astype(np.float32) / 255, chosen.labels, target=backdoor.target)


def attack_all(spec: GuardSpec, protected: Protected, images: Images) -> Iterator[tuple[str, AttackedImages]]:
    """Every attack that the specification asks for by name, one at a time, and the backdoor's trigger where the classifier has one."""
    for name in names(spec, protected):
        if name == TRIGGER:
            assert spec.classifier.backdoor is not None
            yield name, backdoored(images, spec.classifier.backdoor)
        else:
            yield name, attack(protected, images, AttackSpec.parse(name), spec.seed)


def names(spec: GuardSpec, protected: Protected) -> list[str]:
    """The attacks of a guard's report."""
    chosen = spec.attacks or (WITH_GRADIENTS if protected.network else WITHOUT_GRADIENTS)
    return [*chosen, *([TRIGGER] if spec.classifier.backdoor else [])]


def noisy_clean(images: Images, deviation: float, seed: int) -> npt.NDArray[np.float32]:
    """Clean images, half of them with sensor noise: float32 [n, C, H, W]."""
    return np.concatenate(list(natural(images, deviation, seed)))


class _quiet:
    """Hides what ART logs while it is imported."""

    def __enter__(self) -> None:
        logging.disable(logging.WARNING)

    def __exit__(self, *error: object) -> None:
        logging.disable(logging.NOTSET)
