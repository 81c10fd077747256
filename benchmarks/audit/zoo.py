"""Clean and backdoored classifiers, each trained once and kept with its recipe, its accuracy and its attack success."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from noisec.benchmarks.audit.families import FAMILIES
from noisec.builders.audit.measure import accuracy, attack_success
from noisec.builders.audit.triggers import TRIGGERS, InputAware, PatternGenerator, Trigger, WaNet, poison
from noisec.builders.images import Images, cut
from noisec.builders.sources import fashion_mnist
from noisec.builders.sources.official import local
from noisec.builders.train import WEIGHTS, Loss, Schedule, has_bfloat16, load_network, lowered, moved, optimise
from noisec.builders.workbench import Workbench

Role = Literal["reported", "calibration", "tuning"]

CLEAN = "none"
FEW, UNBALANCED, AUGMENTED = "few-classes", "unbalanced", "augmented"
HARD = (FEW, UNBALANCED, AUGMENTED)
"""clean classifiers that an audit could take for backdoored ones"""
ATTACKS = ("badnets", "blend", "wanet", "iad", "bpp")
SHARES = {"wanet": 0.2}
"""share of poisoned training images, where it is not `SHARE`"""
SHARE = 0.1
WARP = 1.0
"""WaNet's strength: a mean shift of half a pixel, twice the paper's, whose warp next to nobody sees on 28 x 28 pixels, networks included"""
TOOK = 0.8
"""attack success below which a backdoor did not take"""
FEW_CLASSES, IMBALANCE, DEVIATION = 3, 10, 0.1
FIRST_SEED, CALIBRATION_SEED, TUNING_SEED = 1, 100, 200
"""first seed of the classifiers that are reported, of those that only thresholds are fitted on, and of those that settings and the repair's
learning rate were chosen on"""
POOL, PARTS = 36_000, (5 / 6, 1 / 12, 1 / 12)
"""official images that are used; the shares of them for training, audits and measurement"""
BATCH, LEARNING_RATE = 64, 4e-3


@dataclass(frozen=True)
class Data:
    """Three disjoint sets of clean images."""

    name: str
    train: Images
    audit: Images
    """what a defender has, unseen in training"""
    test: Images
    """what accuracy and attack success are measured on"""

    @property
    def classes(self) -> int:
        return int(self.train.labels.max()) + 1

    def of(self, case: str) -> Data:
        """The sets of a hard case: fewer classes, or one class with `IMBALANCE` times as many training images as each other; of any other
        case these."""
        if case == FEW:
            parts = (one[np.flatnonzero(one.labels < FEW_CLASSES)] for one in (self.train, self.audit, self.test))
            return Data(self.name, *parts)
        return Data(self.name, _unbalanced(self.train), self.audit, self.test) if case == UNBALANCED else self


def _unbalanced(images: Images) -> Images:
    counts = np.bincount(images.labels)
    kept = [np.flatnonzero(images.labels == label)[: count // (IMBALANCE if label else 1)] for label, count in enumerate(counts)]
    return images[np.sort(np.concatenate(kept))]


def load_data() -> Data:
    """`POOL` of the official training images of Fashion-MNIST where NOISEC_DATA holds them, else the 10,000 that ship with the package."""
    official = local("fashion-mnist", "train-images-idx3-ubyte.gz") is not None
    pool = fashion_mnist.load("train" if official else "t10k")
    count = min(POOL, len(pool))
    name = f"{count:,} of the official training images" if official else f"the {count:,} official test images, which ship with the package"
    return Data(f"Fashion-MNIST, {name}", *cut(pool, [round(share * count) for share in PARTS], [0]))


@dataclass(frozen=True)
class Recipe:
    """One classifier of the zoo."""

    family: str
    attack: str
    """`CLEAN`, one of `HARD`, or a trigger"""
    seed: int
    role: Role = "reported"
    on: str = ""
    """`UNBALANCED` where a backdoored one has that case's training images; empty for all the images"""

    @property
    def case(self) -> str:
        """The hard case of its training images (`Data.of`); empty for all of them."""
        return self.attack if self.attack in (FEW, UNBALANCED) else self.on

    @property
    def backdoored(self) -> bool:
        return self.attack in ATTACKS

    @property
    def share(self) -> float:
        """of the training images that is poisoned"""
        return SHARES.get(self.attack, SHARE) if self.backdoored else 0.0

    def target(self, classes: int) -> int | None:
        """The class that its trigger leads to, another for each attack and seed; None where there is none."""
        return (3 * self.seed + 2 * ATTACKS.index(self.attack)) % classes if self.backdoored else None

    @property
    def text(self) -> str:
        return "-".join(filter(None, (self.family, self.attack, str(self.seed), self.on)))


