"""What is compared: the guard's own verdict, each of its statistics alone, the published method, and other papers' detectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

from noisec import contract
from noisec.benchmarks.detection.baselines import (
    Artifacts,
    Baseline,
    IbdPsc,
    MagNet,
    Manda,
    ScaleUp,
    Strip,
    Supervised,
    Transitions,
    divergence_alone,
    layers_of,
    reconstruction_error_alone,
)
from noisec.benchmarks.detection.subject import Subject
from noisec.builders.audit.restored import Restored
from noisec.builders.calibrate import fit_tensors
from noisec.builders.images import Floats, Images
from noisec.builders.progress import console
from noisec.builders.protect import STAGE
from noisec.builders.spec import DetectorSpec
from noisec.builders.stages import Tensors
from noisec.errors import NoisecError
from noisec.python_backend.scorer.detectors import Head
from noisec.python_backend.scorer.scoring import conformal_threshold

ALPHA = 0.01
BASELINE_FIT, BASELINE_CALIBRATE = 3000, 1000
"""clean images that baselines are fitted on, of which the supervised ones see the last third under FGSM, and calibrated on"""
PUBLISHED = "NoiSec as published"
LEAKED = "NoiSec as published, fitted on the tested images"
LEAKED_IMAGES, LEAKED_COPIES = 100, 5
"""images of the paper's experiment, and noisy copies of each that its mixture is fitted on"""
ALONE = {
    "F(n) mixture": DetectorSpec(view="noise"),
    "F(n) class Gaussian": DetectorSpec(kind="class-gaussian", view="noise"),
    "dF mixture": DetectorSpec(view="delta"),
    "dF class Gaussian": DetectorSpec(kind="class-gaussian", view="delta"),
    "d logits class Gaussian": DetectorSpec(kind="logit-gaussian", view="delta"),
    "divergence": DetectorSpec(kind="divergence", view="delta"),
    "F(x) class Gaussian": DetectorSpec(kind="class-gaussian", view="image"),
    "F(x) density": DetectorSpec(kind="density", view="image"),
    "F(x) local dimension": DetectorSpec(kind="dimension", view="image"),
    "head mutation": DetectorSpec(kind="mutation", view="image"),
}
"""each statistic by itself, fitted and calibrated as the guard's own are"""
OF_COPIES: dict[contract.Pass, tuple[str, dict[str, DetectorSpec]]] = {
    "amplified": ("amplified passes", {"amplified confidence": DetectorSpec(kind="confidence", view="amplified")}),
    "hardened": (
        "hardened copy",
        {
            "hardened dissent": DetectorSpec(kind="dissent", view="hardened"),
            "hardened divergence": DetectorSpec(kind="divergence", view="hardened"),
        },
    ),
}
"""pass of a copy of the classifier -> what the copy is called, and the statistics of its view, where the guard makes it"""


@dataclass(frozen=True)
class Sent:
    """Inputs, and what the stages answer to them."""

    pixels: Floats
    """[n, C, H, W] in [0, 1]"""
    tensors: Tensors

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """The classifier's labels, int [n]."""
        labels: npt.NDArray[np.int64] = self.tensors[contract.LOGITS].argmax(axis=1).astype(np.int64)
        return labels


Score = Callable[[Sent], Floats]
"""inputs -> float32 [n], higher is more suspicious"""


@dataclass(frozen=True)
class Calibrated:
    """A detector with the threshold that its scores of the calibration images set."""

    score: Score
    threshold: float

    @classmethod
    def on(cls, score: Score, calibration: Sent) -> Calibrated:
        return cls(score, float(conformal_threshold(np.sort(score(calibration)), ALPHA)))


def panel(subject: Subject, fit: Sent, calibration: Sent) -> dict[str, Calibrated]:
    """The guard's own verdict, its statistics alone, and the published method; all fitted and calibrated on the same images.

    Args:
        fit, calibration: the guard's own sets, with natural noise
    """
    own = Calibrated(lambda sent: subject.scorer.score(sent.tensors), float(subject.scorer.threshold))
    found = {"default": own}
    for name, detectors in ablations(subject).items():
        found |= fitted(name, partial(refitted, subject, detectors, subject.spec.noise_levels, fit, calibration))
    found[PUBLISHED] = refitted(subject, (DetectorSpec(view="noise"),), 1, fit, calibration)
    found["noise level"] = Calibrated.on(lambda sent: sent.tensors[contract.NOISE_LEVEL][:, 0], calibration)
    return found


