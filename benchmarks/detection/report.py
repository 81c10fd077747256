"""The pages of a detection benchmark, from its cells and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from noisec.benchmarks.detection.cells import Cell
from noisec.benchmarks.detection.goals import goal_table, goals
from noisec.benchmarks.detection.plots import PLOTS, Scores, draw
from noisec.benchmarks.detection.rows import data_name, guards_of, over_seeds, read_summary, rows_of, write_csv, write_summary
from noisec.benchmarks.detection.tables import false_positives, guard_table, sections
from noisec.errors import NoisecError

NOTES = "notes.md"
PROTOCOLS = """Two protocols, never mixed. *Honest*: benign is clean images and the same with natural noise, none of which the guard was
fitted or calibrated on; rows marked "(successful)" count only attacks that got the label they wanted. *Published*: benign is the clean
image plus the attack's own noise with its pixels shuffled, and attacks that failed count as positives, as in the paper. The detector
"fitted on the tested images" repeats the paper's fit as well: one mixture on five noisy copies of each of a hundred images, which are
then tested (means over groups of a hundred); its false alarms on other images show what that is worth. The paper's
figures are from arXiv 2406.13073. FPR is realised on clean images at a nominal 1 %. ± is the standard deviation over seeds."""


def write_results(cells: Sequence[Cell], scores: Scores, facts: Mapping[str, Any], folder: Path) -> None:
    """Write ``cells.csv``, ``summary.json``, ``README.md`` and the plots. What somebody has to say of them goes into ``notes.md``, which
    the page then leads to.

    Args:
        scores: for the plots; sets of images are "clean", "natural noise" and attacks such as "pgd-0.1"; "default" is among the detectors
        facts: ``command``, ``seed``, ``versions``, ``machine``, ``seconds``, ``sizes`` and whatever else a reader should know
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(cells, folder / "cells.csv")
    write_summary(cells, folder / "summary.json")
    plots = draw(cells, scores, folder)
    notes = NOTES if (folder / NOTES).is_file() else ""
    (folder / "README.md").write_text(as_markdown(cells, facts, plots, notes))


def merge(folders: Sequence[Path], into: Path | None = None) -> None:
    """Join the summaries of several guards, and write an index of them.

    Args:
        into: gets ``summary.json`` and ``README.md``; the first folder's parent if left out

    Raises:
        NoisecError: there is nothing to join.
    """
    if not folders:
        raise NoisecError("no folders of results to join")
    into = folders[0].parent if into is None else into
    found = {folder: read_summary(folder / "summary.json") for folder in folders}
    cells = [cell for part in found.values() for cell in part]
    into.mkdir(parents=True, exist_ok=True)
    write_summary(cells, into / "summary.json")
    (into / "README.md").write_text(_index(found, cells, into))


def as_markdown(cells: Sequence[Cell], facts: Mapping[str, Any], plots: Sequence[str] = (), notes: str = "") -> str:
    """Every table of a benchmark; a table without rows is left out."""
    rows = over_seeds(cells)
    parts = [
        "# Detection: " + ", ".join(f"{data_name(data)}, guard `{guard}`" for data, guard in guards_of(rows)),
        PROTOCOLS,
        _facts(facts),
        f"What was tried, and what these figures do not show: [notes]({notes})." if notes else "",
    ]
    for data, guard in guards_of(rows):
        of_guard = rows_of(rows, data, guard)
        parts += [f"## {data_name(data)}, guard `{guard}`", false_positives(of_guard)]
        parts += [f"### {title}\n\n{body}" for title, body in sections(of_guard) if body]
    parts.append("## Goals\n\n" + goal_table(goals(cells)))
    parts += [f"![{title}]({name})" for name, title in PLOTS.items() if name in plots]
    return "\n\n".join(part for part in parts if part) + "\n"


def _index(found: Mapping[Path, Sequence[Cell]], cells: Sequence[Cell], into: Path) -> str:
    text = (
        "The guard's own verdict, honest protocol, means over the successful white-box attacks (FGSM, BIM, PGD, UAP, Square) at the "
        "paper's eps. `summary.json` has every row."
    )
    return "\n\n".join(["# Detection", PROTOCOLS, text, guard_table(found, into), "## Goals", goal_table(goals(cells))]) + "\n"


def _facts(facts: Mapping[str, Any]) -> str:
    command = f"```sh\n{facts['command']}\n```\n\n" if "command" in facts else ""
    return command + "\n".join(f"- {name}: {_fact(name, value)}" for name, value in facts.items() if name != "command")


def _fact(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return f"{value:,.0f}" if name == "seconds" else str(value)
