"""From penultimate activations to a verdict: the one home of the scoring maths.

NumPy only, because that is what a stock Triton container has. Arrays go in and arrays come out; ``n`` is the number of rows,
``d`` the width of the penultimate layer, ``K`` the number of Gaussian components and ``L`` the number of noise levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from .detectors import APART, INDEPENDENT, OF_LOGITS, STATISTICS, WITH_HEAD, Floats, Head, Integers, Statistic, View
from .memory import Memory, Repeats

NOISE_LEVEL = "NOISE_LEVEL"
IN_RANGE = "IN_RANGE"
"""tensors of the autoencoder stage that every scorer reads, float32 [n, 1]"""
IMAGE_PENULTIMATE = "IMAGE_PENULTIMATE"
"""the image's penultimate activations, from which the head gives the predicted class"""
LARGEST = np.finfo(np.float32).max
"""SCORE of what has none: JSON has no word for what is not a number, and a client that chokes on a verdict may take the input for benign"""

Part = TypeVar("Part")


@dataclass(frozen=True)
class TailScale:
    """Raw scores in units that detectors share: ``-log`` of the share of clean images that score as high.

    Piecewise linear through quantiles of clean scores, and on in a straight line past both ends (an exponential tail), so that it
    stays strictly increasing and never saturates.
    """

    scores: Floats
    """[m], quantiles of clean scores, strictly ascending"""
    surprisals: Floats
    """[m], ``-log`` of the share of clean images above each"""

    def __call__(self, raw: Floats) -> Floats:
        """float32 [n] in nats from float32 [n]"""
        return on_scale(raw, self.segments)

    @property
    def ascends(self) -> bool:
        """Whether it is finite and strictly increasing, as it has to be."""
        return all(bool(np.isfinite(knots).all() and (np.diff(knots) > 0).all()) for knots in (self.scores, self.surprisals))

    @property
    def segments(self) -> npt.NDArray[np.float64]:
        """[3, m - 1]: where each straight piece starts, its surprisal there, and its slope"""
        scores, surprisals = self.scores.astype(np.float64), self.surprisals.astype(np.float64)
        return np.stack([scores[:-1], surprisals[:-1], np.diff(surprisals) / np.diff(scores)])


def on_scale(raw: Floats, segments: npt.NDArray[np.float64]) -> Floats:
    """Surprisals of raw scores, each on a scale of its own or all on one: the first and the last piece go on for ever.

    Args:
        raw: float32 [...]
        segments: float64 [3, m - 1], or [3, ..., m - 1] with a scale for each score

    Returns:
        float32 [...] in nats
    """
    piece = (raw[..., None] >= segments[0, ..., 1:]).sum(axis=-1)
    # The piece's three numbers, picked from the flattened table: take_along_axis costs several times as much on small batches.
    count = segments.shape[-1]
    places = piece if segments.ndim == 2 else piece + np.arange(0, piece.size * count, count).reshape(piece.shape)
    start, surprisal, slope = segments.reshape(3, -1)[:, places]
    result: Floats = (surprisal + (raw - start) * slope).astype(np.float32)
    return result


def _arrays(part: Any) -> dict[str, npt.NDArray[Any]]:
    """What a dataclass of arrays is saved as, without what it derives from them."""
    return {field.name: getattr(part, field.name) for field in fields(part)}


def summed(surprisals: Floats) -> Floats:
    """Fisher's sum of p-values that are none above 1: float32 [n] from float32 [number of detectors, n]."""
    result: Floats = np.maximum(surprisals, 0).sum(axis=0)
    return result


@dataclass(frozen=True)
class Detector:
    """One kind of statistic of one view, fitted for each noise level.

    Clean images leave almost no noise, sensor noise leaves some: one fit for both would call every noisy image unnatural, or hide small
    perturbations of clean ones. Each input is therefore compared with natural inputs of its own noise level, and the scales make the
    levels' and the detectors' scores comparable.
    """

    name: str
    kind: str
    """one of ``STATISTICS``"""
    inputs: tuple[str, ...]
    """tensors that the view reads"""
    statistics: tuple[Statistic, ...]
    """[L]"""
    scales: tuple[TailScale, ...]
    """[L]"""

    def raw(self, view: View, starts: Sequence[int]) -> Floats:
        """The statistic of rows that are sorted by noise level: float32 [n].

        Args:
            starts: [L + 1], where each level's rows start, and the number of rows
        """
        present = [level for level in range(len(self.statistics)) if starts[level] < starts[level + 1]]
        if self.alike or len(present) < 2:
            return self.statistics[max(present, default=0)].score(view)
        return np.concatenate([self.statistics[level].score(view[starts[level] : starts[level + 1]]) for level in present])

    @cached_property
    def alike(self) -> bool:
        """Whether the statistic is the same at every noise level, as one that nothing was fitted for."""
        first, *others = (_arrays(statistic) for statistic in self.statistics)
        return all(np.array_equal(first[name], other[name]) for other in others for name in first)


