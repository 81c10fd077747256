"""The scorer as an ONNX graph: for a guard in one process or one graph, where ONNX Runtime runs anyway, and for an attacker who wants its
gradients.

The formulas are those of :mod:`noisec.python_backend.scorer`, operation by operation. NumPy takes some hundred small steps for a few
images, and most of their time is the steps' own; the graph takes a third. Instead of sorting rows by noise level, it keeps the parameters
of all levels beside each other, and each row picks its own level's.

``n`` is the number of rows, ``L`` of noise levels, ``D`` of detectors, ``C`` of classes, ``d`` the width of the penultimate layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from noisec import contract
from noisec.builders.classifier import IR_VERSION, OPSET
from noisec.builders.graphs import without_repeats
from noisec.errors import NoisecError
from noisec.python_backend.scorer.detectors import LocalDimension, squared_lengths
from noisec.python_backend.scorer.scoring import IMAGE_PENULTIMATE, IN_RANGE, LARGEST, NOISE_LEVEL, Detector, Scorer, conformal_p_values

Array = npt.NDArray[Any]


class Nodes:
    """A graph that grows: each call adds a node and gives the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []

    def __call__(
        self, operation: str, *inputs: str | Array | float, output: str = "", unread: Sequence[str] = (), **attributes: Any
    ) -> str:
        """
        Args:
            inputs: names of tensors, or constants; a number is a float32
            output: its name; numbered where none is given
            unread: names of what it gives besides
        """
        name = output or f"{operation}/{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, [self._name(one) for one in inputs], [name, *unread], name, **attributes))
        return name

    def _name(self, value: str | Array | float) -> str:
        if isinstance(value, str):
            return value
        name = f"constant/{len(self.weights)}"
        array = value if isinstance(value, np.ndarray) else np.array(value, np.float32)
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def total(self, values: str, axis: int = 1, operation: str = "ReduceSum", *, keep: bool = True) -> str:
        """Reduced along one axis."""
        return self(operation, values, np.array([axis]), keepdims=int(keep))

    def column(self, values: str) -> str:
        """[n, 1] of [n]"""
        return self("Unsqueeze", values, np.array([1]))


