"""What the NoiSec paper (arXiv 2406.13073) published, as data, and how far such figures can be trusted."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType

ATTACKS = ("fgsm", "pgd", "bim", "uap", "square")
"""columns of the paper's tables"""
BACKDOORS = ("badnets", "blend", "wanet", "label-consistent")
NAMES = MappingProxyType({"fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "gtsrb": "GTSRB", "pneumoniamnist": "PneumoniaMNIST"})
"""data set -> what the tables call it; the paper's Med-MNIST is PneumoniaMNIST"""
IMAGES = 100
"""benign images, and as many attacked ones, behind every published AUROC"""
RECIPE_GUARDS = frozenset({"cifar10"})
"""guards that are built with the paper's CIFAR-10 recipe: its classifier, its autoencoder, one Gaussian on F(n)"""

_TABLE = """
fashion-mnist  NoiSec     white-box  .96  .92  .93 .95  .84
fashion-mnist  NoiSec     black-box  .86  .79  .86 .94  .83
fashion-mnist  MagNet     white-box  .68  .86  .85 .62  .92
fashion-mnist  MagNet     black-box  .67  .75  .71 .59  .72
fashion-mnist  Artifacts  white-box  .80  .74  .76 .79  .53
fashion-mnist  Artifacts  black-box  .74  .67  .67 .74  .56
fashion-mnist  MANDA      white-box  .52  .44  .45 .64  .80
fashion-mnist  MANDA      black-box  .60  .74  .63 .61  .67
cifar10        NoiSec     white-box  .98 1.00 1.00 .90  .91
cifar10        NoiSec     black-box  .94  .96  .97 .88  .92
cifar10        MagNet     white-box  .63  .83  .83 .50  .35
cifar10        MagNet     black-box  .48  .50  .51 .51  .31
cifar10        Artifacts  white-box  .61  .57  .49 .51  .52
cifar10        Artifacts  black-box  .59  .52  .60 .55  .47
cifar10        MANDA      white-box  .52  .73  .66 .55  .61
cifar10        MANDA      black-box  .58  .59  .61 .49  .46
gtsrb          NoiSec     white-box  .89  .88 1.00 .84 1.00
gtsrb          NoiSec     black-box  .83  .87  .90 .70 1.00
pneumoniamnist NoiSec     white-box  .90  .83  .98 .99  .91
pneumoniamnist NoiSec     black-box  .74  .67  .79 .80  .89
"""


def _table(text: str) -> dict[tuple[str, str, str, str], float]:
    lines = (line.split() for line in text.strip().splitlines())
    return {(*line[:3], attack): float(value) for line in lines for attack, value in zip(ATTACKS, line[3:], strict=True)}  # type: ignore[misc]


AUROC: Mapping[tuple[str, str, str, str], float] = MappingProxyType(_table(_TABLE))
"""(data set, detector, access, attack) -> AUROC"""
BACKDOOR_AUROC = MappingProxyType({"badnets": 0.98, "label-consistent": 0.88, "wanet": 0.95})
"""NoiSec, CIFAR-10, ResNet-18"""
BACKDOOR_MEANS = MappingProxyType({"NoiSec": 0.937, "IBD-PSC": 0.883, "SCALE-UP": 0.870})
"""the paper's averages over its backdoors"""
TPR_AT_1PCT = MappingProxyType(
    {
        **{"fgsm": 0.77, "bim": 0.93, "pgd": 0.96, "uap": 0.66, "square": 0.30, "cw": 0.16},
        **{"badnets": 0.014, "wanet": 0.61, "label-consistent": 0.02},
    }
)
"""NoiSec; read off the paper's ROC curves, so no better than a few hundredths"""
EPS = MappingProxyType(
    {
        "fashion-mnist": {"fgsm": 0.10, "bim": 0.10, "pgd": 0.10, "uap": 0.10, "square": 0.20},
        "cifar10": {"fgsm": 0.01, "bim": 0.01, "pgd": 0.01, "uap": 0.01, "square": 0.10},
        "gtsrb": {"fgsm": 0.20, "bim": 0.10, "pgd": 0.10, "uap": 0.10, "square": 0.20},
        "pneumoniamnist": {"fgsm": 0.05, "bim": 0.05, "pgd": 0.05, "uap": 0.10, "square": 0.05},
    }
)
"""data set -> attack -> largest change of a pixel in [0, 1]"""


def family(attack: str) -> str:
    """The method behind an attack's name: ``pgd`` of ``pgd (successful)`` or ``transfer-pgd``; other names without their addition."""
    words = re.split(r"[^a-z0-9]+", attack.lower())
    return next((word for word in words if word in ATTACKS), attack.split(" (")[0])


def paper_eps(dataset: str, attack: str) -> float | None:
    """The paper's bound; attackers that it does not have get its PGD's."""
    bounds = EPS.get(dataset)
    return None if bounds is None else bounds.get(family(attack), bounds["pgd"])


def at_paper_eps(dataset: str, attack: str, eps: float) -> bool:
    bound = paper_eps(dataset, attack)
    return bound is not None and math.isclose(eps, bound, abs_tol=1e-6)


def paper_detector(detector: str) -> str:
    """The paper's name of one of our detectors: ``MANDA`` of ``MANDA (supervised)``; a guard's own verdict stands beside NoiSec."""
    return "NoiSec" if detector == "default" else detector.split(" ")[0]


def paper_auroc(dataset: str, detector: str, access: str, attack: str, eps: float) -> float | None:
    """The published cell for one of ours; None where there is none at this eps."""
    if access == "backdoor":
        return BACKDOOR_AUROC.get(family(attack)) if (dataset, paper_detector(detector)) == ("cifar10", "NoiSec") else None
    if not at_paper_eps(dataset, attack, eps):
        return None
    return AUROC.get((dataset, paper_detector(detector), access, family(attack)))


def paper_tpr(dataset: str, detector: str, access: str, attack: str, eps: float) -> float | None:
    """TPR at 1 % FPR, where the paper has a curve: NoiSec on CIFAR-10, white-box and backdoors."""
    same = (dataset, paper_detector(detector)) == ("cifar10", "NoiSec") and access in ("white-box", "backdoor")
    return TPR_AT_1PCT.get(family(attack)) if same and (access == "backdoor" or at_paper_eps(dataset, attack, eps)) else None


def standard_error(auroc: float, positives: int = IMAGES, negatives: int = IMAGES) -> float:
    """Standard error of an AUROC (Hanley and McNeil 1982, exponential approximation)."""
    both_above, both_below = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    spread = auroc * (1 - auroc) + (positives - 1) * (both_above - auroc**2) + (negatives - 1) * (both_below - auroc**2)
    return math.sqrt(max(spread, 0.0) / (positives * negatives))


def band(auroc: float) -> tuple[float, float]:
    """Two standard errors around a published AUROC.

    Published figures have two decimals: 1.00 may have been .995, and gets that figure's standard error instead of none.
    """
    margin = 2 * standard_error(min(auroc, 0.995))
    return max(auroc - margin, 0.0), min(auroc + margin, 1.0)
