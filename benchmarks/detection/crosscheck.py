"""PGD and Square of the benchmark beside those of AutoAttack's authors: a weak attack would make every detector look strong.

Needs ``pip install pyautoattack==0.2.0``.

Example: ``python -m noisec.benchmarks.detection.crosscheck model_repository fashion_mnist --attacks pgd-0.1,square-0.2``
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from noisec.benchmarks.detection.cells import share
from noisec.benchmarks.detection.run import Benchmark, Plan, Sizes
from noisec.benchmarks.detection.subject import Subject
from noisec.builders.attacks import PGD_STEPS, AttackSpec
from noisec.builders.figures import auroc, markdown_table, percent, tpr_at
from noisec.builders.images import Floats, Images
from noisec.errors import NoisecError

TWINS: Mapping[str, str] = MappingProxyType({"pgd": "apgd-ce", "square": "square"})
"""our attack -> the name of the authors' own"""


@dataclass(frozen=True)
class Attacked:
    """One library's attack on the same images."""

    library: str
    attack: str
    pixels: Floats


def theirs(subject: Subject, images: Images, spec: AttackSpec, queries: int, seed: int) -> Attacked:
    """The authors' attack with the benchmark's budget: as many steps, or queries, and no restart.

    Raises:
        NoisecError: their library is not installed, or does not have this attack.
    """
    try:
        from pyautoattack import AutoAttack  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise NoisecError("the cross-check asks AutoAttack's authors' own library: pip install pyautoattack==0.2.0") from error
    if spec.method not in TWINS:
        raise NoisecError(f"no cross-check of {spec.name}: choose of {', '.join(TWINS)}")
    name = TWINS[spec.method]
    made = AutoAttack(subject.classifier, attacks=[name], version="custom", eps=spec.eps, seed=seed, device="cpu")
    made.verbose = False
    made.apgd.n_restarts, made.apgd.n_iter, made.square.n_queries = 1, PGD_STEPS, queries
    pixels, _ = made.run_standard_evaluation(torch.from_numpy(images.floats()), torch.from_numpy(images.labels))
    return Attacked("pyautoattack", name, pixels.numpy())


def compare(benchmark: Benchmark, spec: AttackSpec, count: int) -> list[list[str]]:
    """A line for each library: success, and what the guard's own verdict makes of the attacks that succeeded."""
    subject, images = benchmark.subject, benchmark.targets
    queries = benchmark.plan.sizes.square
    ours = Attacked("adversarial-robustness-toolbox", spec.method, benchmark.attacked(spec, images, "report").pixels[:count])
    harmless = subject.scorer.score(benchmark.harmless.tensors)
    rows = []
    for one in (ours, theirs(subject, images[:count], spec, queries, benchmark.seed)):
        won = subject.predict(one.pixels).argmax(axis=1) != images.labels[:count]
        scores = subject.scorer.score(benchmark.send(one.pixels[won], spec.name).tensors)
        figures = [f"{auroc(harmless, scores):.3f}", percent(tpr_at(harmless, scores, 0.01))] if won.any() else ["-", "-"]
        rows.append([one.library, one.attack, f"{spec.eps:g}", percent(share(won)), *figures, str(count)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("guard")
    parser.add_argument("--attacks", default="pgd-0.1,square-0.2", help="with commas")
    parser.add_argument("--count", type=int, default=200, help="images that are attacked")
    parser.add_argument("--square", type=int, default=500, help="queries")
    parser.add_argument("--work", type=Path, default=Path("workbench"))
    given = parser.parse_args()
    subject = Subject.open(given.repository, given.guard, given.work / given.guard)
    benchmark = Benchmark(subject, Plan((), sizes=Sizes(square=given.square)), given.work / given.guard, 0)
    rows = [row for name in given.attacks.split(",") for row in compare(benchmark, AttackSpec.parse(name), given.count)]
    print(markdown_table(["library", "attack", "eps", "success", "AUROC (successful)", "TPR at 1 %", "images"], rows))


if __name__ == "__main__":
    main()