class Rows:
    """What detectors read of each row, and how it picks its own level's parameters."""

    def __init__(self, scorer: Scorer) -> None:
        self.add = add = Nodes()
        self.classes = len(scorer.head.bias)
        self._head = scorer.head
        above = add("Cast", add("GreaterOrEqual", NOISE_LEVEL, scorer.edges), to=TensorProto.INT64)
        self.level = add.total(above, keep=False)
        """int64 [n]"""
        self.label = add("ArgMax", self.logits(IMAGE_PENULTIMATE), axis=1, keepdims=0) if scorer.needs_head else ""
        """int64 [n], the class that the classifier gives the image"""

    def last_inputs(self, name: str) -> str:
        """What the classifier's last layer reads of activations: [n, d]."""
        return self.add("Relu", name) if self._head.rectified else name

    def logits(self, name: str) -> str:
        """What it makes of them: [n, C]."""
        return self.add("Add", self.add("MatMul", self.last_inputs(name), self._head.weights), self._head.bias)

    def vectors(self, detector: Detector, of: Callable[[str], str] = str) -> str:
        """A detector's only input, or its first less its second: [n, d]."""
        first, *rest = map(of, detector.inputs)
        return self.add("Sub", first, rest[0]) if rest else first

    def own(self, parameters: Array) -> str | Array:
        """[n, ...] of [L, ...], or [1, ...] where all levels have the same."""
        alike = (parameters[1:] == parameters[:-1]).all()
        return parameters[:1] if alike else self.add("Gather", parameters, self.level, axis=0)

    def own_of_class(self, parameters: Array) -> str:
        """[n, ...] of [L, C, ...]"""
        place = self.add("Add", self.add("Mul", self.level, np.array(parameters.shape[1])), self.label)
        return self.add("Gather", parameters.reshape(-1, *parameters.shape[2:]), place, axis=0)

    def picked(self, values: str, shape: Sequence[int], axis: int, which: str) -> str:
        """The entry along one axis that is each row's own: as many axes, that one of length 1.

        Args:
            values: [n, ...]
            shape: without the rows
            axis: of ``values``
            which: int64 [n]
        """
        every = [1, *(1 if one == axis else size for one, size in enumerate(shape, 1))]
        places = self.add("Expand", self.add("Reshape", which, np.array([-1, *(1 for _ in shape)])), np.array(every))
        return self.add("GatherElements", values, places, axis=axis)

    def distances(self, centred: str, factors: Array) -> str:
        """Squared lengths of rows [n, d] times their own level's factor of [L, d, d]: [n, 1]."""
        add, (levels, width, _) = self.add, factors.shape
        whitened = add("MatMul", centred, factors.transpose(1, 0, 2).reshape(width, -1))
        every = add.total(add("Reshape", whitened, np.array([-1, levels, width])), 2, "ReduceSumSquare", keep=False)
        return add("GatherElements", every, add.column(self.level), axis=1)

    def on_scale(self, raw: str, segments: npt.NDArray[np.float64]) -> str:
        """As :func:`noisec.python_backend.scorer.scoring.on_scale`: [n, D] from [n, D], with segments [3, L, D, m] of each level's scales,
        or [3, 1, D, m]."""
        add, parts = self.add, segments.astype(np.float32)
        scales, pieces = parts.shape[1:3], parts.shape[3]
        above = add("GreaterOrEqual", add("Unsqueeze", raw, np.array([2])), self.own(parts[0, ..., 1:]))
        piece = add.total(add("Cast", above, to=TensorProto.INT64), 2, keep=False)
        place = add("Add", piece, self.own(pieces * np.arange(math.prod(scales)).reshape(scales)))
        start, surprisal, slope = (add("Gather", part.ravel(), place, axis=0) for part in parts)
        return add("Add", surprisal, add("Mul", add("Sub", raw, start), slope))

    def parted(self, logits: str) -> tuple[str, str]:
        """The label's logits [n, 1] of [n, C], and the others', with minus infinity in the label's place: [n, C]."""
        add, label = self.add, self.add.column(self.label)
        others = add("Where", add("Equal", np.arange(self.classes)[None], label), float("-inf"), logits)
        return add("GatherElements", logits, label, axis=1), others


def _stacked(detector: Detector, name: str) -> Array:
    """A parameter of all levels: [L, ...]"""
    return np.stack([getattr(statistic, name) for statistic in detector.statistics])


def _mixture(rows: Rows, detector: Detector) -> str:
    add, factors, means = rows.add, _stacked(detector, "factors"), _stacked(detector, "means")
    count, width = factors.shape[1:3]
    determinants = np.log(np.diagonal(factors, axis1=2, axis2=3)).sum(axis=-1)
    constants = np.log(_stacked(detector, "weights")) + determinants - 0.5 * np.float32(width * np.log(2 * np.pi))
    each = [rows.distances(add("Sub", rows.vectors(detector), rows.own(means[:, one])), factors[:, one]) for one in range(count)]
    joint = add("Sub", rows.own(constants.astype(np.float32)), add("Mul", add("Concat", *each, axis=1), 0.5))
    return add("Neg", add.total(joint, operation="ReduceLogSumExp"))


def _class_gaussian(rows: Rows, detector: Detector) -> str:
    centred = rows.add("Sub", rows.vectors(detector), rows.own_of_class(_stacked(detector, "means")))
    return rows.distances(centred, _stacked(detector, "factor"))


def _logit_gaussian(rows: Rows, detector: Detector) -> str:
    centred = rows.add("Sub", rows.vectors(detector, rows.logits), rows.own_of_class(_stacked(detector, "means")))
    return rows.distances(centred, _stacked(detector, "factor"))


