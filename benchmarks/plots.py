"""Pictures: examples, score histograms, ROC curves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from sklearn.metrics import roc_curve

from noisec.builders.figures import Answers, auroc

Floats = npt.NDArray[np.float32]
GOOD, BAD = "#2a7f3f", "#b3261e"


@dataclass(frozen=True)
class Example:
    """One input and what the guard said of it."""

    kind: str
    image: Floats
    """[C, H, W] in [0, 1]"""
    noise: Floats
    """[C, H, W], signed"""
    label: str
    score: float
    is_malicious: bool


def draw_demo(path: Path, examples: list[Example], clean: Answers, noisy: Answers, attacked: dict[str, Answers], threshold: float) -> None:
    """Examples with their noise and verdict on top, score histograms and ROC curves below."""
    figure = plt.figure(figsize=(12, 8.6), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(1.15, 1))
    top, bottom = (figure.add_subfigure(grid[row]) for row in range(2))
    for column, example in enumerate(examples):
        axes = top.add_subplot(2, len(examples), column + 1)
        axes.imshow(example.image.transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(f"{example.kind}\n“{example.label}”", fontsize=10)
        axes.set_axis_off()
        axes = top.add_subplot(2, len(examples), len(examples) + column + 1)
        axes.imshow(example.noise.mean(axis=0), cmap="RdBu", vmin=-0.15, vmax=0.15)
        verdict = "MALICIOUS" if example.is_malicious else "benign"
        axes.set_title(f"{verdict}\nscore {example.score:.1f}", fontsize=10, color=BAD if example.is_malicious else GOOD, fontweight="bold")
        axes.set_axis_off()
    top.supylabel("noise x - A(x)          image", fontsize=10)
    left, right = bottom.subplots(1, 2)
    _histograms(left, {"clean": clean, "sensor noise": noisy, **attacked}, threshold)
    _rocs(right, clean, attacked)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _histograms(axes: Axes, answers: dict[str, Answers], threshold: float) -> None:
    top = 6 * threshold
    bins = np.linspace(0, top, 60).tolist()
    for name, one in answers.items():
        benign = name in ("clean", "sensor noise")
        axes.hist(
            one.ordered().clip(0, top),
            bins=bins,
            histtype="stepfilled" if benign else "step",
            alpha=0.45 if benign else 1,
            label=name,
            linewidth=1.4,
        )
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1)
    axes.set(title="Scores (the last bin holds everything above)", xlabel="SCORE in nats; dashed: threshold", ylabel="images", yscale="log")
    axes.legend(fontsize=8)


def _rocs(axes: Axes, clean: Answers, attacked: dict[str, Answers]) -> None:
    for name, one in attacked.items():
        benign, malicious = clean.ordered(), one.ordered()
        truth = np.repeat([0, 1], [len(benign), len(malicious)])
        false, true, _ = roc_curve(truth, np.concatenate([benign, malicious]).clip(max=np.finfo(np.float32).max))
        axes.plot(np.maximum(false, 5e-4), true, label=f"{name}: {auroc(benign, malicious):.3f}", drawstyle="steps-post")
    axes.axvline(0.01, color="black", linestyle="--", linewidth=1)
    axes.set(title="ROC against clean images; AUROC in the legend", xlabel="false-positive rate (dashed: 1 %)", ylabel="true-positive rate")
    axes.set(xscale="log", xlim=(5e-4, 1), ylim=(0, 1.02))
    axes.legend(fontsize=8, loc="lower right")
