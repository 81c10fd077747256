"""The demo: build a guard around a backdoored classifier, serve it on a real Triton, attack it over gRPC."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton_grpc

from noisec import contract, manifest
from noisec.benchmarks.plots import Example, draw_demo
from noisec.builders import attacks
from noisec.builders.attacks import AttackedImages
from noisec.builders.build import Guard, build
from noisec.builders.figures import Answers, attack_figures, clean_figures, figure_rows
from noisec.builders.progress import console
from noisec.builders.spec import GUARDS, read_spec
from noisec.clients import GuardClient
from noisec.contract import stage_model
from noisec.python_backend.server import EmbeddedServer

Floats = npt.NDArray[np.float32]
LOAD_CLIENTS, LOAD_SECONDS = 8, 4.0
PICTURED = ("fgsm-0.1", "pgd-0.1", "badnets")


@dataclass(frozen=True)
class Sent:
    """The demo's images by kind."""

    clean: Floats
    noisy: Floats
    attacked: dict[str, AttackedImages]


def run_demo(folder: Path) -> tuple[dict[str, Any], list[str], list[list[str]]]:
    """Build, serve, attack and measure, from scratch.

    Args:
        folder: gets ``model_repository/`` and ``demo.png``

    Returns:
        figures, and column heads and rows of the table to show
    """
    start = time.monotonic()
    shutil.rmtree(folder / "build", ignore_errors=True)
    spec = read_spec(GUARDS / "demo.toml")
    guard = build(spec, folder / "model_repository", folder / "build", report=False)
    console.print("attacking the classifier with its own gradients")
    report = guard.splits.report
    sent = Sent(
        report.floats(),
        attacks.noisy_clean(report, spec.natural_noise_sd, spec.seed + 2),
        dict(attacks.attack_all(spec, guard.protected, report)),
    )
    with EmbeddedServer(guard.repository) as server, GuardClient(server.grpc_url, spec.name) as client:
        console.print(f"asking {spec.name} at {server.grpc_url}")
        clean, noisy = ask(client, sent.clean), ask(client, sent.noisy)
        answers = {name: ask(client, attacked.pixels) for name, attacked in sent.attacked.items()}
        rate = requests_per_second(server.grpc_url, spec.name, sent.clean)
        examples = pick_examples(client, server.grpc_url, guard, sent, clean, answers)
    figures = clean_figures(clean, noisy, report.labels, spec.target_fpr)
    figures["attacks"] = {
        name: attack_figures(clean, answers[name], attacked.succeeded(answers[name].labels)) for name, attacked in sent.attacked.items()
    }
    figures["requests_per_second"] = rate
    draw_demo(folder / "demo.png", examples, clean, noisy, answers, guard.threshold)
    figures["seconds"] = time.monotonic() - start
    content = manifest.read_manifest(guard.repository, spec.name, spec.release)
    manifest.write_manifest(guard.repository, spec.name, spec.release, {**content, "figures": figures})
    return figures, *figure_rows(figures)


def ask(client: GuardClient, images: Floats) -> Answers:
    """The guard's answers over gRPC."""
    verdicts = client.classify(images)
    assert verdicts.scores is not None
    assert verdicts.is_malicious is not None
    return Answers(verdicts.labels, verdicts.scores, verdicts.is_malicious)


def requests_per_second(url: str, guard: str, images: Floats) -> float:
    """Answered single-image requests a second, from several clients at once for a few seconds."""
    counts = [0] * LOAD_CLIENTS
    deadline = time.monotonic() + LOAD_SECONDS

    def load(index: int) -> None:
        with GuardClient(url, guard) as client:
            for row in itertools.cycle(range(index, len(images), LOAD_CLIENTS)):
                if time.monotonic() > deadline:
                    return
                client.classify(images[row])
                counts[index] += 1

    start = time.monotonic()
    threads = [threading.Thread(target=load, args=(index,)) for index in range(LOAD_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - start)


def pick_examples(client: GuardClient, url: str, guard: Guard, sent: Sent, clean: Answers, answers: dict[str, Answers]) -> list[Example]:
    """One image of each kind, asked once more, with its noise as the served autoencoder answers it.

    The same image throughout: the first that most of the pictured attacks changed.
    """
    report, backdoor = guard.splits.report, guard.spec.classifier.backdoor
    assert backdoor is not None
    rows = np.flatnonzero(report.labels != backdoor.target)  # the trigger is on these alone
    place = {name: np.arange(len(rows)) if name == "badnets" else rows for name in PICTURED}
    fooled = [sent.attacked[name].succeeded(answers[name].labels)[place[name]] for name in PICTURED]
    first = int(np.argmax(np.sum([*fooled, clean.labels[rows] == report.labels[rows]], axis=0)))
    image = sent.clean[rows[first]]
    noisy = image + guard.spec.natural_noise_sd * np.random.default_rng(0).standard_normal(image.shape, dtype=np.float32)
    kinds = {"clean": image, "sensor noise": noisy.clip(0, 1)}
    kinds |= {name: sent.attacked[name].pixels[place[name][first]] for name in PICTURED}
    images = np.stack(list(kinds.values()))
    said = ask(client, images)
    return [
        Example(kind, image, noise, client.interface.name_of(label), score, malicious)
        for kind, image, noise, label, score, malicious in zip(
            kinds,
            images,
            served_noise(url, guard.spec.name, images),
            said.labels.tolist(),
            said.scores.tolist(),
            said.is_malicious.tolist(),
            strict=True,
        )
    ]


def served_noise(url: str, guard: str, images: Floats) -> Floats:
    """NOISE of the served autoencoder stage: float32 [n, C, H, W]."""
    with triton_grpc.InferenceServerClient(url) as client:
        image = triton_grpc.InferInput(contract.IMAGE, images.shape, "FP32").set_data_from_numpy(images)
        noise: Floats = client.infer(stage_model(guard, "autoencoder"), [image]).as_numpy(contract.NOISE)
    return noise
