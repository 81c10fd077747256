"""A ladder of attackers who know that the guard is there, by what they hold: its method, its answers, its weights.

Arrays go in and arrays come out: images float32 [n, C, H, W] in [0, 1], labels int64 [n], ``eps`` the largest change of a pixel. Every
attacker wants the same: a wrong label and no alarm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from noisec import contract
from noisec.benchmarks.detection.subject import Subject
from noisec.benchmarks.detection.torchscore import Whole, compose
from noisec.builders.build import build_autoencoder, build_denoiser
from noisec.builders.calibrate import NO_HEAD, fit_scorer
from noisec.builders.images import Floats, Images, Splits, in_batches
from noisec.builders.passes import passes_needed
from noisec.builders.progress import tracked
from noisec.builders.spec import GuardSpec
from noisec.builders.stages import StageRunner, in_process, joined
from noisec.builders.workbench import Workbench
from noisec.python_backend.scorer.memory import Memory
from noisec.python_backend.scorer.scoring import Scorer

Bools = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int64]
Ask = Callable[[Floats], tuple[Floats, Floats, Bools]]
"""images float32 [n, C, H, W] -> LOGITS [n, classes], SCORE [n] and IS_MALICIOUS [n]"""

BATCH = 128
"""images that are attacked together with gradients"""
STEPS, PENALTIES = 50, (0.0, 0.1, 1.0, 10.0)
SAFETY = 0.5
"""nats below the threshold at which an attacker is content"""
TRANSFER_SAFETY = 3.0
"""the same of one who practises on a guard of his own: another guard scores the same input some nats higher or lower"""
CONFIDENT = 1.0
"""logits beyond which a wrong label earns :func:`adaptive` nothing more: from there on it works on the score alone"""
CERTAIN = 1e-3
"""logits by which a label has to be wrong to count: what runtimes round differently is less"""
QUERIES = 1000
SCORE_WEIGHT, FLAG_WEIGHT = 0.1, 1.0
"""what a nat above the threshold, or an alarm, costs in logits"""
ENOUGH = 0.1
"""logits beyond which a wrong label earns :func:`query` nothing more"""
LARGEST_SQUARE = 0.4
"""share of the image's shorter side that the first squares cover; the larger a square, the louder the alarm"""
ROWS_A_LEVEL = 500
"""images for each noise level that a surrogate's detectors are fitted on"""


# --- holds the weights ---------------------------------------------------------------------------------------------------------------


def adaptive(
    whole: Whole,
    images: Floats,
    labels: Labels,
    eps: float,
    *,
    threshold: float,
    steps: int = STEPS,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
    safety: float = SAFETY,
    samples: int = 1,
) -> Floats:
    """Projected gradient descent (Madry et al. 2018) through denoiser, classifier and scorer (as Carlini and Wagner 2017 and Tramer et al.
    2020 ask of whoever evaluates a detector).

    It minimises ``max(margin, -CONFIDENT) + penalty * max(0, score - threshold + safety)``, with steps of the gradient's sign that shrink
    from eps / 4 to 0 along a cosine, for one penalty after the other, each from a random start. Of all mislabelled steps it keeps the one
    with the lowest score; an image is finished once that lies ``safety`` below the threshold. An image that was never mislabelled is given
    back as the last step left it.

    Args:
        whole: the guard, or what the attacker takes for it
        threshold: nats
        samples: answers that each step's gradient is the mean of, where the guard draws at random (expectation over transformations,
            Athalye et al. 2018)

    Returns:
        float32 [n, C, H, W] in [0, 1], within ``eps`` of the images
    """
    generator = torch.Generator().manual_seed(seed)
    starts = range(0, len(images), BATCH)
    parts = []
    for start in tracked(starts, f"adaptive {eps:g}", len(starts)):
        chosen = slice(start, start + BATCH)
        found = _Found(torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen]), eps, threshold - safety)
        for penalty in penalties:
            _descend(_averaged(whole, found.labels, samples), found, steps, penalty, generator)
        parts.append(found.pixels.numpy())
    return np.concatenate(parts) if parts else images


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """True logit minus the best other one: [n] from [n, classes]; below 0 the label is wrong."""
    true = logits.gather(1, labels[:, None])[:, 0]
    return true - logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)


class _Found:
    """The best that an attacker has found for each image of a batch."""

    def __init__(self, images: Tensor, labels: Tensor, eps: float, goal: float) -> None:
        self.images, self.labels, self.eps, self.goal = images, labels, eps, goal
        self.pixels = images.clone()
        self.scores = torch.full((len(images),), torch.inf)
        """of what is kept; infinite where no step was mislabelled"""

    @property
    def live(self) -> Tensor:
        """Images that are not finished: int64 [m]."""
        return torch.nonzero(~(self.scores <= self.goal))[:, 0]

    def keep(self, rows: Tensor, pixels: Tensor, margin: Tensor, score: Tensor) -> None:
        """Take over what is mislabelled and has a lower score; of images that were never mislabelled, the newest step."""
        better = (margin < -CERTAIN) & (score < self.scores[rows])
        self.scores[rows] = torch.where(better, score, self.scores[rows])
        fresh = better | self.scores[rows].isinf()
        self.pixels[rows[fresh]] = pixels[fresh]


