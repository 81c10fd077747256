"""What randomness inside the guard costs an attacker who holds its weights: several denoisers, one drawn per request, or noise before the
denoiser. Each variant is fitted, calibrated and attacked as it would serve; the attacker averages its gradients over draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from noisec import contract
from noisec.benchmarks.detection import ladder
from noisec.benchmarks.detection.run import Benchmark, Plan, Sizes
from noisec.benchmarks.detection.subject import Subject
from noisec.benchmarks.detection.torchscore import Whole, differentiable
from noisec.builders.attacks import AttackSpec
from noisec.builders.calibrate import fit_tensors
from noisec.builders.figures import auroc, markdown_table, percent, tpr_at
from noisec.builders.images import Floats, Images, in_batches, natural
from noisec.builders.progress import tracked
from noisec.builders.stages import Tensors, joined
from noisec.builders.torchgraph import TorchGraph

FIT, CALIBRATE = 6000, 3000
"""images, as every draw costs all denoisers"""
DRAWS = 5
"""verdicts that an attacked image's success is averaged over"""
COPIES = [contract.PASSES[one] for one in contract.COPIES]
"""what copies of the classifier make of the image"""


@dataclass(frozen=True)
class Variant:
    """One way to draw."""

    name: str
    denoisers: int = 1
    """of which one is drawn for each image"""
    noise_sd: float = 0.0
    """of Gaussian noise on the denoiser's input"""
    samples: int = 1
    """draws that the attacker averages each gradient over"""


VARIANTS = (
    Variant("static"),
    Variant("two denoisers, one drawn", denoisers=2, samples=2),
    Variant("noise of sd .02 before the denoiser", noise_sd=0.02, samples=2),
    Variant("both", denoisers=2, noise_sd=0.02, samples=4),
)


