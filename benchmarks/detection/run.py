"""The detection benchmark of one guard: attacks, protocols, cells.

Finished attacks and parts are kept, so that an interrupted run goes on, and that the parts of a long one may run side by side, each as a
command of its own with the same work folder, before the whole command puts them together.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from noisec import contract
from noisec.benchmarks.detection import ladder
from noisec.benchmarks.detection.cells import Access, Cell, Protocol, detection, share
from noisec.benchmarks.detection.panel import (
    BASELINE_FIT,
    LEAKED,
    LEAKED_COPIES,
    LEAKED_IMAGES,
    PUBLISHED,
    Calibrated,
    Sent,
    baselines,
    leaked,
    panel,
)
from noisec.benchmarks.detection.poisoned import GUIDED_EPOCHS, HARDENED_EPOCHS, LONGER, poisoned_guard
from noisec.benchmarks.detection.report import write_results
from noisec.benchmarks.detection.rows import read_summary, write_summary
from noisec.benchmarks.detection.subject import Subject
from noisec.benchmarks.detection.surrogate import surrogate
from noisec.benchmarks.detection.torchscore import whole
from noisec.builders.attacks import BLACK_BOX, AttackedImages, AttackSpec, attack
from noisec.builders.audit.triggers import TRIGGERS
from noisec.builders.build import versions
from noisec.builders.figures import percent
from noisec.builders.images import BATCH, Floats, Images, natural
from noisec.builders.progress import console
from noisec.builders.spec import ClassifierSpec
from noisec.builders.workbench import Workbench, seconds_of
from noisec.errors import NoisecError

SLOW = ("cw", "deepfool", "autoattack", "hopskipjump")
"""methods that attack fewer images"""
NOISY_SEED = 11
SEEN = AttackSpec("fgsm", 0.05)
"""what detectors that learn from attacks see where the plan has no FGSM"""
REPEATED = "; those after the first repeat the faster white-box attacks, on other draws of the same report images"
AVERAGED = ("auroc", "tpr_at_1pct", "tpr_at_5pct", "fpr", "fpr_natural_noise", "success", "joint_success")
"""figures of a cell that stand for several groups of images as their mean"""


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    images: int = 1000
    """benign images, which count once as they are and once with natural noise, and others to attack"""
    slow: int = 100
    """images for slow attacks"""
    laddered: int = 200
    """images for attackers that adapt to the guard"""
    queried: int = 60
    """at most, for those of them who ask it"""
    queries: int = 1000
    """of the query attacker, for each image"""
    square: int = 1000
    """queries of Square and HopSkipJump"""
    surrogate_epochs: int = 2
    """of the training of the gray-box attacker's own denoiser"""
    poisoned: int = 10000
    """training images, a part of them poisoned, that the supplier of a backdoored classifier goes on training it with"""
    poisoned_epochs: int = 3


@dataclass(frozen=True)
class Plan:
    """What is measured on one guard."""

    attacks: tuple[str, ...]
    """``method-epsilon``, white-box on the classifier"""
    black_box: tuple[str, ...] = ()
    """the same made on a surrogate classifier, and replayed"""
    ladder: tuple[float, ...] = ()
    """epsilons of the attackers that adapt to the guard; the first is the paper's"""
    triggers: tuple[str, ...] = ()
    """backdoors, each in a classifier of its own"""
    sizes: Sizes = Sizes()

    def check(self, classifier: ClassifierSpec) -> None:
        """Refuse what cannot be measured on a guard of this classifier, before hours are spent on the rest.

        Raises:
            NoisecError: an attack, an epsilon or a backdoor is none, or the classifier has no gradients for it.
        """
        attacks = [AttackSpec.parse(name) for name in self.attacks]
        for name in self.black_box:
            AttackSpec.parse(name)
        unknown = sorted(set(self.triggers) - set(TRIGGERS))
        if unknown:
            raise NoisecError(f"--triggers {', '.join(unknown)}: no such backdoor; there are {', '.join(TRIGGERS)}")
        outside = [eps for eps in self.ladder if not 0 < eps <= 1]
        if outside:
            raise NoisecError(f"--ladder {', '.join(map(str, outside))}: an epsilon lies in (0, 1]")
        asked = [*self.triggers, *(one.name for one in attacks if one.method not in BLACK_BOX)]
        if classifier.kind == "onnx" and asked:
            raise NoisecError(
                f"{', '.join(asked)} need the classifier's gradients, which an ONNX file does not give: leave them out, or build the guard "
                "around the PyTorch module (classifier.factory)"
            )