def _divergence(rows: Rows, detector: Detector) -> str:
    add, temperature = rows.add, rows.own(_stacked(detector, "temperature")[:, None, None].astype(np.float64))
    both = add("Concat", *(add("Unsqueeze", rows.logits(name), np.array([1])) for name in detector.inputs), axis=1)  # [n, 2, C]
    answers = add("Softmax", add("Div", add("Cast", both, to=TensorProto.DOUBLE), temperature), axis=2)
    tiny = np.array(1e-30)
    middle = add("Add", add.total(answers, operation="ReduceMean"), tiny)
    entropy = add("Mul", answers, add("Log", add("Div", add("Add", answers, tiny), middle)))
    mean = add.total(add.total(entropy, 2, keep=False), operation="ReduceMean")
    return add("Cast", mean, to=TensorProto.FLOAT)


def _density(rows: Rows, detector: Detector) -> str:
    add, bandwidth = rows.add, _stacked(detector, "bandwidth")
    points = _stacked(detector, "points") / bandwidth[:, None, None, None]
    vectors = add("Div", rows.vectors(detector), rows.own(bandwidth[:, None]))
    products = add("MatMul", rows.own_of_class(points), add("Unsqueeze", vectors, np.array([2])))
    exponents = add("Sub", add("Squeeze", products, np.array([2])), rows.own_of_class(squared_lengths(points) / 2))
    near = add("Sub", add.total(exponents, operation="ReduceLogSumExp"), float(np.log(points.shape[2])))
    return add("Sub", add("Mul", add.total(vectors, operation="ReduceSumSquare"), 0.5), near)


def _dimension(rows: Rows, detector: Detector) -> str:
    statistics = [one for one in detector.statistics if isinstance(one, LocalDimension)]
    fitted, counts = [one.points for one in statistics], {int(one.neighbours) for one in statistics}
    if len(counts) > 1:
        raise NoisecError(
            f"detector {detector.name}: {min(counts)} neighbours at one noise level and {max(counts)} at another have no graph; give more "
            "fit images, or serve the guard staged"
        )
    levels, count, (neighbours,) = len(fitted), max(map(len, fitted)), counts
    points = np.concatenate([np.pad(one, ((0, count - len(one)), (0, 0))) for one in fitted])
    lengths = [np.pad(squared_lengths(one), (0, count - len(one)), constant_values=np.inf) for one in fitted]
    add, vectors = rows.add, rows.vectors(detector)
    products = add("Reshape", add("MatMul", vectors, points.T), np.array([-1, levels, count]))
    own = add("Squeeze", rows.picked(products, [levels, count], 1, rows.level), np.array([1]))
    both = add("Add", add.total(vectors, operation="ReduceSumSquare"), rows.own(np.stack(lengths)))
    squared = add("Max", add("Sub", both, add("Mul", own, 2.0)), 1e-12)
    nearest = add("Neg", add("TopK", add("Neg", squared), np.array([neighbours]), axis=1, unread=[f"{detector.name}/places"]))
    farthest = add("Gather", nearest, np.array([neighbours - 1]), axis=1)
    ratios = add("Mul", add.total(add("Log", add("Div", nearest, farthest)), operation="ReduceMean"), 0.5)
    return add("Div", -1.0, add("Min", ratios, -1e-6))