@dataclass(frozen=True)
class Model:
    """A trained one."""

    recipe: Recipe
    folder: Path
    classes: int
    images: int
    """that it was trained on, poisoned ones among them"""
    epochs: int
    clean_accuracy: float
    attack_success: float | None
    """None where there is no backdoor"""

    @property
    def target(self) -> int | None:
        return self.recipe.target(self.classes)

    @property
    def took(self) -> bool:
        """Whether it is what its recipe says: a backdoor that hardly works is none."""
        return self.attack_success is None or self.attack_success >= TOOK


class Zoo:
    """Classifiers by recipe, trained when they are first asked for.

    Args:
        bench: keeps them
        epochs: of training; a smaller training set gets as many more, so that all take as many steps
    """

    def __init__(self, bench: Workbench, data: Data, epochs: int) -> None:
        self.bench, self.data, self.epochs = bench, data, epochs
        self.trained = 0
        """classifiers that were trained by this object, not taken from an earlier run"""

    def key(self, recipe: Recipe) -> dict[str, Any]:
        """All that a classifier depends on."""
        data = self.data
        settings = {"batch": BATCH, "rate": LEARNING_RATE, "share": recipe.share, "warp": WARP if recipe.attack == "wanet" else 0}
        chosen = {name: value for name, value in asdict(recipe).items() if value != ""}
        return {**chosen, "epochs": self.epochs, "data": data.name, "images": len(data.train), "test": len(data.test), **settings}

    def model(self, recipe: Recipe) -> Model:
        """The classifier, trained now or in an earlier run."""
        folder = self.bench.step(recipe.text, self.key(recipe), lambda folder: self._train(recipe, folder))
        return Model(recipe, folder, **json.loads((folder / "model.json").read_text()))

    def network(self, model: Model) -> nn.Module:
        """Its module, in evaluation mode."""
        return load_network(FAMILIES[model.recipe.family](self.data.train.shape, model.classes), model.folder)

    def trigger(self, recipe: Recipe) -> Trigger:
        """What its attacker puts on images. All families meet the same trigger of an attack and seed."""
        target = recipe.target(self.data.classes)
        assert target is not None
        if recipe.attack == "wanet":
            return WaNet(pattern=recipe.seed, strength=WARP)
        if recipe.attack != "iad":
            return TRIGGERS[recipe.attack](self.data.train, target, recipe.seed)
        inputs = {"seed": recipe.seed, "target": target, "data": self.data.name, "images": len(self.data.train)}
        folder = self.bench.step(f"trigger-iad-{recipe.seed}", inputs, lambda folder: self._learn_trigger(recipe, target, folder))
        return InputAware(load_network(PatternGenerator(self.data.train.shape[0]), folder).requires_grad_(False))

    def _learn_trigger(self, recipe: Recipe, target: int, folder: Path) -> None:
        learnt = TRIGGERS["iad"](self.data.train, target, recipe.seed)
        assert isinstance(learnt, InputAware)
        torch.save(learnt.generator.state_dict(), folder / WEIGHTS)

    def _train(self, recipe: Recipe, folder: Path) -> None:
        self.trained += 1
        data = self.data.of(recipe.case)
        trigger = self.trigger(recipe) if recipe.backdoored else None
        target = recipe.target(data.classes)
        images = data.train
        if trigger is not None and target is not None:
            images = poison(images, trigger, target, recipe.share, recipe.seed)
        epochs = round(self.epochs * len(self.data.train) / len(images))
        torch.manual_seed(recipe.seed)
        network = FAMILIES[recipe.family](images.shape, data.classes)
        title = f"training {recipe.text}"
        optimise(network, images, _loss(network, recipe.attack), Schedule(epochs, BATCH, LEARNING_RATE), folder, title)
        network.eval()
        success = attack_success(network, data.test, trigger, target) if trigger is not None and target is not None else None
        figures = {"clean_accuracy": accuracy(network, data.test), "attack_success": success}
        content = {"classes": data.classes, "images": len(images), "epochs": epochs, **figures}
        (folder / "model.json").write_text(json.dumps(content))


def _loss(network: nn.Module, attack: str) -> Loss:
    def loss(batch: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(network(augmented(batch) if attack == AUGMENTED else batch), labels)

    return lowered(loss) if has_bfloat16() else loss


def augmented(images: Tensor) -> Tensor:
    """Images [n, C, H, W] in [0, 1], each moved and mirrored at random, and with noise of up to `DEVIATION`."""
    shown = moved(images)
    deviations = DEVIATION * torch.rand(len(shown), 1, 1, 1, device=images.device)
    return (shown + deviations * torch.randn_like(shown)).clamp(0, 1)