@dataclass(frozen=True)
class Verdict:
    """What the scorer says of ``n`` inputs."""

    score: Floats
    """[n], nats; higher is more suspicious"""
    p_value: Floats
    """[n], in (0, 1]"""
    is_malicious: npt.NDArray[np.bool_]
    """[n]"""


def conformal_p_values(calibration: Floats, scores: Floats) -> Floats:
    """``(1 + number of calibration scores >= score) / (1 + m)``, the smallest possible value where the score is NaN.

    Valid whatever the scores' distribution: on inputs exchangeable with the calibration images it is at most alpha with a
    probability of at most alpha (Vovk et al. 2005).

    Args:
        calibration: float32 [m], ascending
        scores: float32 [n]

    Returns:
        float32 [n]
    """
    result: Floats = _p_values(len(calibration))[len(calibration) - np.searchsorted(calibration, scores, side="left")]
    return result


@lru_cache
def _p_values(size: int) -> Floats:
    """Of 0, 1, ... and ``size`` calibration scores that are at least as high: float32 [size + 1]."""
    exact = np.arange(1, size + 2) / (1 + size)
    rounded = exact.astype(np.float32)
    result: Floats = np.where(rounded > exact, np.nextafter(rounded, np.float32(0)), rounded)  # p <= alpha must hold in any precision
    return result


def conformal_threshold(calibration: Floats, alpha: float) -> np.float32:
    """The score above which the conformal p-value is at most ``alpha``.

    Args:
        calibration: float32 [m], ascending
        alpha: nominal false-positive rate

    Raises:
        ValueError: ``m`` calibration scores cannot promise ``alpha``.
    """
    above = int(alpha * (1 + len(calibration)) + 1e-9)
    if above < 1:
        raise ValueError(f"{len(calibration)} calibration scores cannot promise a false-positive rate of {alpha}; 1/alpha - 1 are needed")
    threshold: np.float32 = calibration[len(calibration) - above]
    return threshold


