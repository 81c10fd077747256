"""Published detectors to compare a guard with, written here from their papers' descriptions.

A detector is constructed with what it needs of the protected classifier and fitted once on clean images. Those that see attacks while
they are fitted are ``Supervised``, and their names say so: their figures are not comparable with the others' on the attack they saw.
"""

from noisec.benchmarks.detection.baselines.artifacts import Artifacts
from noisec.benchmarks.detection.baselines.backdoor import IbdPsc, ScaleUp, Strip
from noisec.benchmarks.detection.baselines.base import Baseline, Features, Network, Supervised
from noisec.benchmarks.detection.baselines.magnet import MagNet, divergence_alone, reconstruction_error_alone
from noisec.benchmarks.detection.baselines.manda import Manda
from noisec.benchmarks.detection.baselines.transitions import Transitions, layers_of

__all__ = [
    "Artifacts",
    "Baseline",
    "Features",
    "IbdPsc",
    "MagNet",
    "Manda",
    "Network",
    "ScaleUp",
    "Strip",
    "Supervised",
    "Transitions",
    "divergence_alone",
    "layers_of",
    "reconstruction_error_alone",
]
