"""The plots of a detection benchmark."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from noisec.benchmarks.detection.cells import Cell, ranked
from noisec.benchmarks.detection.rows import SUCCESSFUL, Row, choose, data_name, guards_of, over_seeds, rows_of
from noisec.builders.figures import Floats, auroc

Scores = Mapping[tuple[str, str], Mapping[str, Floats]]
"""(guard, name of a set of images) -> detector -> scores float32 [n]"""
Line = list[tuple[float, float]]
"""eps and figure"""

PLOTS = {
    "roc.png": "ROC curves",
    "histograms.png": "Histograms of the scores",
    "tpr-against-eps.png": "True positives and joint success against eps",
}
BENIGN = ("clean", "natural noise")
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#bcbd22", "#3f4a8a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLES = ("-", "--", "-.", ":")
"""by eps, the largest first"""
COLUMNS = 3


def draw(cells: Sequence[Cell], scores: Scores, folder: Path) -> list[str]:
    """Draw what there is something to draw of; names of the files written. A picture of an earlier run does not outlive this one."""
    found = {
        "roc.png": _draw_rocs(scores),
        "histograms.png": _draw_histograms(scores),
        "tpr-against-eps.png": _draw_against_eps(over_seeds(cells)),
    }
    for name, figure in found.items():
        (folder / name).unlink(missing_ok=True)
        if figure is not None:
            figure.savefig(folder / name, dpi=110)
            plt.close(figure)
    return [name for name, figure in found.items() if figure is not None]


def _default_scores(scores: Scores) -> dict[str, dict[str, Floats]]:
    """Guard -> set of images -> the default detector's scores, ready to be ranked; guards without clean images or attacks are left out."""
    found: dict[str, dict[str, Floats]] = {}
    limit = np.finfo(np.float32).max
    for (guard, images), detectors in scores.items():
        if len(detectors.get("default", ())):
            found.setdefault(guard, {})[images] = ranked(detectors["default"]).clip(-limit, limit)
    return {guard: sets for guard, sets in found.items() if "clean" in sets and set(sets) - set(BENIGN)}


def _split(name: str) -> tuple[str, float]:
    """Method and eps of ``pgd-0.1``; eps is 0 where the name has none."""
    method, _, eps = name.rpartition("-")
    return (method, float(eps)) if method and re.fullmatch(r"[\d.e-]+", eps) else (name, 0.0)


def _attacks(sets: Iterable[str]) -> list[str]:
    return sorted((name for name in sets if name not in BENIGN), key=_split)


def _title(name: str) -> str:
    """``cw`` of ``cw-0``."""
    method, eps = _split(name)
    return name if eps else method


def _paleness(name: str, attacks: Sequence[str]) -> int:
    """How many larger eps the same method has."""
    method, eps = _split(name)
    return sum(other == method and bound > eps for other, bound in map(_split, attacks))