class Benchmark:
    """One guard under one plan.

    Args:
        work: folder for finished attacks
        seed: of every attack
    """

    def __init__(self, subject: Subject, plan: Plan, work: Path, seed: int) -> None:
        self.subject, self.plan, self.seed = subject, plan, seed
        self.bench = Workbench(work / "detection")
        self.work = work
        self.key = {"guard": subject.digests, "seed": seed}
        self.classifier_key = {"classifier": {name: subject.digests[name] for name in ("classifier", "data", "files")}, "seed": seed}
        """what attacks on the classifier alone depend on: they outlive another denoiser"""
        self.cells: list[Cell] = []
        self.scores: dict[tuple[str, str], dict[str, Floats]] = {}
        self.seconds = 0.0
        """that all parts took, whenever that was"""
        self.known: dict[tuple[Calibrated, int], tuple[Sent, Floats]] = {}
        size = plan.sizes.images
        order = np.random.default_rng(seed).permutation(len(subject.splits.report))
        self.benign = subject.splits.report[order[: len(order) // 2][:size]]
        attackable = subject.splits.report[order[len(order) // 2 :]]
        self.targets = right_ones(subject, attackable)[:size]

    @cached_property
    def fit(self) -> Sent:
        return self._natural(self.subject.splits.fit, self.subject.spec.seed, "fit images")

    @cached_property
    def calibration(self) -> Sent:
        return self._natural(self.subject.splits.calibrate, self.subject.spec.seed + 1, "calibration images")

    @cached_property
    def clean(self) -> Sent:
        return self.send(self.benign.floats(), "clean images")

    @cached_property
    def noisy(self) -> Sent:
        return self._natural(self.benign, NOISY_SEED, "images with natural noise", always=True)

    @cached_property
    def harmless(self) -> Sent:
        """Clean images, and the same with natural noise."""
        return joined_sent(self.clean, self.noisy)

    @cached_property
    def compared(self) -> dict[str, Calibrated]:
        """The detectors of attacks on the classifier."""
        return self.detectors()

    def send(self, pixels: Floats, title: str) -> Sent:
        """Ask the stages about images float32 [n, C, H, W]."""
        return Sent(pixels, self.subject.tensors(pixels, len(pixels), title))

    def _natural(self, images: Images, seed: int, title: str, *, always: bool = False) -> Sent:
        deviation = self.subject.spec.natural_noise_sd
        batches = list(natural(images, deviation, seed, share=1.0 if always else 0.5))
        return self.send(np.concatenate(batches), title)

    def detectors(self, *, backdoors: bool = False) -> dict[str, Calibrated]:
        """Everything that is compared; ``backdoors`` adds detectors of triggers alone."""
        found = panel(self.subject, self.fit, self.calibration)
        images = self.subject.splits.fit[:BASELINE_FIT]
        part = images[len(images) * 2 // 3 :]
        seen = self.attacked(self.seen, part, "fit")
        return {**found, **baselines(self.subject, images, seen.pixels, self.calibration, backdoors=backdoors)}

    @property
    def seen(self) -> AttackSpec:
        """What detectors that learn from attacks see: the plan's own FGSM, where it has one."""
        return next((spec for spec in self.attacks if spec.method == "fgsm"), SEEN)

    def attacked(self, spec: AttackSpec, images: Images, what: str) -> AttackedImages:
        """Images under one attack on the guard's classifier, made now or in an earlier run."""
        inputs = {**self.classifier_key, "attack": spec.name, "on": what, "images": len(images), "queries": self.plan.sizes.square}

        def make(folder: Path) -> None:
            attack(self.subject.protected, images, spec, self.seed, self.plan.sizes.square).save(folder / "attacked.npz")

        return AttackedImages.load(self.bench.step(f"{what}-{spec.name}", inputs, make) / "attacked.npz")

    def run(self) -> None:
        """Every cell."""
        if self.plan.attacks or self.plan.black_box:
            self.kept("harmless", self.harmless_scores)
        self.white_boxes(self.attacks)
        for spec in map(AttackSpec.parse, self.plan.black_box):
            self.kept(f"black-box {spec.name}", partial(self.replayed, spec))
        for eps in self.plan.ladder:
            self.kept(f"adaptive {eps:g}", partial(self.adaptive, eps))
        if self.plan.ladder:
            eps = self.plan.ladder[0]
            self.kept(f"gray-box {eps:g}", partial(self.gray_box, eps))
            for with_score in (False, True):
                self.kept(f"query {eps:g}{' with score' * with_score}", partial(self.query, eps, with_score))
        for name in self.plan.triggers:
            self.kept(f"backdoor {name}", partial(self.backdoor, name))

    def repeat(self) -> None:
        """What further seeds repeat: the white-box attacks on another draw of the report images, without the slow ones."""
        self.white_boxes([spec for spec in self.attacks if spec.method not in SLOW])

    @property
    def attacks(self) -> list[AttackSpec]:
        return [AttackSpec.parse(name) for name in self.plan.attacks]

    def kept(self, part: str, measure: Callable[[], None], **inputs: str) -> None:
        """A part's cells and scores, measured now or in an earlier run.

        Args:
            inputs: what they depend on, next to guard, seed and sizes
        """

        def make(folder: Path) -> None:
            first, before = len(self.cells), set(self.scores)
            measure()
            write_summary(self.cells[first:], folder / "summary.json")
            del self.cells[first:]
            new = [key for key in self.scores if key not in before]
            np.savez(folder / "scores.npz", **{f"{key[1]}/{one}": rows for key in new for one, rows in self.scores[key].items()})

        known = {**self.key, "part": part, "sizes": vars(self.plan.sizes), **inputs}
        folder = self.bench.step(f"part-{part.replace(' ', '-')}", known, make)
        self.seconds += seconds_of(folder)
        self.cells += read_summary(folder / "summary.json")
        for key, rows in np.load(folder / "scores.npz").items():
            name, _, detector = key.partition("/")
            self.scores.setdefault((self.subject.name, name), {})[detector] = rows

    def harmless_scores(self) -> None:
        """What is drawn beside the attacks."""
        self._keep("clean", self.clean)
        self._keep("natural noise", self.noisy)

    def white_boxes(self, attacks: Sequence[AttackSpec]) -> None:
        """Every attack on the classifier itself."""
        for spec in attacks:
            images = self.targets[: self.plan.sizes.slow] if spec.method in SLOW else self.targets
            self.kept(f"white-box {spec.name}", partial(self.white_box, spec, images), seen=self.seen.name)

    def white_box(self, spec: AttackSpec, images: Images) -> None:
        """One attack with the classifier in hand, under both protocols."""
        made = self.attacked(spec, images, "report")
        sent = self.send(made.pixels, spec.name)
        won = made.succeeded(sent.labels)
        self._keep(spec.name, sent)
        self.honest("white-box", spec, sent, won, self.compared)
        shuffled = self.send(shuffled_noise(images.floats(), made.pixels, self.seed), f"{spec.name}, shuffled")
        for name in ("default", PUBLISHED):
            self._cell(name, self.compared[name], "published", "white-box", spec.method, spec.eps, sent, won, benign=shuffled)
        if len(images) >= LEAKED_IMAGES:
            self.leak(spec, sent, shuffled, won)

    @cached_property
    def leaks(self) -> list[Calibrated]:
        """The paper's fit, on the attacked images themselves, a hundred at a time."""
        images, deviation = self.targets.floats(), self.subject.spec.natural_noise_sd
        generator = np.random.default_rng(self.seed)
        found = []
        for group in _groups(len(images)):
            copies = np.repeat(images[group], LEAKED_COPIES, axis=0)
            noisy = np.clip(copies + deviation * generator.standard_normal(copies.shape), 0, 1).astype(np.float32)
            found.append(leaked(self.send(noisy, "copies of tested images").tensors[contract.PASSES["noise"]]))
        return found

    def leak(self, spec: AttackSpec, sent: Sent, shuffled: Sent, won: npt.NDArray[np.bool_]) -> None:
        """The paper's experiment with its leak: figures are means over groups of images, each with a mixture of its own."""
        cells = [
            self._measured(
                *(LEAKED, detector, "published", "white-box", spec.method, spec.eps),
                *(_part(sent, group), won[group], _part(shuffled, group)),
            )
            for group, detector in zip(_groups(len(won)), self.leaks, strict=False)
        ]
        means: dict[str, Any] = {name: float(np.mean([getattr(cell, name) for cell in cells])) for name in AVERAGED}
        self.cells.append(replace(cells[0], **means, n_benign=len(cells) * LEAKED_IMAGES, n_malicious=len(cells) * LEAKED_IMAGES))

    def honest(self, access: Access, spec: AttackSpec, sent: Sent, won: npt.NDArray[np.bool_], detectors: Mapping[str, Calibrated]) -> None:
        """All attacks, and in a cell of their own those that succeeded."""
        succeeded = _part(sent, won)
        for name, detector in detectors.items():
            self._cell(name, detector, "honest", access, spec.method, spec.eps, sent, won)
            self._cell(name, detector, "honest", access, f"{spec.method} (successful)", spec.eps, succeeded, won[won])

    def replayed(self, spec: AttackSpec) -> None:
        """An attack on a smaller classifier that the attacker trained, replayed (NoiSec's black-box setting)."""
        size = {"images": len(self.targets), "queries": self.plan.sizes.square}
        inputs = {**self.classifier_key, "attack": spec.name, "on": "surrogate", **size}

        def make(folder: Path) -> None:
            own = surrogate(self.subject, self.bench, self.seed)
            attack(own, self.targets, spec, self.seed, self.plan.sizes.square).save(folder / "attacked.npz")

        made = AttackedImages.load(self.bench.step(f"surrogate-{spec.name}", inputs, make) / "attacked.npz")
        sent = self.send(made.pixels, f"{spec.name}, replayed")
        self.honest("black-box", spec, sent, made.succeeded(sent.labels), {name: self.compared[name] for name in ("default", PUBLISHED)})

    def adaptive(self, eps: float) -> None:
        """An attacker who holds the guard's own weights."""
        images = self.targets[: self.plan.sizes.laddered]
        threshold = float(self.subject.scorer.threshold)

        def make(folder: Path) -> Floats:
            return ladder.adaptive(whole(self.subject), images.floats(), images.labels, eps, threshold=threshold, seed=self.seed)

        self._laddered("adaptive", eps, images, make)

    def gray_box(self, eps: float) -> None:
        """An attacker who knows the method and the classifier, and trains a guard of its own to practise on."""
        images = self.targets[: self.plan.sizes.laddered]

        def make(folder: Path) -> Floats:
            own = ladder.gray_box(self.subject, self.work / "detection", self.seed + 1, self.plan.sizes.surrogate_epochs)
            known: dict[str, Any] = {"threshold": own.threshold, "safety": ladder.TRANSFER_SAFETY, "seed": self.seed}
            return ladder.adaptive(own.whole, images.floats(), images.labels, eps, **known)

        self._laddered("gray-box", eps, images, make, f"aims {ladder.TRANSFER_SAFETY:g} nats below its own threshold")

    def query(self, eps: float, with_score: bool) -> None:
        """An attacker who may ask the guard ``queries`` times about each image."""
        images = self.targets[: min(self.plan.sizes.laddered, self.plan.sizes.queried)]
        known: dict[str, Any] = {"with_score": with_score, "threshold": float(self.subject.scorer.threshold), "seed": self.seed}

        def make(folder: Path) -> Floats:
            ask = partial(ladder.ask, self.subject, self.subject.scorer.new_memory())
            found = ladder.query(ask, images.floats(), images.labels, eps, queries=self.plan.sizes.queries, **known)
            np.save(folder / "reached.npy", found.reached)
            return found.pixels

        answers = "label, verdict and score" if with_score else "label and verdict"
        folder = self._laddered("query", eps, images, make, f"{self.plan.sizes.queries} queries, {answers}")
        if self.subject.scorer.repeats:
            reached = share(np.load(folder / "reached.npy"))
            last = self.cells[-1]
            self.cells[-1] = replace(last, note=f"{last.note}; {percent(reached)} within them, all when sent again once they are forgotten")

    def _laddered(self, access: Access, eps: float, images: Images, make: Callable[[Path], Floats], note: str = "") -> Path:
        """One attacker of the ladder; the folder with what it made."""
        inputs = {**self.key, "eps": eps, "images": len(images), "queries": self.plan.sizes.queries, "note": note}
        path = self.bench.step(access, inputs, lambda folder: AttackedImages(make(folder), images.labels).save(folder / "attacked.npz"))
        made = AttackedImages.load(path / "attacked.npz")
        sent = self.send(made.pixels, f"{access} {note}")
        scorer = self.subject.scorer
        own = Calibrated(lambda sent: scorer.score(sent.tensors), float(scorer.threshold))
        name = {"adaptive": "PGD", "gray-box": "PGD", "query": "random search"}[access]
        self._cell("default", own, "honest", access, name, eps, sent, made.succeeded(sent.labels), note=note)
        return path

    def backdoor(self, trigger: str) -> None:
        """The same guard around a classifier that a supplier has backdoored."""
        guard, triggered, target = poisoned_guard(
            self.subject, trigger, self.work, self.seed, self.plan.sizes.poisoned, self.plan.sizes.poisoned_epochs
        )
        other = Benchmark(guard, replace(self.plan, attacks=(), black_box=(), ladder=(), triggers=()), self.work, self.seed)
        chosen = self.targets.labels != target
        pixels = triggered(self.targets.pixels[chosen]).astype(np.float32) / 255
        sent = other.send(pixels, trigger)
        won = sent.labels == target
        succeeded = _part(sent, won)
        for name, detector in other.detectors(backdoors=True).items():
            other._cell(name, detector, "honest", "backdoor", trigger, 0.0, sent, won)
            other._cell(name, detector, "honest", "backdoor", f"{trigger} (successful)", 0.0, succeeded, won[won])
        self.cells += [replace(cell, guard=self.subject.name) for cell in other.cells]

    def _keep(self, name: str, sent: Sent) -> None:
        found = {one: self._score(self.compared[one], sent) for one in ("default", PUBLISHED) if one in self.compared}
        self.scores[self.subject.name, name] = found

    def _cell(self, *args: Any, **kwargs: Any) -> None:
        self.cells.append(self._measured(*args, **kwargs))

    def _measured(
        self,
        name: str,
        detector: Calibrated,
        protocol: Protocol,
        access: Access,
        attack: str,
        eps: float,
        sent: Sent,
        won: npt.NDArray[np.bool_],
        benign: Sent | None = None,
        note: str = "",
    ) -> Cell:
        harmless, scores = self._score(detector, benign or self.harmless), self._score(detector, sent)
        flagged = ~(scores <= detector.threshold)
        return Cell(
            dataset=self.subject.spec.data.source,
            guard=self.subject.name,
            detector=name,
            protocol=protocol,
            access=access,
            attack=attack,
            eps=eps,
            success=share(won) if len(won) else 0.0,
            **detection(harmless, scores),
            fpr=share(~(self._score(detector, self.clean) <= detector.threshold)),
            fpr_natural_noise=share(~(self._score(detector, self.noisy) <= detector.threshold)),
            n_benign=len(harmless),
            n_malicious=len(scores),
            seed=self.seed,
            joint_success=share(won & ~flagged) if len(won) else 0.0,
            note=note,
        )

    def _score(self, detector: Calibrated, sent: Sent) -> Floats:
        """Scores of a set that several cells look at are computed once."""
        key = (detector, id(sent))
        if key not in self.known:
            self.known[key] = (sent, detector.score(sent))
        return self.known[key][1]


def _part(sent: Sent, rows: slice | npt.NDArray[np.bool_]) -> Sent:
    return Sent(sent.pixels[rows], {name: tensor[rows] for name, tensor in sent.tensors.items()})


def _groups(count: int) -> list[slice]:
    """As many images as the paper has, again and again; what is left over stays out."""
    return [slice(start, start + LEAKED_IMAGES) for start in range(0, count - LEAKED_IMAGES + 1, LEAKED_IMAGES)]


def joined_sent(first: Sent, second: Sent) -> Sent:
    """Both sets, one behind the other."""
    tensors = {name: np.concatenate([rows, second.tensors[name]]) for name, rows in first.tensors.items()}
    return Sent(np.concatenate([first.pixels, second.pixels]), tensors)


def right_ones(subject: Subject, images: Images) -> Images:
    """The images that the classifier labels right: only those can be attacked."""
    labels = np.concatenate([subject.predict(batch.floats()).argmax(axis=1) for batch in images.batches()])
    return images[np.flatnonzero(labels == images.labels)]


def shuffled_noise(clean: Floats, attacked: Floats, seed: int) -> Floats:
    """Clean images with the attack's own noise, its pixels in random order (NoiSec's benign inputs): float32 [n, C, H, W]."""
    noise = (attacked - clean).reshape(len(clean), -1)
    mixed = np.random.default_rng(seed).permuted(noise, axis=1).reshape(clean.shape)
    result: Floats = np.clip(clean + mixed, 0, 1).astype(np.float32)
    return result


def remembered(benchmark: Benchmark) -> str:
    """What a guard's memory, full of natural images, takes for repeats of them among images that it has never seen."""
    memory, name = benchmark.subject.scorer.new_memory(), contract.PASSES["image"]
    assert memory
    before, clean = benchmark.fit.tensors[name], benchmark.clean.tensors[name]
    flagged = [memory.repeated(rows) for sent in (before, clean) for rows in np.array_split(sent, -(-len(sent) // BATCH))]
    count = int(np.concatenate(flagged)[len(before) :].sum())
    return f"{count} of {len(clean)} clean images, sent after {len(before)} others, are taken for repeats"


def run_benchmark(subject: Subject, plan: Plan, work: Path, out: Path, seed: int, command: str, seeds: int = 1) -> list[Cell]:
    """Measure one guard and write its tables and plots into ``out``; interrupted with Ctrl-C, what is finished.

    Args:
        seeds: how many, from ``seed`` on; those after the first repeat the white-box attacks, the slow ones left out

    Raises:
        NoisecError: the plan does not go with the guard.
    """
    plan.check(subject.spec.classifier)
    benchmark = Benchmark(subject, plan, work, seed)
    cells = benchmark.cells
    try:
        benchmark.run()
        for further in range(seed + 1, seed + seeds):
            other = Benchmark(subject, plan, work, further)
            other.cells = cells
            other.repeat()
            benchmark.seconds += other.seconds
    except KeyboardInterrupt:
        console.print("interrupted: writing the cells that are finished; the same command goes on from here")
    facts = {
        **({"memory": remembered(benchmark)} if subject.scorer.repeats else {}),
        "command": command,
        "seed": ", ".join(map(str, sorted({cell.seed for cell in cells}))) + REPEATED * (seeds > 1),
        "versions": {**versions(), "torch": torch.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {platform.system()}",
        "seconds": round(benchmark.seconds),
        "sizes": vars(plan.sizes),
        "fit": len(subject.splits.fit),
        "calibrate": len(subject.splits.calibrate),
        "backdoored classifiers": f"the guard's own, trained on for {plan.sizes.poisoned_epochs} epochs with "
        f"{min(plan.sizes.poisoned, len(subject.splits.train))} images, a part of them poisoned (WaNet: {LONGER['wanet']} times as many "
        f"epochs, and images as far as there are any); a guided denoiser is trained anew for each, for "
        f"{GUIDED_EPOCHS} epoch, and a hardened copy for at most {HARDENED_EPOCHS}",
    }
    write_results(cells, benchmark.scores, facts, out)
    console.print(f"{out}: {len(cells)} cells")
    return cells