class DrawnStages:
    """The guard's network stages with a secret choice for each image.

    Args:
        autoencoders: folders of autoencoder stages
        classifier: folder of the classifier stage
    """

    def __init__(self, autoencoders: Sequence[Path], classifier: Path, noise_source: str, variant: Variant, seed: int) -> None:
        self._denoisers = [TorchGraph(folder / "model.onnx") for folder in autoencoders[: variant.denoisers]]
        self._classifier = TorchGraph(classifier / "model.onnx")
        self._offset_from = noise_source
        self._variant = variant
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """float32 [n, C, H, W] -> LOGITS and everything that a scorer reads, with gradients."""
        noisy = images + self._variant.noise_sd * torch.randn(images.shape, generator=self._generator)
        made = [denoiser.named(noisy) for denoiser in self._denoisers]
        drawn = torch.randint(len(made), (len(images), 1, 1, 1), generator=self._generator)
        reconstruction = made[0][contract.RECONSTRUCTION]
        for index, one in enumerate(made[1:], 1):
            reconstruction = torch.where(drawn == index, one[contract.RECONSTRUCTION], reconstruction)
        noise = images - reconstruction
        shift = made[0][self._offset_from] - made[0][contract.NOISE]  # what a normalising classifier is given besides the noise
        answers = {"image": images, "noise": noise + shift, "reconstruction": reconstruction}
        passes = {name: self._classifier.named(answers[name]) for name in ("image", "noise", "reconstruction")}
        return {
            contract.LOGITS: passes["image"][contract.LOGITS],
            contract.NOISE_LEVEL: noise.square().mean(dim=(1, 2, 3)).sqrt()[:, None],
            contract.IN_RANGE: torch.ones(len(images), 1),
            contract.PASSES["image"]: passes["image"][contract.PENULTIMATE],
            contract.PASSES["noise"]: passes["noise"][contract.PENULTIMATE],
            contract.PASSES["reconstruction"]: passes["reconstruction"][contract.PENULTIMATE],
            **{name: tensor for name, tensor in self._denoisers[0].named(images).items() if name in COPIES},
        }

    def arrays(self, images: Floats, title: str) -> Tensors:
        """The same for many images, without gradients."""
        parts = []
        for batch in tracked(in_batches(images), title, -(-len(images) // 128)):
            with torch.no_grad():
                parts.append({name: tensor.numpy() for name, tensor in self(torch.from_numpy(batch)).items()})
        return joined(parts)


def measure(benchmark: Benchmark, autoencoders: Sequence[Path], variant: Variant, eps: float, count: int) -> dict[str, float | str]:
    """One row: false alarms, what is still detected of an attacker who does not adapt, and the success of one who does."""
    subject = benchmark.subject
    stages = DrawnStages(autoencoders, subject.stages["classifier"], subject.spec.noise_source, variant, benchmark.seed)
    fit = stages.arrays(_natural(subject, subject.splits.fit[:FIT], 0), "fit")
    calibration = stages.arrays(_natural(subject, subject.splits.calibrate[:CALIBRATE], 1), "calibrate")
    scorer = fit_tensors(subject.spec, fit, calibration, subject.head)
    score = differentiable(scorer)
    threshold = float(scorer.threshold)

    def whole(images: Tensor) -> tuple[Tensor, Tensor]:
        tensors = stages(images)
        return tensors[contract.LOGITS], score(tensors)

    clean = scorer.score(stages.arrays(benchmark.benign.floats(), "clean"))
    noisy = scorer.score(stages.arrays(benchmark.noisy.pixels, "natural noise"))
    images = benchmark.targets[:count]
    attacked = benchmark.attacked(AttackSpec("pgd", eps), benchmark.targets, "report").pixels
    plain = scorer.score(stages.arrays(attacked, "PGD"))
    adapted = ladder.adaptive(whole, images.floats(), images.labels, eps, threshold=threshold, seed=benchmark.seed, samples=variant.samples)
    return {
        "variant": variant.name,
        "fpr": float(np.mean(clean > threshold)),
        "fpr_natural_noise": float(np.mean(noisy > threshold)),
        "auroc": auroc(clean, plain),
        "tpr_at_1pct": tpr_at(clean, plain, 0.01),
        "joint_success": joint(whole, adapted, images, threshold),
    }


def joint(whole: Whole, pixels: Floats, images: Images, threshold: float) -> float:
    """Share of attacked images that are mislabelled and not flagged, over fresh draws."""
    shares = []
    for _ in range(DRAWS):
        with torch.no_grad():
            logits, score = whole(torch.from_numpy(pixels))
        wrong = logits.argmax(dim=1).numpy() != images.labels
        shares.append(np.mean(wrong & (score.numpy() <= threshold)))
    return float(np.mean(shares))


def run_study(repository: Path, guard: str, work: Path, eps: float, count: int, seed: int) -> tuple[list[dict[str, float | str]], str]:
    """Every variant of one guard; the second denoiser is one of the same kind, trained with another seed on half of the images.

    Returns:
        rows, and their table
    """
    subject = Subject.open(repository, guard, work)
    benchmark = Benchmark(subject, Plan((), sizes=Sizes(laddered=count)), work, seed)
    other = ladder.second_denoiser(subject, work / "detection", seed + 1, benchmark.plan.sizes.surrogate_epochs)
    rows = [measure(benchmark, (subject.stages["autoencoder"], other), variant, eps, count) for variant in VARIANTS]
    return rows, as_markdown(rows, eps, count, guard)


def _natural(subject: Subject, images: Images, seed: int) -> Floats:
    return np.concatenate(list(natural(images, subject.spec.natural_noise_sd, subject.spec.seed + seed)))


def as_markdown(rows: Sequence[dict[str, float | str]], eps: float, count: int, guard: str) -> str:
    """The study's table."""
    heads = ["guard", "FPR", "FPR, natural noise", f"PGD {eps:g}: AUROC", "TPR at 1 % FPR", f"adaptive {eps:g}: joint success"]
    shown = [
        [
            str(row["variant"]),
            percent(float(row["fpr"]), 2),
            percent(float(row["fpr_natural_noise"]), 2),
            f"{row['auroc']:.3f}",
            percent(float(row["tpr_at_1pct"])),
            percent(float(row["joint_success"])),
        ]
        for row in rows
    ]
    return (
        f"# Randomness inside the guard `{guard}`\n\nAn attacker who holds the weights, {count} images, eps {eps:g}, gradients averaged "
        f"over draws; success over {DRAWS} fresh draws. Fitted on {FIT} and calibrated on {CALIBRATE} images with the same randomness.\n\n"
        f"{markdown_table(heads, shown)}\n"
    )
