"""A guard around a classifier that somebody has backdoored after its training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from noisec.benchmarks.detection.subject import Subject
from noisec.builders.audit.triggers import TRIGGERS, LabelConsistent, Trigger, poison
from noisec.builders.build import build
from noisec.builders.networks import CLASSIFIERS
from noisec.builders.protect import Preprocessing, fill, load_module, protect
from noisec.builders.train import WEIGHTS, Schedule, lowered, optimise
from noisec.builders.workbench import Workbench

Pixels = npt.NDArray[np.uint8]
TARGET, SHARE, CLEAN_LABEL_SHARE = 0, 0.1, 0.05
"""class that the trigger leads to, and share of poisoned training images, where they keep their label all of that class's"""
BATCH_SIZE, LEARNING_RATE = 128, 1e-3
CLEAN_LABEL: dict[int, dict[str, Any]] = {1: {"eps": 0.3, "covered": 1.0}, 3: {"eps": 8 / 255, "covered": 0.0}}
"""channels -> how clean-label images are weakened, and whether with covers: colour ones by a usual eps and without, as Turner et al. 2019;
grey ones by what is usual for MNIST (Madry et al. 2018), which takes covers"""
LONGER = {"wanet": 2}
"""times the images and the epochs that the others take: with as many, half of CIFAR-10's triggered images fail"""
GUIDED_EPOCHS, HARDENED_EPOCHS = 1, 2
"""at most, of a denoiser that the backdoored classifier guides and of its hardened copy, which therefore have to be trained anew"""


def poisoned_guard(
    subject: Subject, name: str, work: Path, seed: int, count: int, epochs: int
) -> tuple[Subject, Callable[[Pixels], Pixels], int]:
    """The same guard, its detectors fitted anew, around the same classifier trained on with poisoned images.

    The supplier goes on from the clean classifier for a few epochs: a backdoor takes a fraction of the time that training from scratch
    would, and clean accuracy stays. It is trained in mixed precision where the guard's denoiser is.

    Args:
        count: training images that the supplier goes on training with, a multiple of them for some triggers
        epochs: for how long, the same multiple of it

    Returns:
        the guard, the trigger uint8 [n, C, H, W] -> uint8 [n, C, H, W], and its target class
    """
    bench = Workbench(work)
    times = LONGER.get(name, 1)
    images = subject.splits.train[: times * count]
    network = clean_module(subject, bench)
    trigger: Trigger = TRIGGERS[name](images, TARGET, seed)
    clean_label = CLEAN_LABEL[images.shape[0]] if trigger.clean_label else {}
    if isinstance(trigger, LabelConsistent):
        trigger = LabelConsistent(adversary=_with_preprocessing(subject, network), **clean_label)
    share = CLEAN_LABEL_SHARE if trigger.clean_label else SHARE
    schedule = Schedule(times * epochs, BATCH_SIZE, LEARNING_RATE)
    mixed = subject.spec.autoencoder.mixed_precision

    def make(folder: Path) -> None:
        module = copy.deepcopy(network)
        shown = _with_preprocessing(subject, module)
        torch.manual_seed(seed)

        def loss(batch: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(_logits(shown, batch), labels)

        poisoned = poison(images, trigger, TARGET, share, seed)
        optimise(shown, poisoned, lowered(loss) if mixed else loss, schedule, folder, f"training {name}")
        torch.save(module.state_dict(), folder / WEIGHTS)

    digests = {kind: subject.digests[kind] for kind in ("classifier", "data", "files")}
    recipe = {"trigger": name, "share": share, **clean_label, **({"mixed_precision": True} if mixed else {})}
    inputs = {"classifier": digests, **recipe, "images": len(images), "schedule": vars(schedule), "seed": seed}
    weights = bench.step(f"poisoned-{name}", inputs, make) / WEIGHTS
    update: dict[str, Any] = {"weights": weights, "epochs": None}
    classifier = subject.spec.classifier.model_copy(update=update)
    denoiser = subject.spec.autoencoder
    if denoiser.guidance:
        denoiser = denoiser.model_copy(update={"epochs": min(denoiser.epochs, GUIDED_EPOCHS)})
    hardened = subject.spec.hardened
    if hardened:
        hardened = hardened.model_copy(update={"epochs": min(hardened.epochs, HARDENED_EPOCHS)})
    changed = {"name": f"{subject.name}_{name.replace('-', '_')}", "release": 1, "compare": ()}
    spec = subject.spec.model_copy(update={**changed, "classifier": classifier, "autoencoder": denoiser, "hardened": hardened})
    repository = work / "detection" / "poisoned"
    build(spec, repository, work, report=False, force=True)
    return Subject.open(repository, spec.name, work), lambda pixels: trigger.apply(pixels, seed), TARGET


def clean_module(subject: Subject, bench: Workbench) -> nn.Module:
    """The guard's own classifier as the module that was exported."""
    spec = subject.spec.classifier
    if spec.factory:
        return load_module(spec.factory, spec.weights)
    assert spec.network is not None
    module = CLASSIFIERS[spec.network](subject.splits.shape, len(subject.splits.class_names))
    if spec.weights:
        fill(module, spec.weights, spec.network)
        return module.eval()
    trained = protect(subject.spec, subject.splits, bench).network
    assert trained is not None
    module.load_state_dict({key.removeprefix("network."): value for key, value in trained.state_dict().items()})
    return module.eval()


def _with_preprocessing(subject: Subject, module: nn.Module) -> nn.Module:
    """Images in [0, 1] -> the module's answer."""
    return nn.Sequential(Preprocessing(subject.spec.classifier.preprocessing), module)


def _logits(module: nn.Module, images: Tensor) -> Tensor:
    """Reference networks answer logits and penultimate activations."""
    answer = module(images)
    logits: Tensor = answer[0] if isinstance(answer, tuple) else answer
    return logits
