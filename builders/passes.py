"""Which passes of the classifier a guard needs, and which stage makes them."""

from __future__ import annotations

from noisec import contract
from noisec.builders.spec import GuardSpec


def passes_needed(spec: GuardSpec) -> tuple[contract.Pass, ...]:
    """The classifier passes that the guard's detectors look at, the image's always among them: it gives the label."""
    needed = {"image", *(name for detector in spec.detectors for name in contract.VIEWS[detector.view])}
    return tuple(name for name in contract.PASSES if name in needed)


def fused_passes(spec: GuardSpec) -> tuple[contract.Pass, ...]:
    """The classifier passes that the layout puts into the autoencoder stage."""
    return tuple(one for one in passes_needed(spec) if one in ("noise", "reconstruction")) if spec.serving.layout != "staged" else ()


def own_passes(spec: GuardSpec) -> tuple[contract.Pass, ...]:
    """The classifier passes that the autoencoder stage makes itself: those, and those of the classifier's copies in every layout."""
    return tuple(one for one in passes_needed(spec) if one in contract.COPIES or one in fused_passes(spec))


def scorer_inputs(spec: GuardSpec) -> tuple[str, ...]:
    """Tensors that the scorer reads besides NOISE_LEVEL and IN_RANGE."""
    views = {name for detector in spec.detectors for name in contract.VIEWS[detector.view]} | (
        {"image"} if spec.needs_head or spec.memory else set()
    )
    return tuple(contract.PASSES[name] for name in contract.PASSES if name in views)
