"""The tensor contract: the names that builders write, the server runs and clients send.

Shapes are per row, without the batch dimension. ``C, H, W`` is the image, ``d`` the width of the classifier's penultimate layer.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final, Literal

IMAGE: Final = "IMAGE"
"""fp32 [C, H, W], pixels in [0, 1]; or uint8 in [0, 255] for a guard whose serving.input says so"""
NOISE: Final = "NOISE"
"""fp32 [C, H, W], ``IMAGE - A(IMAGE)``: signed, unclipped (NoiSec section 4.1)"""
NOISE_INPUT: Final = "NOISE_INPUT"
"""fp32 [C, H, W], NOISE plus the mean that the classifier's own preprocessing subtracts, so that it sees n / std; only where it does"""
RECONSTRUCTION: Final = "RECONSTRUCTION"
"""fp32 [C, H, W], ``A(IMAGE)``"""
NOISE_LEVEL: Final = "NOISE_LEVEL"
"""fp32 [1], root mean square of the noise"""
IN_RANGE: Final = "IN_RANGE"
"""fp32 [1], 1 where every pixel is a number in [0, 1], else 0: the scorer then calls the input malicious"""
LOGITS: Final = "LOGITS"
"""fp32 [classes]"""
PENULTIMATE: Final = "PENULTIMATE"
"""fp32 [d], the classifier's penultimate activations ``F``"""
SCORE: Final = "SCORE"
"""fp32 [1], how unnatural the input is, in nats; higher is more suspicious; always a number, which JSON can hold: the largest where the
input was no image"""
P_VALUE: Final = "P_VALUE"
"""fp32 [1], conformal p-value of SCORE on clean images, in (0, 1]"""
IS_MALICIOUS: Final = "IS_MALICIOUS"
"""bool [1], ``not (SCORE <= threshold)``; with a memory also where the input nearly repeats many recent ones"""
RELEASE: Final = "RELEASE"
"""int32 [1], the release that gave the verdict"""

PIXEL_TOLERANCE: Final = 1e-4
"""How far a pixel may lie outside [0, 1] (rounding of a caller's own arithmetic) before the input counts as no image at all."""

AUTOENCODER_OUTPUTS: Final = (NOISE, RECONSTRUCTION, NOISE_LEVEL, IN_RANGE)
CLASSIFIER_OUTPUTS: Final = (LOGITS, PENULTIMATE)
VERDICT: Final = (SCORE, P_VALUE, IS_MALICIOUS, RELEASE)
OUTPUTS: Final = (LOGITS, *VERDICT)
"""What the ensemble answers."""
LABEL_MODEL: Final = "label_model"
"""Parameter in a guard's configuration: the Triton model that answers LOGITS alone at the classifier's own cost. Where there is none, the
guard itself does."""

Pass = Literal["noise", "image", "reconstruction", "amplified", "deeper", "hardened"]
PASSES: Final = MappingProxyType[Pass, str](
    {
        "noise": "NOISE_PENULTIMATE",
        "image": "IMAGE_PENULTIMATE",
        "reconstruction": "RECONSTRUCTION_PENULTIMATE",
        "amplified": "AMPLIFIED_PENULTIMATE",
        "deeper": "AMPLIFIED_DEEPER_PENULTIMATE",
        "hardened": "HARDENED_PENULTIMATE",
    }
)
"""A classifier pass -> the scorer's input that carries its penultimate activations."""

AMPLIFIED: Final[tuple[Pass, ...]] = ("amplified", "deeper")
"""Passes of the classifier with fewer and with more of its last layers amplified."""
COPIES: Final[tuple[Pass, ...]] = (*AMPLIFIED, "hardened")
"""Passes of the image through changed copies of the classifier: the autoencoder stage makes them in every layout, and a guard that is
one model with the image's own pass."""

View = Literal["pixels", "noise", "delta", "image", "amplified", "hardened"]
VIEWS: Final = MappingProxyType[View, tuple[Pass, ...]](
    {
        "pixels": (),
        "noise": ("noise",),
        "delta": ("image", "reconstruction"),
        "image": ("image",),
        "amplified": AMPLIFIED,
        "hardened": ("image", "hardened"),
    }
)
"""What a detector looks at -> the classifier passes it needs: none for n itself, then F(n), F(x) - F(A(x)), F(x), F'(x) and F''(x) of the
classifier whose last layers are amplified, and F(x) - H(x), where H is the classifier's hardened copy."""

STAGES: Final = ("autoencoder", "classifier", "scorer")


def stage_model(guard: str, stage: str) -> str:
    """Triton model name of one stage, for example ``fashion_mnist_scorer``."""
    return f"{guard}_{stage}"