Look = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(images [m, C, H, W], their rows [m]) -> margins [m] and scores [m]"""


def _averaged(whole: Whole, labels: Tensor, samples: int) -> Look:
    def look(pixels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        answers = [whole(pixels) for _ in range(samples)]
        margin = torch.stack([margins(logits, labels[rows]) for logits, _ in answers]).mean(dim=0)
        return margin, torch.stack([score for _, score in answers]).mean(dim=0)

    return look


def _descend(look: Look, found: _Found, steps: int, penalty: float, generator: torch.Generator) -> None:
    """One descent of the images that are not finished."""
    rows = found.live
    clean, eps = found.images[rows], found.eps
    low, high = (clean - eps).clamp(min=0), (clean + eps).clamp(max=1)
    pixels = low + (high - low) * torch.rand(clean.shape, generator=generator)
    for step in range(steps + 1):
        if not len(rows):
            return
        pixels.requires_grad_()
        margin, score = look(pixels, rows)
        found.keep(rows, pixels.detach(), margin.detach(), score.detach())
        loss = margin.clamp(min=-CONFIDENT) + penalty * (score - found.goal).clamp(min=0)
        (slope,) = torch.autograd.grad(loss.sum(), pixels)
        left = ~(found.scores[rows] <= found.goal)
        size = eps / 8 * (1 + math.cos(math.pi * step / steps))
        rows, low, high = rows[left], low[left], high[left]
        pixels = (pixels.detach() - size * slope.sign())[left].clamp(low, high)


# --- asks the guard ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Queried:
    """What an attacker who may only ask has reached."""

    pixels: Floats
    """[n, C, H, W] in [0, 1]"""
    used: npt.NDArray[np.int64]
    """[n], questions that each image took"""
    reached: Bools
    """[n], whether the guard answered these pixels with a wrong label and no alarm"""


def ask(subject: Subject, memory: Memory | None, images: Floats) -> tuple[Floats, Floats, Bools]:
    """What the guard answers: its own stages and scorer, run in this process.

    Args:
        memory: the scorer's, of the questions before, where it has one

    Returns:
        LOGITS float32 [n, classes], SCORE float32 [n], IS_MALICIOUS bool [n]
    """
    tensors = joined([subject.runner.batch(batch) for batch in in_batches(images)])  # with no bar of its own: the attacker shows one
    verdict = subject.scorer.outputs(tensors, memory)
    return tensors[contract.LOGITS], verdict[contract.SCORE][:, 0], verdict[contract.IS_MALICIOUS][:, 0]


def query(
    ask: Ask,
    images: Floats,
    labels: Labels,
    eps: float,
    *,
    queries: int = QUERIES,
    with_score: bool,
    threshold: float,
    seed: int = 0,
) -> Queried:
    """Random search with the guard's answers alone, after the Square attack (Andriushchenko et al. 2020): squares of random place and sign
    whose sides shrink, each kept where it lowers the loss. It starts at the image itself, not at that attack's stripes, which raise the
    alarm: an attacker who stays below it gets further.

    The loss is the margin of the true logit, as far as it matters, and what the alarm costs: with SCORE, in proportion to the nats above
    the threshold; without, the same for every alarm. An image is finished when the guard gives it a wrong label and no alarm.

    Args:
        queries: that each image may cost at most
        threshold: nats; without SCORE it is not looked at
    """
    generator = np.random.default_rng(seed)
    state = _Search(ask, labels, _Loss(with_score, threshold), images)
    live = np.arange(len(images))
    for number in tracked(range(queries), f"queries {eps:g}", queries):
        if not len(live):
            break
        proposed = _squares(state.pixels, images, eps, live, number / queries, generator) if number else images
        state.try_out(live, proposed)
        live = live[~state.reached[live]]
    return Queried(state.pixels, state.used, state.reached)


@dataclass(frozen=True)
class _Loss:
    with_score: bool
    threshold: float

    def __call__(self, margin: Floats, score: Floats, flagged: Bools) -> Floats:
        """[n], lower is better for the attacker"""
        excess = np.nan_to_num(np.maximum(score - self.threshold, 0), nan=np.inf)
        alarm = SCORE_WEIGHT * excess if self.with_score else FLAG_WEIGHT * flagged
        loss: Floats = (np.maximum(margin, -ENOUGH) + alarm).astype(np.float32)
        return loss


class _Search:
    """Where a random search stands."""

    def __init__(self, ask: Ask, labels: Labels, loss: _Loss, images: Floats) -> None:
        self._ask, self._labels, self._loss = ask, labels, loss
        self.pixels = images.copy()
        self._losses = np.full(len(images), np.inf, np.float32)
        self.used = np.zeros(len(images), np.int64)
        self.reached = np.zeros(len(images), np.bool_)

    def try_out(self, rows: npt.NDArray[np.intp], proposed: Floats) -> None:
        """Ask for proposals [m, C, H, W] of the images ``rows`` [m], and keep those that are better."""
        logits, score, flagged = self._ask(proposed)
        margin = margins(torch.from_numpy(logits), torch.from_numpy(self._labels[rows])).numpy()
        loss = self._loss(margin, score, flagged)
        reached = (logits.argmax(axis=1) != self._labels[rows]) & ~flagged
        better = reached | (loss < self._losses[rows]) | np.isinf(self._losses[rows])
        self.used[rows] += 1
        self.reached[rows] = reached
        self.pixels[rows[better]], self._losses[rows[better]] = proposed[better], loss[better]


def _squares(pixels: Floats, images: Floats, eps: float, rows: npt.NDArray[np.intp], done: float, generator: np.random.Generator) -> Floats:
    """Proposals [m, C, H, W]: one square of each image set to the image +- ``eps``, one sign for each channel.

    Args:
        done: share of the queries that are spent
    """
    height, width = images.shape[2:]
    side = max(1, round(LARGEST_SQUARE * (1 - done) ** 2 * min(height, width)))
    inside_rows = _spans(generator.integers(0, height - side + 1, len(rows)), side, height)
    inside_columns = _spans(generator.integers(0, width - side + 1, len(rows)), side, width)
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    shifted = np.clip(images[rows] + eps * _signs((len(rows), images.shape[1], 1, 1), generator), 0, 1)
    proposed: Floats = np.where(inside, shifted, pixels[rows])
    return proposed


def _spans(starts: npt.NDArray[np.int64], side: int, size: int) -> Bools:
    """bool [m, size], ``side`` places from each start on."""
    places = np.arange(size)
    inside: Bools = (places >= starts[:, None]) & (places < starts[:, None] + side)
    return inside


def _signs(shape: tuple[int, ...], generator: np.random.Generator) -> Floats:
    return generator.choice(np.array([-1, 1], np.float32), shape)


# --- knows the method ----------------------------------------------------------------------------------------------------------------


class Surrogate(NamedTuple):
    """A guard of the attacker's own around the same classifier, attacked in the place of the real one."""

    whole: Whole
    threshold: float


