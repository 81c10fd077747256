"""What builders and the server agree on about plans."""

from __future__ import annotations


def graph_sizes(largest: int) -> list[int]:
    """Batch sizes that get a CUDA graph: the powers of two up to the largest batch, and that one."""
    return sorted({*(1 << power for power in range(largest.bit_length())), largest})


def plan_name(capability: str) -> str:
    """File name of the plan for one compute capability, such as ``9.0``."""
    return f"model_sm{capability.replace('.', '')}.plan"
