"""The result of a check: one JSON file and one Markdown table."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from noisec.benchmarks.gpu.measure import LOAD_SECONDS, REPEATS
from noisec.builders.figures import markdown_table, percent
from noisec.builders.progress import console
from noisec.errors import NoisecError


class Result:
    """What has been found out so far; written after every part, so that a part that ends the process loses only itself.

    Args:
        folder: gets ``<gpu>.json`` and ``<gpu>.md``
        facts: ``gpu``, ``versions``, ``guard`` and ``release``
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self._folder = folder
        self.content: dict[str, Any] = {
            **facts,
            **{"verified": {}, "detection": {}, "speed": [], "plans": {}, "served": {}, "load": [], "skipped": {}, "failed": {}},
        }

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Do one part; one that this machine cannot do is skipped with its reason, and one that breaks is noted as broken."""
        console.print(f"{name} ...")
        try:
            yield
        except NoisecError as error:
            self.skip(name, str(error))
        except Exception as error:
            traceback.print_exc()
            self.content["failed"][name] = _one_line(f"{type(error).__name__}: {error}")
        self.write()

    def skip(self, name: str, reason: str) -> None:
        self.content["skipped"][name] = _one_line(reason)
        console.print(f"  skipped: {self.content['skipped'][name]}")

    def write(self) -> Path:
        """The Markdown file's path."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{'-'.join(self.content['gpu']['name'].lower().split())}.md"
        path.with_suffix(".json").write_text(json.dumps(self.content, indent=2) + "\n")
        path.write_text(as_markdown(self.content))
        return path


def _one_line(text: str) -> str:
    """At most 400 characters, without what would end a table's cell."""
    return " ".join(text.replace("|", "/").split())[:400]


def as_markdown(content: Mapping[str, Any]) -> str:
    """Every table of a result; a table without rows is left out."""
    gpu, versions = content["gpu"], ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    head = (
        f"# {gpu['name']}\n\nGuard `{content['guard']}` release {content['release']}; compute capability {gpu['compute_capability']}, "
        f"{gpu['memory_gib']:.0f} GiB, driver {gpu['driver']}; {versions}. Times are medians, in milliseconds.\n"
    )
    sections = [
        ("Answers against the same images on ONNX Runtime (CPU)", *_verified_rows(content["verified"])),
        ("Detection, the scorer refitted on each runtime's own answers", *_detection_rows(content["detection"])),
        (f"Network stages alone: {REPEATS} batches back to back, CUDA events", *_speed_rows(content["speed"])),
        ("TensorRT plans", ["precision", "MB", "seconds"], [[name, *map(str, one.values())] for name, one in content["plans"].items()]),
        ("Served verdicts against the same stages in process", *_served_rows(content["served"])),
        (f"Served over gRPC, {LOAD_SECONDS:g} s each", *_load_rows(content["load"])),
        ("Skipped", ["part", "reason"], [[*pair] for pair in content["skipped"].items()]),
        ("Failed", ["part", "error"], [[*pair] for pair in content["failed"].items()]),
    ]
    return "\n".join([head, *(f"## {title}\n\n{markdown_table(heads, rows)}\n" for title, heads, rows in sections if rows)])


def _verified_rows(verified: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [runtime, name, f"{one['max_abs']:.2e}", f"{one['relative']:.2e}", percent(found["label_agreement"], 2)]
        for runtime, found in verified.items()
        for name, one in found["outputs"].items()
    ]
    return ["runtime", "output", "largest difference", "of the largest value", "labels as ONNX Runtime fp32"], rows


def _detection_rows(detection: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            *(runtime, percent(found["accuracy"], 2), percent(found["fpr"], 2), percent(found["fpr_natural_noise"], 2)),
            *(name, f"{one['auroc']:.4f}", percent(one["tpr_at_1pct"]), percent(one["flagged"])),
        ]
        for runtime, found in detection.items()
        for name, one in found["attacks"].items()
    ]
    return ["runtime", "accuracy", "realised FPR", "with sensor noise", "attack", "AUROC", "TPR at 1 % FPR", "flagged"], rows


def _speed_rows(speed: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [one["runtime"], one["stage"], str(one["batch"]), f"{one['median_ms']:.3f}", f"{one['images_per_second']:,.0f}"] for one in speed
    ]
    return ["runtime", "stage", "batch", "ms", "images/s"], rows


def _served_rows(served: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [[runtime, percent(one["labels"], 2), percent(one["verdicts"], 2), f"{one['score']:.2e}"] for runtime, one in served.items()]
    return ["runtime", "same labels", "same verdicts", "largest difference of a score"], rows


def _load_rows(load: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            *(one["runtime"], str(one["clients"]), str(one["batch"])),
            *(f"{one['median_ms']:.2f}", f"{one['p99_ms']:.2f}", f"{one['images_per_second']:,.0f}"),
        ]
        for one in load
    ]
    return ["runtime", "clients", "batch", "ms", "99th percentile, ms", "images/s"], rows