def _colours(attacks: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """A colour for each method, paler at small eps."""
    methods = list(dict.fromkeys(_split(name)[0] for name in attacks))
    found = {}
    for name in attacks:
        method = _split(name)[0]
        pale = 0.6 * _paleness(name, attacks) / sum(_split(one)[0] == method for one in attacks)
        red, green, blue = (channel + (1 - channel) * pale for channel in to_rgb(COLOURS[methods.index(method) % len(COLOURS)]))
        found[name] = (red, green, blue)
    return found


def _draw_rocs(scores: Scores) -> Figure | None:
    guards = _default_scores(scores)
    if not guards:
        return None
    figure = plt.figure(figsize=(9, 5.2 * len(guards)), layout="constrained")
    panels = figure.subplots(len(guards), 1, squeeze=False)[:, 0]
    for axes, (guard, sets) in zip(panels, guards.items(), strict=True):
        _rocs(axes, guard, sets)
    return figure


def _rocs(axes: Axes, guard: str, sets: Mapping[str, Floats]) -> None:
    clean, attacks = sets["clean"], _attacks(sets)
    for name, colour in _colours(attacks).items():
        truth = np.repeat([0, 1], [len(clean), len(sets[name])])
        false, true, _ = roc_curve(truth, np.concatenate([clean, sets[name]]), drop_intermediate=False)
        label = f"{_title(name)}: {auroc(clean, sets[name]):.3f}"
        style = STYLES[_paleness(name, attacks) % len(STYLES)]
        axes.plot(np.maximum(false, 1e-4), true, label=label, color=colour, linestyle=style, drawstyle="steps-post", linewidth=1.5)
    chance = np.geomspace(1e-3, 1, 100)
    axes.plot(chance, chance, color="grey", linestyle=":", linewidth=1)
    axes.axvline(0.01, color="black", linestyle="--", linewidth=1)
    axes.set(
        title=f"{guard}: ROC against clean images", xlabel="false-positive rate (dashed: 1 %, dotted: chance)", ylabel="true-positive rate"
    )
    axes.set(xscale="log", xlim=(1e-3, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.25)
    axes.legend(title="attack: AUROC", fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), ncols=1 + len(attacks) // 25)


def _draw_histograms(scores: Scores) -> Figure | None:
    """One panel an attack, each over the clean images."""
    guards = _default_scores(scores)
    if not guards:
        return None
    heights = [-(-len(_attacks(sets)) // COLUMNS) for sets in guards.values()]
    figure = plt.figure(figsize=(12, 1.9 * sum(heights) + 0.9 * len(guards)), layout="constrained")
    parts = figure.subfigures(len(guards), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, height, (guard, sets) in zip(parts, heights, guards.items(), strict=True):
        panels = part.subplots(height, COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
        _histograms(panels, sets)
        part.suptitle(f"{guard}: scores of clean images, of natural noise and of each attack", fontsize=12)
        part.supxlabel("score; the outer bins hold everything beyond; dashed: 1 % of the clean images score higher", fontsize=9)
        part.supylabel("share of the images", fontsize=9)
    return figure


def _histograms(panels: Sequence[Axes], sets: Mapping[str, Floats]) -> None:
    clean, attacks = sets["clean"], _attacks(sets)
    low, middle, threshold = (float(value) for value in np.quantile(clean, (0.001, 0.5, 0.99)))
    high = threshold + 3 * max(threshold - middle, 1e-6)
    bins = np.linspace(low, high, 50).tolist()
    colours = _colours(attacks)

    def bars(axes: Axes, name: str, **look: Any) -> None:
        one = sets[name].clip(low, high)
        axes.hist(one, bins=bins, weights=np.full(len(one), 1 / len(one)), **look)

    for at, (axes, name) in enumerate(zip(panels, attacks, strict=False)):
        bars(axes, "clean", histtype="stepfilled", color="#9a9a9a", alpha=0.5)
        if "natural noise" in sets:
            bars(axes, "natural noise", histtype="step", color="black", linewidth=0.9)
        bars(axes, name, histtype="stepfilled", facecolor=(*colours[name], 0.3), edgecolor=colours[name], linewidth=1.5)
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1)
        axes.set(yscale="log", ylim=(5e-4, 1.5), xlim=(low, high))
        axes.set_title(_title(name), fontsize=10, fontweight="bold")
        axes.tick_params(labelbottom=at + COLUMNS >= len(attacks))
    panels[0].legend(
        ["clean", "natural noise", "attack"] if "natural noise" in sets else ["clean", "attack"], fontsize=8, loc="upper right"
    )
    for axes in panels[len(attacks) :]:
        axes.set_axis_off()


def _draw_against_eps(rows: Sequence[Row]) -> Figure | None:
    """TPR at 1 % of white-box attacks beside the joint success of the attackers who know more."""
    guards = {pair: (_tpr_lines(rows, *pair), _joint_lines(rows, *pair)) for pair in guards_of(rows)}
    guards = {pair: lines for pair, lines in guards.items() if any(lines)}
    if not guards:
        return None
    figure = plt.figure(figsize=(12, 4.6 * len(guards)), layout="constrained")
    panels = figure.subplots(len(guards), 2, squeeze=False)
    for (left, right), ((data, guard), (detected, joint)) in zip(panels, guards.items(), strict=True):
        _lines(left, f"{data_name(data)}, {guard}: TPR at 1 % FPR", detected, "TPR of the attacks that succeeded")
        _lines(right, f"{data_name(data)}, {guard}: wrong label and no alarm", joint, "joint success")
    return figure


def _tpr_lines(rows: Iterable[Row], data: str, guard: str) -> dict[str, Line]:
    """Attack -> its line, where several eps are there; successful attacks only."""
    chosen = choose(rows_of(rows, data, guard), "honest", ("white-box",), "default")
    found = _as_lines(
        (row for row in chosen if row.cell.attack.endswith(SUCCESSFUL)), "tpr_at_1pct", lambda cell: cell.attack.removesuffix(SUCCESSFUL)
    )
    return {name: line for name, line in found.items() if len(line) > 1}


def _joint_lines(rows: Iterable[Row], data: str, guard: str) -> dict[str, Line]:
    """Access and attack -> line; the adaptive attacker also with a single eps."""
    chosen = [row for row in choose(rows_of(rows, data, guard), "honest", None, "default") if not row.cell.attack.endswith(SUCCESSFUL)]
    found = _as_lines(chosen, "joint_success", lambda cell: f"{cell.access}: {cell.attack}")
    return {name: line for name, line in found.items() if len(line) > 1 or name.startswith("adaptive")}


def _as_lines(rows: Iterable[Row], figure: str, name: Callable[[Cell], str]) -> dict[str, Line]:
    """Lines in the order of eps; the largest figure where an eps has several."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        value, eps = row.mean(figure), row.cell.eps
        if value is not None and eps > 0:
            line = found.setdefault(name(row.cell), {})
            line[eps] = max(line.get(eps, 0.0), value)
    return {label: sorted(line.items()) for label, line in found.items()}


def _lines(axes: Axes, title: str, lines: Mapping[str, Line], ylabel: str) -> None:
    if not lines:
        axes.set_axis_off()
        return
    for at, (name, line) in enumerate(sorted(lines.items())):
        adaptive = name.startswith("adaptive")
        axes.plot(
            *zip(*line, strict=True),
            label=name,
            color="black" if adaptive else COLOURS[at % len(COLOURS)],
            marker=MARKERS[at % len(MARKERS)],
            linestyle="--" if adaptive else "-",
            linewidth=2.2 if adaptive else 1.5,
            markersize=5,
        )
    ticks = sorted({eps for line in lines.values() for eps, _ in line})
    axes.set(title=title, xlabel="eps (largest change of a pixel in [0, 1])", ylabel=ylabel, xscale="log", ylim=(-0.02, 1.04))
    axes.set_xticks(ticks, [f"{eps:.2g}" for eps in ticks], fontsize=8, rotation=45)
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="best")
