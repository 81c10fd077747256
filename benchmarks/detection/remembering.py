"""What a memory costs an attacker who searches with the guard's answers, by how much else the guard is asked meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import numpy as np
import numpy.typing as npt

from noisec import contract
from noisec.benchmarks.detection import ladder
from noisec.benchmarks.detection.cells import share
from noisec.benchmarks.detection.run import right_ones
from noisec.benchmarks.detection.subject import Subject
from noisec.builders.calibrate import fit_repeats, image_view
from noisec.builders.figures import markdown_table, percent
from noisec.builders.images import BATCH, Floats, Images, natural
from noisec.builders.spec import MemorySpec
from noisec.python_backend.scorer.memory import Memory

OTHERS = (0, 150, 400)
"""natural inputs that everybody else sends between two rounds of questions; the searches are among each other's others, too"""


@dataclass(frozen=True)
class Searched:
    """What searches for unflagged mistakes have come to."""

    others: int | None
    """inputs between two questions about the same image; None: the guard has no memory"""
    reached: float
    """share of the images with which the attacker got a wrong label and no alarm while asking"""
    later: float
    """share of the images whose last version gets them when it is sent again after all is forgotten"""


def search(subject: Subject, images: Images, eps: float, queries: int, seed: int, others: Floats | None, every: int) -> Searched:
    """One query attacker per image, all at once (:func:`noisec.benchmarks.detection.ladder.query`, label and verdict).

    Args:
        others: penultimate activations of natural inputs [n, d], sent in turn; None for a guard without memory
        every: how many of them are sent between two rounds
    """
    memory = subject.scorer.new_memory() if others is not None else None
    places = cycle(range(len(others))) if others is not None else cycle([0])

    def ask(pixels: Floats) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
        if memory and others is not None and every:
            memory.repeated(others[[next(places) for _ in range(every)]])
        return ladder.ask(subject, memory, pixels)

    found = ladder.query(
        ask, images.floats(), images.labels, eps, queries=queries, with_score=False, threshold=float(subject.scorer.threshold), seed=seed
    )
    logits, _, flagged = ladder.ask(subject, None, found.pixels)
    later = (logits.argmax(axis=1) != images.labels) & ~flagged
    return Searched(None if others is None else len(images) - 1 + every, share(found.reached), share(later))


def false_alarms(subject: Subject, activations: Floats) -> float:
    """Share of natural inputs, penultimate activations [n, d], that a memory takes for repeats of those before them."""
    memory = subject.scorer.new_memory()
    assert isinstance(memory, Memory)
    return share(np.concatenate([memory.repeated(rows) for rows in np.array_split(activations, -(-len(activations) // BATCH))]))


def run_study(
    repository: Path, guard: str, work: Path, eps: float, count: int, queries: int, seed: int
) -> tuple[list[dict[str, float]], str]:
    """Searches with and without a memory; a guard that has none is given one of the default size.

    Returns:
        rows, and the page with their table
    """
    subject = Subject.open(repository, guard, work)
    spec, splits = subject.spec, subject.splits
    fit, calibration = (
        subject.tensors(natural(images, spec.natural_noise_sd, spec.seed + index), len(images), title)
        for index, (images, title) in enumerate(((splits.fit, "fit images"), (splits.calibrate, "calibration images")))
    )
    memory = spec.memory or MemorySpec()
    repeats = fit_repeats(memory, image_view(fit, subject.head), image_view(calibration, subject.head), spec.seed)
    subject.__dict__["scorer"] = replace(subject.scorer, repeats=repeats)
    order = np.random.default_rng(seed).permutation(len(splits.report))
    images = right_ones(subject, splits.report[order[: 2 * count]])[:count]
    others = calibration[contract.PASSES["image"]]
    found = [
        search(subject, images, eps, queries, seed, None, 0),
        *(search(subject, images, eps, queries, seed, others, n) for n in OTHERS),
    ]
    clean = subject.tensors(splits.report.floats(), len(splits.report), "report images")
    labels = clean[contract.LOGITS].argmax(axis=1)
    activations = clean[contract.PASSES["image"]]
    common = int(np.bincount(labels).argmax())
    alarms = {
        f"{len(activations)} clean images": false_alarms(subject, activations),
        f"the {int((labels == common).sum())} of them of one class, alone": false_alarms(subject, activations[labels == common]),
    }
    rows = [{"others": -1 if one.others is None else one.others, "reached": one.reached, "later": one.later} for one in found]
    return rows, as_markdown(found, alarms, memory, guard, eps, count, queries)


def as_markdown(
    found: Sequence[Searched], alarms: dict[str, float], memory: MemorySpec, guard: str, eps: float, count: int, queries: int
) -> str:
    """The study's page."""
    heads = ["memory", "other inputs between two questions", "reached while asking", "sent again when forgotten"]
    rows = [
        ["no" if one.others is None else "yes", "any" if one.others is None else str(one.others), percent(one.reached), percent(one.later)]
        for one in found
    ]
    said = "; ".join(f"{what}: {percent(alarm, 2)}" for what, alarm in alarms.items())
    return (
        f"# A memory in the guard `{guard}`\n\nAttackers who may ask {queries} times about an image, for label and verdict: random search "
        f"on {count} images at once, eps {eps:g}. The scorer remembers {memory.size} inputs, and {memory.neighbours} near repeats make an "
        f"input malicious. Shares are of the images.\n\n{markdown_table(heads, rows)}\n\nTaken for repeats: {said}.\n"
    )
