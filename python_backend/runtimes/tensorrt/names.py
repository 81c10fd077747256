"""What builders and the server agree on about plans."""

from __future__ import annotations

from pathlib import Path

from noisec.errors import NoisecError
from noisec.manifest import read_manifest


def graph_sizes(largest: int) -> list[int]:
    """Batch sizes that get a CUDA graph: the powers of two up to the largest batch, and that one."""
    return sorted({*(1 << power for power in range(largest.bit_length())), largest})


def plan_name(capability: str) -> str:
    """File name of the plan for one compute capability, such as ``9.0``."""
    return f"model_sm{capability.replace('.', '')}.plan"


def has_host_code(folder: Path) -> bool:
    """Whether plans run code of their own on the host: they do where the release's manifest says that they were built
    ``version_compatible``. A stage that lies apart from its guard's manifest may run none.

    Args:
        folder: a stage's version directory in a model repository
    """
    guard = folder.parent.name.rpartition("_")[0]
    try:
        content = read_manifest(folder.parent.parent, guard, int(folder.name))
    except NoisecError:
        return False
    return bool(content["spec"]["tensorrt"]["version_compatible"])
