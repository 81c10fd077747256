"""The markdown tables of a detection benchmark."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from noisec.benchmarks.detection import published
from noisec.benchmarks.detection.cells import Cell
from noisec.benchmarks.detection.rows import (
    DASH,
    LADDER,
    LEAST,
    Paired,
    Row,
    alarms,
    choose,
    data_name,
    detectors_of,
    each_backdoor,
    figures_of,
    guards_of,
    means_of,
    not_taken,
    ordered,
    over_seeds,
    paired,
    paper_of,
    range_of,
    rows_of,
    standing,
    three,
)
from noisec.builders.figures import markdown_table, percent


def sections(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Titles and tables of one guard; a table without rows is empty."""
    return [
        ("Honest protocol, the guard's own verdict", _table(*_honest(rows))),
        ("The guard's own verdict against ablations and baselines", _against(rows)),
        ("Published protocol beside the paper", _beside_the_paper(rows)),
        ("Attackers who know more", _table(*_ladder(rows))),
        ("Backdoors", _backdoors(rows)),
    ]


def _honest(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    chosen = ordered(choose(rows, "honest", ("white-box", "black-box"), "default"))
    heads = ["access", "attack", "eps", "success", "AUROC", "TPR at 1 %", "TPR at 5 %", "FPR", "benign + malicious"]
    return heads, [
        [row.cell.access, row.cell.attack, _eps(row), row.share("success"), *_detected(row), row.share("fpr"), _images(row)]
        for row in chosen
    ]


def false_positives(rows: Sequence[Row]) -> str:
    shown = [
        f"{name} {range_of(alarms(rows, figure))}"
        for name, figure in (("clean images", "fpr"), ("clean images with natural noise", "fpr_natural_noise"))
        if alarms(rows, figure)
    ]
    return f"False alarms at a nominal 1 %: {', '.join(shown)}." if shown else ""


def _against(rows: Sequence[Row]) -> str:
    compared = {name: pair for name in detectors_of(rows) if (pair := paired(rows, name)) is not None}
    if "default" not in compared:
        return ""
    full = compared["default"].attacks
    best = [max(pair.own[figure] for pair in compared.values() if pair.attacks == full) for figure in range(2)]
    table = [
        [
            name,
            f"{pair.attacks} of {len(published.ATTACKS)}",
            *(
                _marked(show(pair.own[figure]), pair.attacks == full and pair.own[figure] >= best[figure] - 1e-9)
                for figure, show in ((0, three), (1, percent))
            ),
        ]
        for name, pair in compared.items()
    ]
    shown = markdown_table(["detector", "attacks", "mean AUROC", "mean TPR at 1 %"], table)
    text = "Means over the successful white-box attacks (FGSM, BIM, PGD, UAP, Square) at the paper's eps; the best in bold."
    if any("supervised" in name for name in compared):
        text += " Detectors marked (supervised) saw attacks while they were fitted."
    return f"{text}\n\n{shown}\n\n{_standing(compared)}"


def _standing(compared: Mapping[str, Paired]) -> str:
    ahead = [f"{name} ({'; '.join(pair.ahead())})" for name, pair in compared.items() if pair.ahead()]
    if len(compared) == 1:
        return "No other detector was measured."
    if not ahead:
        return "No ablation or baseline is ahead of the guard's own verdict on either mean."
    return f"**Ahead of the guard's own verdict**, over the attacks that both were measured on: {', '.join(ahead)}."


def _beside_the_paper(rows: Sequence[Row]) -> str:
    chosen = [row for detector in detectors_of(rows) for row in ordered(choose(rows, "published", None, detector))]
    heads = ["detector", "access", "attack", "eps", "success", "AUROC", "paper", "two standard errors", "ours is", "TPR at 1 %", "paper"]
    table = []
    for row in chosen:
        cell, paper = row.cell, paper_of(row)
        curve = published.paper_tpr(cell.dataset, cell.detector, cell.access, cell.attack, cell.eps)
        reach = DASH if paper is None else "{:.3f} to {:.3f}".format(*published.band(paper))
        table.append(
            [
                *(cell.detector, cell.access, cell.attack, _eps(row), row.share("success"), row.number("auroc")),
                *(DASH if paper is None else f"{paper:.2f}", reach, standing(row) or DASH, row.share("tpr_at_1pct")),
                DASH if curve is None else percent(curve),
            ]
        )
    if not table:
        return ""
    text = (
        f"The band is two standard errors (Hanley and McNeil 1982) of the paper's AUROC with its {published.IMAGES} + {published.IMAGES} "
        "images. The paper's TPR is read off its curves."
    )
    return f"{text}\n\n{markdown_table(heads, table)}"


def _ladder(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    chosen = [row for detector in detectors_of(rows) for row in ordered(choose(rows, None, LADDER, detector))]
    heads = ["access", "attack", "eps", "detector", "success", "joint success", "AUROC", "TPR at 1 %", "attacked", "note"]
    table = [
        [
            *(row.cell.access, row.cell.attack, _eps(row), row.cell.detector, row.share("success"), row.share("joint_success")),
            *(row.number("auroc"), row.share("tpr_at_1pct"), str(row.cell.n_malicious), _plain(row.cell.note)),
        ]
        for row in chosen
    ]
    return heads, table


def _backdoors(rows: Sequence[Row]) -> str:
    heads = ["detector", "backdoor", "success", "AUROC", "TPR at 1 %", "TPR at 5 %", "FPR", "benign + malicious", "paper's AUROC"]
    table: list[list[str]] = []
    for detector in detectors_of(rows):
        chosen = ordered(choose(rows, "honest", ("backdoor",), detector))
        for row in chosen:
            paper = paper_of(row)
            shown = [row.share("success"), *_detected(row), row.share("fpr"), _images(row), DASH if paper is None else f"{paper:.2f}"]
            table.append([detector, row.cell.attack, *shown])
        weak = not_taken(chosen)
        counted = figures_of({name: group for name, group in each_backdoor(chosen).items() if name not in weak})
        if len(counted) > 1:
            values, mean = means_of(list(counted.values())), published.BACKDOOR_MEANS.get(published.paper_detector(detector))
            paper_mean = DASH if mean is None or chosen[0].cell.dataset != "cifar10" else three(mean)
            table.append([detector, f"mean of {len(counted)}", DASH, three(values[0]), percent(values[1]), *[DASH] * 3, paper_mean])
    if not table:
        return ""
    text = (
        "Honest protocol. The paper's figures are for its own protocol with a ResNet-18, and its means are over BadNets, label-consistent "
        f"and WaNet; ours count the successful rows where there are any, of backdoors that succeed on at least {LEAST} images."
    )
    return f"{text}\n\n{markdown_table(heads, table)}"


def guard_table(found: Mapping[Path, Sequence[Cell]], into: Path) -> str:
    """A line for each guard, with a link from ``into`` to the folder that has its tables."""
    linked = [
        [
            data_name(data),
            guard,
            f"[tables and plots]({Path(os.path.relpath(folder, into)).as_posix()}/README.md)",
            *_headline(rows, data, guard),
        ]
        for folder, part in found.items()
        for rows in [over_seeds(part)]
        for data, guard in guards_of(rows)
    ]
    heads = ["data set", "guard", "details", "attacks", "mean AUROC", "mean TPR at 1 %", "FPR"]
    return markdown_table(heads, linked)


def _headline(rows: Sequence[Row], data: str, guard: str) -> list[str]:
    rows = rows_of(rows, data, guard)
    pair, false = paired(rows, "default"), range_of(alarms(rows, "fpr"))
    if pair is None:
        return [f"0 of {len(published.ATTACKS)}", DASH, DASH, false]
    return [f"{pair.attacks} of {len(published.ATTACKS)}", three(pair.own[0]), percent(pair.own[1]), false]


def _table(heads: list[str], rows: list[list[str]]) -> str:
    return markdown_table(heads, rows) if rows else ""


def _detected(row: Row) -> list[str]:
    return [row.number("auroc"), row.share("tpr_at_1pct"), row.share("tpr_at_5pct")]


def _images(row: Row) -> str:
    return f"{row.cell.n_benign} + {row.cell.n_malicious}"


def _eps(row: Row) -> str:
    return f"{row.cell.eps:.3g}" if row.cell.eps else DASH


def _marked(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def _plain(text: str) -> str:
    """Without what would end a table's cell."""
    return " ".join(text.replace("|", "/").split()) or DASH
