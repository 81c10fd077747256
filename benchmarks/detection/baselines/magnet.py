"""MagNet (Meng and Chen, CCS 2017, arXiv 1705.09064): does an autoencoder move the image, or the classifier's answer to it?"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from noisec.benchmarks.detection.baselines.base import Network, batched, in_arrays, softmax
from noisec.builders.images import Floats, Images, natural
from noisec.python_backend.scorer.scoring import conformal_p_values


def reconstruction_error(pixels: Floats, reconstructions: Floats, power: int) -> Floats:
    """``mean |x - A(x)|^p`` (section 4.1.1): float32 [n] from two of [n, C, H, W]."""
    error: Floats = (np.abs(pixels - reconstructions) ** power).mean(axis=(1, 2, 3))
    return error


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence (section 4.1.2): float64 [n] in nats, in [0, log 2], from probabilities float64 [n, classes].

    Written as ``sum m / 2 ((1 + d) log(1 + d) + (1 - d) log(1 - d))`` with ``m`` the mean of ``p`` and ``q`` and ``d`` their relative
    difference: the textbook form cancels to nothing where a confident classifier gives two nearly equal answers, as to clean images.
    """
    total = p + q
    d = torch.where(total > 0, (p - q) / total, 0)
    terms: Tensor = total / 4 * (torch.special.xlog1py(1 + d, d) + torch.special.xlog1py(1 - d, -d))
    return terms.sum(dim=1).clamp(min=0)


@dataclass
class MagNet:
    """The paper's detectors, of which any one may fire.

    The paper gives each score a threshold of its own, the same quantile of validation images for all. Here each is turned into its
    surprisal in nats, ``-log`` of the share of fit images that score as high, and the largest is the detector's score: a threshold on
    it is the paper's rule for that quantile. Above all fit images' it goes on rising with the score's logarithm, so that none tie.
    """

    denoiser: nn.Module
    """images -> reconstructions"""
    name: str = "MagNet"
    powers: tuple[int, ...] = (1, 2)
    """of the reconstruction errors"""
    temperatures: tuple[float, ...] = (10.0, 40.0)
    """of the softmaxes under the divergences; the paper's for CIFAR-10"""
    noise_sd: float = 0.0
    """of the natural noise on half of the fit images"""
    predict: Network = field(init=False, repr=False)
    seen: Floats = field(init=False, repr=False)
    """float32 [powers + temperatures, number of fit images], each row ascending"""

    def fit(self, images: Images, predict: Network) -> None:
        self.predict = predict
        self.seen = np.sort(self.statistics(np.concatenate(list(natural(images, self.noise_sd, seed=0)))).T, axis=1)

    def score(self, pixels: Floats) -> Floats:
        surprisals = [
            np.log(np.maximum(column / max(seen[-1], np.finfo(np.float32).tiny), 1)) - np.log(conformal_p_values(seen, column))
            for seen, column in zip(self.seen, self.statistics(pixels).T, strict=True)
        ]
        largest: Floats = np.max(surprisals, axis=0)
        return largest

    def statistics(self, pixels: Floats) -> Floats:
        """Reconstruction errors, then divergences: float32 [n, powers + temperatures]."""
        return batched(self._statistics, pixels)

    def _statistics(self, pixels: Floats) -> Floats:
        reconstructions = in_arrays(self.denoiser)(pixels)
        errors = [reconstruction_error(pixels, reconstructions, power) for power in self.powers]
        answers = self.predict(pixels), self.predict(reconstructions)
        divergences = [jensen_shannon(*(softmax(logits, t) for logits in answers)).numpy() for t in self.temperatures]
        statistics: Floats = np.stack([*errors, *divergences], axis=1).astype(np.float32)
        return statistics


def reconstruction_error_alone(denoiser: nn.Module, power: int = 1, noise_sd: float = 0.0) -> MagNet:
    """Ablation: one reconstruction error and no look at the classifier."""
    return MagNet(denoiser, "reconstruction error alone", (power,), (), noise_sd)


def divergence_alone(denoiser: nn.Module, temperature: float = 1.0, noise_sd: float = 0.0) -> MagNet:
    """Ablation: one divergence; at ``T = 1`` what NoiSec's authors compared with under MagNet's name."""
    return MagNet(denoiser, f"JSD alone (T = {temperature:g})", (), (temperature,), noise_sd)