def _mutation(rows: Rows, detector: Detector) -> str:
    add, weights = rows.add, _stacked(detector, "weights")
    levels, width, columns = weights.shape
    answers = [columns // rows.classes, rows.classes]
    products = add("MatMul", rows.last_inputs(detector.inputs[0]), weights.transpose(1, 0, 2).reshape(width, -1))
    own = rows.picked(add("Reshape", products, np.array([-1, levels, columns])), [levels, columns], 1, rows.level)
    logits = add("Add", own, rows.own(_stacked(detector, "bias")[:, None]))
    probabilities = add("Softmax", add("Reshape", logits, np.array([-1, *answers])), axis=2)
    kept = add.total(add("Squeeze", rows.picked(probabilities, answers, 2, rows.label), np.array([2])), operation="ReduceMean")
    tiny = 1e-7
    rate = add("Log", add("Div", add("Add", add("Sub", 1.0, kept), tiny), add("Add", kept, tiny)))
    difference = add("Sub", rate, rows.own(_stacked(detector, "centre")[:, None]))
    below, above = (rows.own(spread[:, None]) for spread in _stacked(detector, "spreads").T)
    return add("Div", add("Abs", difference), add("Where", add("Less", difference, 0.0), below, above))


def _reconstruction_error(rows: Rows, detector: Detector) -> str:
    (error,) = detector.inputs
    return error


def _confidence(rows: Rows, detector: Detector) -> str:
    add, sure = rows.add, []
    for name in detector.inputs:
        label, others = rows.parted(rows.logits(name))
        sure.append(add("Sub", label, add.total(others, operation="ReduceLogSumExp")))
    return add.total(add("Concat", *sure, axis=1), operation="ReduceMean")


def _dissent(rows: Rows, detector: Detector) -> str:
    label, others = rows.parted(rows.logits(detector.inputs[1]))
    return rows.add("Sub", rows.add.total(others, operation="ReduceMax"), label)


KINDS: Mapping[str, Callable[[Rows, Detector], str]] = MappingProxyType(
    {
        "mixture": _mixture,
        "class-gaussian": _class_gaussian,
        "logit-gaussian": _logit_gaussian,
        "divergence": _divergence,
        "density": _density,
        "dimension": _dimension,
        "mutation": _mutation,
        "reconstruction-error": _reconstruction_error,
        "confidence": _confidence,
        "dissent": _dissent,
    }
)
"""kind of a detector -> its statistic, float32 [n, 1]"""
VERDICT_KINDS: Mapping[str, int] = MappingProxyType(
    {
        contract.SCORE: TensorProto.FLOAT,
        contract.P_VALUE: TensorProto.FLOAT,
        contract.IS_MALICIOUS: TensorProto.BOOL,
        contract.RELEASE: TensorProto.INT32,
    }
)
"""output of a verdict -> its type"""


def scorer_graph(scorer: Scorer) -> ModelProto:
    """The graph that gives SCORE, float32 [n, 1] in nats, of the scorer's inputs; NaN where the scorer's own is.

    Raises:
        NoisecError: a detector is of a kind that has no formula here.
    """
    rows = Rows(scorer)
    _score(rows, scorer, output=contract.SCORE)
    return _model(rows, scorer, {contract.SCORE: TensorProto.FLOAT})


def verdict_graph(scorer: Scorer) -> ModelProto:
    """The graph that gives the scorer's outputs, [n, 1] each, of its inputs.

    Raises:
        NoisecError: a detector is of a kind that has no formula here, or the scorer has a memory.
    """
    if scorer.repeats:
        raise NoisecError("a scorer with a memory has no graph that gives its verdict; serve the guard single or fused")
    rows = Rows(scorer)
    _judge(rows.add, scorer, _score(rows, scorer))
    return _model(rows, scorer, VERDICT_KINDS)


def _model(rows: Rows, scorer: Scorer, outputs: Mapping[str, int]) -> ModelProto:
    """What has been added so far, as a model with these outputs, name -> type."""
    entries = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", None]) for name in scorer.inputs]
    made = [helper.make_tensor_value_info(name, kind, ["batch", 1]) for name, kind in outputs.items()]
    graph = helper.make_graph(rows.add.nodes, "scorer", entries, made, rows.add.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="noisec")
    onnx.checker.check_model(model)
    return without_repeats(model)


def _score(rows: Rows, scorer: Scorer, output: str = "") -> str:
    """The fused score, [n, 1]."""
    unknown = sorted({one.kind for one in scorer.detectors} - KINDS.keys())
    if unknown:
        raise NoisecError(f"detectors of kind {', '.join(map(repr, unknown))} have no graph; known are {', '.join(KINDS)}")
    add = rows.add
    raw = add("Concat", *(KINDS[one.kind](rows, one) for one in scorer.detectors), axis=1)
    segments = [np.stack([scale.segments for scale in one.scales], axis=1) for one in scorer.detectors]  # [3, L, m] each
    each = rows.on_scale(raw, np.stack(segments, axis=2))
    # A ReLU or a comparison drops what is no number; its product with 0 stays one.
    broken = add.total(add("Mul", add("Concat", *scorer.inputs, each, axis=1), 0.0))
    fused = add("Add", _fused(rows, scorer, each), broken)
    return add("Where", add("Equal", IN_RANGE, 1.0), fused, float("nan"), output=output)


def _judge(add: Nodes, scorer: Scorer, score: str) -> None:
    """As :meth:`noisec.python_backend.scorer.scoring.Scorer.outputs`, of scores [n, 1]."""
    size = len(scorer.calibration)
    p_values = conformal_p_values(np.arange(size, dtype=np.float32), np.arange(size + 1, dtype=np.float32))
    """where 0, 1, ... and ``size`` calibration scores are lower"""
    add("Where", add("Equal", add("Mul", score, 0.0), 0.0), score, float(LARGEST), output=contract.SCORE)
    add("Gather", p_values, add("Min", _lower(add, scorer.calibration, score), np.array(size)), axis=0, output=contract.P_VALUE)
    add("Not", add("LessOrEqual", score, float(scorer.threshold)), output=contract.IS_MALICIOUS)
    add("Expand", np.array([[scorer.release]], np.int32), add("Shape", score), output=contract.RELEASE)


def _lower(add: Nodes, ascending: Array, score: str) -> str:
    """How many of ascending values [m] are lower than each score [n, 1]: int64 [n, 1]; m or more where it is no number.

    In two steps, as the values are many: the rows of a square that start lower, and the values in the last of those.
    """
    side = math.isqrt(len(ascending) - 1) + 1
    square = np.pad(ascending, (0, side**2 - len(ascending)), constant_values=np.inf).reshape(side, side)

    def count(values: str | Array) -> str:
        return add.total(add("Cast", add("Not", add("GreaterOrEqual", values, score)), to=TensorProto.INT64))

    row = add("Max", add("Sub", count(square[:, 0]), np.array(1)), np.array(0))
    within = count(add("Gather", square, add("Squeeze", row, np.array([1])), axis=0))
    return add("Add", add("Mul", row, np.array(side)), within)


def _fused(rows: Rows, scorer: Scorer, each: str) -> str:
    """As :meth:`noisec.python_backend.scorer.scoring.Scorer.score`: [n, 1] from surprisals [n, D]."""
    add = rows.add

    def those(chosen: npt.NDArray[np.bool_]) -> str:
        return add("Gather", each, np.flatnonzero(chosen), axis=1)

    def summed(surprisals: str) -> str:
        return add.total(add("Relu", surprisals))

    if scorer.fusion == "tippett" or len(scorer.detectors) == 1:
        return add.total(each, operation="ReduceMax")
    if scorer.in_sum.all():
        return summed(each)
    rivals = [those(scorer.apart)] if scorer.apart.any() else []
    if scorer.in_sum.any():
        total = summed(those(scorer.in_sum))
        rivals.append(rows.on_scale(total, scorer.together.segments[:, None, None]) if scorer.together else total)
    strongest = [add.total(add("Concat", *rivals, axis=1), operation="ReduceMax")] if rivals else []
    others = [those(scorer.independent)] if scorer.independent.any() else []
    return summed(add("Concat", *strongest, *others, axis=1)) if others else strongest[0]