@dataclass(frozen=True)
class Scorer:
    """Detectors, fused and calibrated: the artefact ``scorer.npz``."""

    release: int
    alpha: float
    """nominal false-positive rate"""
    fusion: str
    """``fisher`` or ``tippett``"""
    edges: Floats
    """[L - 1], root mean square noise that parts the levels, ascending"""
    head: Head
    """of the classifier; without rows where no detector needs it"""
    detectors: tuple[Detector, ...]
    calibration: Floats
    """[m], scores of the calibration images, ascending"""
    together: TailScale | None = None
    """of Fisher's sum, where detectors stand beside it; None: the sum is the score"""
    repeats: Repeats | None = None
    """when an input that repeats recent ones is malicious, whatever its score; None: whatever came before it"""

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors to feed: float32 [n, d] for each classifier pass, and [n, 1] NOISE_LEVEL and IN_RANGE."""
        image = (IMAGE_PENULTIMATE,) if self.needs_head or self.repeats else ()
        return tuple(dict.fromkeys([*(name for detector in self.detectors for name in detector.inputs), *image, NOISE_LEVEL, IN_RANGE]))

    @cached_property
    def needs_head(self) -> bool:
        return any(detector.kind in WITH_HEAD for detector in self.detectors)

    @cached_property
    def threshold(self) -> np.float32:
        return conformal_threshold(self.calibration, self.alpha)

    @cached_property
    def _segments(self) -> npt.NDArray[np.float64]:
        """[3, number of detectors, L, m - 1], of every scale"""
        return np.stack([np.stack([scale.segments for scale in detector.scales], axis=1) for detector in self.detectors], axis=1)

    def score_each(self, tensors: Mapping[str, Floats]) -> Floats:
        """Every detector's surprisal: float32 [number of detectors, n] in nats, NaN where the input is no image."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            levels = np.searchsorted(self.edges, tensors[NOISE_LEVEL][:, 0], side="right")
            scores = on_scale(self._raw(tensors, levels), self._segments[:, :, levels])
        # What is no number in the image, or in the activations, need not survive a ReLU or max pooling, the head's own among them.
        together = np.concatenate([tensors[name] for name in self.inputs], axis=1)
        scores[:, (tensors[IN_RANGE][:, 0] != 1) | ~np.isfinite(together).all(axis=1)] = np.nan
        return scores

    def _raw(self, tensors: Mapping[str, Floats], levels: Integers) -> Floats:
        """Every detector's statistic, each row's of its own noise level: float32 [number of detectors, n]."""
        counts = np.bincount(levels, minlength=len(self.edges) + 1)
        mixed = counts.max() < len(levels)
        order = np.argsort(levels, kind="stable") if mixed else slice(None)
        rows = {name: tensors[name][order] for name in self.inputs}
        starts = [0, *counts.cumsum().tolist()]
        raw = np.empty((len(self.detectors), len(levels)), np.float32)
        raw[:, order] = [detector.raw(view, starts) for detector, view in zip(self.detectors, self.views(rows), strict=True)]
        return raw

    def views(self, tensors: Mapping[str, Floats]) -> list[View]:
        """What each detector looks at.

        Args:
            tensors: as for :meth:`score`
        """
        answers = self._answers(tensors)
        labels = answers[IMAGE_PENULTIMATE].argmax(axis=1) if answers else np.zeros(len(tensors[NOISE_LEVEL]), np.intp)

        def parts(detector: Detector, of: Mapping[str, Floats]) -> tuple[Floats, ...]:
            return tuple(of[name] for name in detector.inputs)

        return [
            View(parts(one, tensors), labels, self.head, parts(one, answers) if one.kind in OF_LOGITS else ()) for one in self.detectors
        ]

    def _answers(self, tensors: Mapping[str, Floats]) -> dict[str, Floats]:
        """What the head makes of the activations that are asked for, all of them at once: name -> float32 [n, C]."""
        if not self._answered:
            return {}
        logits = self.head.logits(np.stack([tensors[name] for name in self._answered]))
        return dict(zip(self._answered, logits, strict=True))

    @cached_property
    def _answered(self) -> tuple[str, ...]:
        """Names of the activations whose logits are asked for; the image's give the predicted class."""
        asked = (name for detector in self.detectors if detector.kind in OF_LOGITS for name in detector.inputs)
        return tuple(dict.fromkeys([IMAGE_PENULTIMATE, *asked])) if self.needs_head else ()

    def score(self, tensors: Mapping[str, Floats]) -> Floats:
        """The fused score: the sum of the detectors' surprisals (Fisher's method on their p-values, none above 1), or the largest of them
        (Tippett's). Detectors that look at the same input are not independent, so the sum's own distribution is calibrated afterwards.
        With Fisher's method, those that stand beside the sum meet its surprisal: those `apart` from it count where they are larger, and
        to the larger of both those that are `independent` are added.

        Args:
            tensors: name -> float32 [n, d] or [n, 1], as ``inputs`` lists them

        Returns:
            float32 [n], NaN where any detector's is
        """
        each = self.score_each(tensors)
        if self.fusion == "tippett" or len(each) == 1:
            largest: Floats = each.max(axis=0)
            return largest
        if self.in_sum.all():
            return summed(each)
        rivals = [*each[self.apart]]
        if self.in_sum.any():
            total = summed(each[self.in_sum])
            rivals.append(self.together(total) if self.together else total)
        strongest = [np.max(rivals, axis=0)] if rivals else []
        others = each[self.independent]
        return summed(np.stack([*strongest, *others])) if len(others) else strongest[0]

    @cached_property
    def apart(self) -> npt.NDArray[np.bool_]:
        """[number of detectors], those whose surprisal rivals the sum's"""
        return np.array([detector.kind == APART for detector in self.detectors])

    @cached_property
    def independent(self) -> npt.NDArray[np.bool_]:
        """[number of detectors], those whose surprisal is added to the others' together"""
        return np.array([INDEPENDENT in detector.inputs for detector in self.detectors])

    @cached_property
    def in_sum(self) -> npt.NDArray[np.bool_]:
        """[number of detectors], those that Fisher's sum is of"""
        return ~(self.apart | self.independent)

    @property
    def needs_together(self) -> bool:
        """Whether there is a sum that other detectors stand beside."""
        return self.fusion == "fisher" and bool(self.in_sum.any() and not self.in_sum.all())

    def verdict(self, tensors: Mapping[str, Floats]) -> Verdict:
        """Score, conformal p-value and verdict."""
        return self.judged(self.score(tensors))

    def judged(self, score: Floats) -> Verdict:
        """The verdict on fused scores [n]. One that is not a number is malicious: a broken detector never says benign."""
        return Verdict(score, conformal_p_values(self.calibration, score), ~(score <= self.threshold))

    def new_memory(self) -> Memory | None:
        """For whoever answers a stream of requests with this scorer."""
        return Memory(self.repeats) if self.repeats else None

    def outputs(
        self, tensors: Mapping[str, Floats], memory: Memory | None = None, score: Floats | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """The verdict as the tensors of the contract, output name -> [n, 1], with the release that gave it.

        Args:
            memory: of the inputs before; it remembers these too
            score: [n], where another runtime has fused it already
        """
        verdict = self.verdict(tensors) if score is None else self.judged(score)
        malicious = verdict.is_malicious | memory.repeated(tensors[IMAGE_PENULTIMATE]) if memory else verdict.is_malicious
        return {
            "SCORE": np.where(np.isfinite(verdict.score), verdict.score, LARGEST)[:, None],
            "P_VALUE": verdict.p_value[:, None],
            "IS_MALICIOUS": malicious[:, None],
            "RELEASE": np.full((len(verdict.score), 1), self.release, np.int32),
        }

    def save(self, path: Path) -> None:
        """Write the artefact; plain arrays only, no pickle."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "release": np.array(self.release, np.int32),
            "alpha": np.array(self.alpha),
            "fusion": np.array(self.fusion),
            "edges": self.edges,
            "detectors": np.array([detector.name for detector in self.detectors]),
            "calibration": self.calibration,
            **{f"head/{key}": value for key, value in _arrays(self.head).items()},
            **{f"together/{key}": value for key, value in (_arrays(self.together).items() if self.together else ())},
            **{f"repeats/{key}": value for key, value in (_arrays(self.repeats).items() if self.repeats else ())},
        }
        for detector in self.detectors:
            arrays[f"{detector.name}/inputs"] = np.array(detector.inputs)
            arrays[f"{detector.name}/kind"] = np.array(detector.kind)
            for level, (statistic, scale) in enumerate(zip(detector.statistics, detector.scales, strict=True)):
                for part in (statistic, scale):
                    arrays |= {f"{detector.name}/{level}/{name}": array for name, array in _arrays(part).items()}
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path, release: int | None = None) -> Scorer:
        """Read the artefact.

        Args:
            release: that it has to be of; None takes any

        Raises:
            ValueError, OSError, KeyError: the file is no such artefact, it is of another release, or its values cannot be served.
        """
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        edges = arrays["edges"]

        def read(kind: type[Part], prefix: str) -> Part:
            return kind(**{field.name: arrays[f"{prefix}/{field.name}"] for field in fields(kind)})  # type: ignore[arg-type]

        def detector(name: str) -> Detector:
            kind = str(arrays[f"{name}/kind"])
            levels = [f"{name}/{level}" for level in range(len(edges) + 1)]
            statistics: tuple[Statistic, ...] = tuple(read(STATISTICS[kind], level) for level in levels)
            scales = tuple(read(TailScale, level) for level in levels)
            return Detector(name, kind, tuple(map(str, arrays[f"{name}/inputs"])), statistics, scales)

        detectors = tuple(detector(name) for name in map(str, arrays["detectors"]))
        head, alpha, fusion = read(Head, "head"), float(arrays["alpha"]), str(arrays["fusion"])
        repeats = read(Repeats, "repeats") if "repeats/radius" in arrays else None
        together = read(TailScale, "together") if "together/scores" in arrays else None
        scorer = cls(int(arrays["release"]), alpha, fusion, edges, head, detectors, arrays["calibration"], together, repeats)
        scorer.check()
        if release not in (None, scorer.release):
            raise ValueError(f"{path.name} is of release {scorer.release}, its folder of {release}")
        return scorer

    def check(self) -> None:
        """Refuse values with which a verdict would mean nothing.

        Raises:
            ValueError: and which.
        """
        calibration = self.calibration
        if not (np.isfinite(calibration).all() and (np.diff(calibration) >= 0).all()):
            raise ValueError("calibration scores have to be finite and ascending")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha}; it has to lie between 0 and 1")
        if self.fusion not in ("fisher", "tippett"):
            raise ValueError(f"fusion is {self.fusion!r}; it has to be fisher or tippett")
        if not self.detectors:
            raise ValueError("there is no detector")
        if not (np.isfinite(self.edges).all() and (np.diff(self.edges) > 0).all()):
            raise ValueError(f"noise levels {self.edges} have to be finite and ascend")
        if not all(np.isfinite(array).all() for array in _arrays(self.head).values()):
            raise ValueError("the classifier's last layer has values that are not finite")
        for detector in self.detectors:
            for statistic, scale in zip(detector.statistics, detector.scales, strict=True):
                if not all(np.isfinite(array).all() for part in (statistic, scale) for array in _arrays(part).values()):
                    raise ValueError(f"detector {detector.name} has values that are not finite")
                if not scale.ascends:
                    raise ValueError(f"the scale of detector {detector.name} does not ascend")
        if self.together is None and self.needs_together:
            raise ValueError("there is no scale for the sum of the detectors, which others stand beside")
        if self.together and not self.together.ascends:
            raise ValueError("the scale of the detectors' sum does not ascend")
        if self.repeats and not (0 < self.repeats.radius < np.inf and 2 <= self.repeats.neighbours <= self.repeats.size):
            raise ValueError(f"repeats: radius {self.repeats.radius}, {self.repeats.neighbours} neighbours among {self.repeats.size}")
        if self.repeats and not np.isfinite(self.repeats.centre).all():
            raise ValueError("the centre of repeats is not finite")
        conformal_threshold(calibration, self.alpha)