def ablations(subject: Subject) -> dict[str, tuple[DetectorSpec, ...]]:
    """Each statistic alone; where the guard asks a copy of the classifier, that one's too, and the guard without it."""
    found: dict[str, tuple[DetectorSpec, ...]] = {name: (detector,) for name, detector in ALONE.items()}
    for one, (copy, statistics) in OF_COPIES.items():
        if one in subject.spec.copies:
            found |= {name: (detector,) for name, detector in statistics.items()}
            others = tuple(other for other in subject.spec.detectors if other.view != one)
            found |= {f"default without {copy}": others} if others else {}
    return found


def fitted(name: str, make: Callable[[], Calibrated]) -> dict[str, Calibrated]:
    """A detector under its name; nothing where a statistic says the same of too many images, as of two classes it may."""
    try:
        return {name: make()}
    except NoisecError as error:
        console.print(f"{name} is left out: {error}")
        return {}


def refitted(subject: Subject, detectors: tuple[DetectorSpec, ...], levels: int, fit: Sent, calibration: Sent) -> Calibrated:
    """The guard with other detectors."""
    spec = subject.spec.model_copy(update={"detectors": detectors, "noise_levels": levels, "target_fpr": ALPHA})
    scorer = fit_tensors(spec, fit.tensors, calibration.tensors, subject.head)
    return Calibrated(lambda sent: scorer.score(sent.tensors), float(scorer.threshold))


def leaked(noise: Floats) -> Calibrated:
    """The mixture of the paper's own experiment, fitted on noisy copies of the very images that are then tested.

    With 500 rows for up to 256 dimensions it knows those images by heart; its threshold is the 99th percentile of the same rows.

    Args:
        noise: F(n) of the copies, float32 [n, d]
    """
    mixture = GaussianMixture(random_state=0).fit(noise)

    def score(sent: Sent) -> Floats:
        surprise: Floats = -mixture.score_samples(sent.tensors[contract.PASSES["noise"]]).astype(np.float32)
        return surprise

    return Calibrated(score, float(np.quantile(-mixture.score_samples(noise), 1 - ALPHA)))


def baselines(subject: Subject, images: Images, attacked: Floats, calibration: Sent, *, backdoors: bool) -> dict[str, Calibrated]:
    """Other papers' detectors.

    Args:
        images: clean fit images
        attacked: FGSM on the last of them, float32 [m, C, H, W], for those that learn from attacks
        backdoors: those for backdoored inputs, too
    """
    network = WithHead(subject.features, subject.head)
    noise = subject.spec.natural_noise_sd
    learned: list[Baseline] = [
        MagNet(subject.denoiser, noise_sd=noise),
        reconstruction_error_alone(subject.denoiser, noise_sd=noise),
        divergence_alone(subject.denoiser, noise_sd=noise),
        Transitions(layers_of(subject.stages["classifier"])),
    ]
    if backdoors:
        learned += [Strip(), ScaleUp(), IbdPsc(Restored(subject.stages["classifier"] / STAGE, subject.splits.fit))]
    for one in learned:
        one.fit(images, subject.predict)
    supervised: list[Supervised] = [Artifacts(network, subject.features), Manda(subject.features)]
    for other in supervised:
        other.fit(images, subject.predict, attacked)
    few = Sent(calibration.pixels[:BASELINE_CALIBRATE], {name: rows[:BASELINE_CALIBRATE] for name, rows in calibration.tensors.items()})
    scores = {**{one.name: one.score for one in learned}, **{one.name: one.score for one in supervised}}
    return {name: Calibrated.on(_of_pixels(score), few) for name, score in scores.items()}


def _of_pixels(score: Callable[[Floats], Floats]) -> Score:
    return lambda sent: score(sent.pixels)


class WithHead(nn.Module):
    """A classifier as features and a linear layer, for detectors that drop features at random before it."""

    def __init__(self, features: nn.Module, head: Head) -> None:
        super().__init__()
        self.features = features
        self.activation = nn.ReLU() if head.rectified else nn.Identity()
        self.linear = nn.Linear(head.weights.shape[0], head.weights.shape[1])
        with torch.no_grad():
            self.linear.weight.copy_(torch.from_numpy(head.weights.T.copy()))
            self.linear.bias.copy_(torch.from_numpy(head.bias))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """float32 [n, C, H, W] -> logits [n, classes]"""
        logits: Tensor = self.linear(self.activation(self.features(images)))
        return logits