def gray_box(subject: Subject, work: Path, seed: int, epochs: int, device: str = "cpu") -> Surrogate:
    """An attacker who knows method, specification and classifier, but not the guard: same kind of denoiser and copies, other seed, a random
    half of the training images; the scorer fitted and calibrated on images that the defender's detectors were not fitted on.

    Args:
        work: folder for finished steps
        seed: the attacker's; another one than the guard's
        epochs: of the denoiser's training
    """
    bench = Workbench(work)
    spec, splits = surrogate_spec(subject, seed, epochs), surrogate_splits(subject, seed)
    classifier = subject.stages["classifier"]
    stages = {"autoencoder": build_autoencoder(spec, splits, bench, classifier), "classifier": classifier}

    def fit(folder: Path) -> None:
        run = StageRunner(in_process(stages), passes_needed(spec), spec.noise_source)
        fit_scorer(spec, run, splits, subject.head if spec.needs_head else NO_HEAD).save(folder / "scorer.npz")

    inputs = {"from": stages["autoencoder"].name, "files": splits.digest, "spec": json.loads(spec.model_dump_json())}
    scorer = Scorer.load(bench.step("surrogate-scorer", inputs, fit) / "scorer.npz")
    return Surrogate(compose(stages, scorer, spec.noise_source, device), float(scorer.threshold))


def second_denoiser(subject: Subject, work: Path, seed: int, epochs: int) -> Path:
    """Folder with another autoencoder stage of the guard's kind, without copies: other seed, a random half of the training images."""
    spec, splits = surrogate_spec(subject, seed, epochs), surrogate_splits(subject, seed)
    return build_denoiser(spec, splits, Workbench(work), subject.stages["classifier"])


def surrogate_spec(subject: Subject, seed: int, epochs: int) -> GuardSpec:
    """The guard's specification with another seed and as many noise levels as the attacker's images allow."""
    spec = subject.spec
    levels = max(1, min(spec.noise_levels, len(subject.splits.calibrate) // 2 // ROWS_A_LEVEL))
    autoencoder = spec.autoencoder.model_copy(update={"epochs": epochs})
    return spec.model_copy(update={"seed": seed, "autoencoder": autoencoder, "noise_levels": levels})


def surrogate_splits(subject: Subject, seed: int) -> Splits:
    """What the attacker has: half of the training images for the denoiser, and both halves of the calibration images for the scorer."""
    splits = subject.splits
    fit, calibrate = random_half(splits.calibrate, seed)
    digest = f"{splits.digest} attacker {seed} {subject.digests['classifier']}"
    return replace(splits, train=random_half(splits.train, seed)[0], fit=fit, calibrate=calibrate, digest=digest)


def random_half(images: Images, seed: int) -> tuple[Images, Images]:
    """Two disjoint halves."""
    order = np.random.default_rng(seed).permutation(len(images))
    middle = len(images) // 2
    return images[np.sort(order[:middle])], images[np.sort(order[middle:])]


# --- what they reach -----------------------------------------------------------------------------------------------------------------
