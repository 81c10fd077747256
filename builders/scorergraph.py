"""The scorer as an ONNX graph: for a guard in one process, where ONNX Runtime runs anyway, and for an attacker who wants its gradients.

The formulas are those of :mod:`noisec.python_backend.scorer`, operation by operation. NumPy takes some hundred small steps for a few
images, and most of their time is the steps' own; the graph takes a third. Instead of sorting rows by noise level, it keeps the parameters
of all levels beside each other, and each row picks its own level's.

``n`` is the number of rows, ``L`` of noise levels, ``D`` of detectors, ``C`` of classes, ``d`` the width of the penultimate layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from noisec import contract
from noisec.builders.export import OPSET
from noisec.errors import NoisecError
from noisec.python_backend.scorer.detectors import LocalDimension, squared_lengths
from noisec.python_backend.scorer.scoring import IMAGE_PENULTIMATE, IN_RANGE, NOISE_LEVEL, Detector, Scorer

IR_VERSION = 9
LARGEST = 1e15
"""activations beyond it count as infinite: their squares' sums could be, and what becomes of infinity less infinity is up to a runtime"""

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

    def total(self, values: str, axis: int, operation: str = "ReduceSum", keep: bool = False) -> str:
        """Reduced along one axis."""
        return self(operation, values, np.array([axis]), keepdims=int(keep))

    def column(self, values: str) -> str:
        """[..., 1] of [...], for rows [n]"""
        return self("Unsqueeze", values, np.array([1]))

    def all_of(self, conditions: str) -> str:
        """Whether all of a row's conditions hold, as 1 or 0: float32 [n, 1] from bool [n, m]. Comparisons with NaN do not hold."""
        return self.total(self("Cast", conditions, to=TensorProto.FLOAT), 1, "ReduceMin", keep=True)

    def on_scale(self, raw: str, start: str | Array, surprisal: str | Array, slope: str | Array, later: str | Array) -> str:
        """As :func:`noisec.python_backend.scorer.scoring.on_scale`: [n, D] from [n, D], with scales of [n, D, m] or [1, 1, m].

        Args:
            later: the starts but the first
        """
        every = self("Unsqueeze", raw, np.array([2]))
        piece = self.total(self("Cast", self("GreaterOrEqual", every, later), to=TensorProto.INT64), 2, keep=True)

        def own(part: str | Array) -> str:
            """Of the piece that each raw score lies in."""
            if isinstance(part, str):
                return self("GatherElements", part, piece, axis=2)
            return self("Gather", part.ravel(), piece, axis=0)

        found = self("Add", own(surprisal), self("Mul", self("Sub", every, own(start)), own(slope)))
        return self("Squeeze", found, np.array([2]))


class Rows:
    """What detectors read of each row, and how it picks its own level's parameters."""

    def __init__(self, scorer: Scorer) -> None:
        self.add = add = Nodes()
        self._head = scorer.head
        self._logits: dict[str, str] = {}
        above = add("Cast", add("GreaterOrEqual", NOISE_LEVEL, scorer.edges), to=TensorProto.INT64)
        self.level = add.total(above, 1)
        """int64 [n]"""
        self.label = add("ArgMax", self.logits(IMAGE_PENULTIMATE), axis=1, keepdims=0) if scorer.needs_head else ""
        """int64 [n], the class that the classifier gives the image"""

    def logits(self, name: str) -> str:
        """What the head makes of an input: [n, C]."""
        if name not in self._logits:
            read = self.add("Relu", name) if self._head.rectified else name
            self._logits[name] = self.add("Add", self.add("MatMul", read, self._head.weights), self._head.bias)
        return self._logits[name]

    def vectors(self, detector: Detector, of: Callable[[str], str] = str) -> str:
        """A detector's only input, or its first less its second: [n, d]."""
        first, *rest = map(of, detector.inputs)
        return self.add("Sub", first, rest[0]) if rest else first

    def own(self, parameters: Array) -> str:
        """[n, ...] of [L, ...]"""
        return self.add("Gather", parameters, self.level, axis=0)

    def own_of_class(self, parameters: Array) -> str:
        """[n, ...] of [L, C, ...]"""
        place = self.add("Add", self.add("Mul", self.level, np.array(parameters.shape[1])), self.label)
        return self.add("Gather", parameters.reshape(-1, *parameters.shape[2:]), place, axis=0)

    def picked(self, values: str, shape: Sequence[int], axis: int, which: str) -> str:
        """The entry along one axis that is each row's own.

        Args:
            values: [n, ...]
            shape: without the rows
            axis: of it
            which: int64 [n]
        """
        every = [1, *(1 if one == axis else size for one, size in enumerate(shape, 1))]
        places = self.add("Expand", self.add("Reshape", which, np.array([-1, *(1 for _ in shape)])), np.array(every))
        return self.add("Squeeze", self.add("GatherElements", values, places, axis=axis), np.array([axis]))

    def distances(self, centred: str, factors: Array) -> str:
        """Squared lengths of rows [n, d] times their own level's factor of [L, d, d]: [n]."""
        add, (levels, width, _) = self.add, factors.shape
        whitened = add("MatMul", centred, factors.transpose(1, 0, 2).reshape(width, -1))
        every = add.total(add("Reshape", whitened, np.array([-1, levels, width])), 2, "ReduceSumSquare")
        return self.picked(every, [levels], 1, self.level)

    def parted(self, logits: str) -> tuple[str, str]:
        """The label's logits [n, 1] of [n, C], and the others', with minus infinity in the label's place: [n, C]."""
        add, label = self.add, self.add.column(self.label)
        classes = len(self._head.bias)
        others = add("Where", add("Equal", np.arange(classes)[None], label), float("-inf"), logits)
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
    squared = add("Concat", *map(add.column, each), axis=1)
    joint = add("Sub", rows.own(constants.astype(np.float32)), add("Mul", squared, 0.5))
    return add("Neg", add.total(joint, 1, "ReduceLogSumExp"))


def _class_gaussian(rows: Rows, detector: Detector) -> str:
    centred = rows.add("Sub", rows.vectors(detector), rows.own_of_class(_stacked(detector, "means")))
    return rows.distances(centred, _stacked(detector, "factor"))


def _logit_gaussian(rows: Rows, detector: Detector) -> str:
    centred = rows.add("Sub", rows.vectors(detector, rows.logits), rows.own_of_class(_stacked(detector, "means")))
    return rows.distances(centred, _stacked(detector, "factor"))


def _divergence(rows: Rows, detector: Detector) -> str:
    add, temperature = rows.add, rows.own(_stacked(detector, "temperature")[:, None].astype(np.float64))
    exact = (add("Cast", rows.logits(name), to=TensorProto.DOUBLE) for name in detector.inputs)
    first, second = (add("Softmax", add("Div", logits, temperature), axis=1) for logits in exact)
    half, tiny = np.array(0.5), np.array(1e-30)
    middle = add("Add", add("Mul", add("Add", first, second), half), tiny)

    def entropy(answers: str) -> str:
        return add.total(add("Mul", answers, add("Log", add("Div", add("Add", answers, tiny), middle))), 1)

    return add("Cast", add("Mul", add("Add", entropy(first), entropy(second)), half), to=TensorProto.FLOAT)


def _density(rows: Rows, detector: Detector) -> str:
    add, bandwidth = rows.add, _stacked(detector, "bandwidth")
    points = _stacked(detector, "points") / bandwidth[:, None, None, None]
    vectors = add("Div", rows.vectors(detector), rows.own(bandwidth[:, None]))
    products = add("MatMul", rows.own_of_class(points), add("Unsqueeze", vectors, np.array([2])))
    exponents = add("Sub", add("Squeeze", products, np.array([2])), rows.own_of_class(squared_lengths(points) / 2))
    near = add("Sub", add.total(exponents, 1, "ReduceLogSumExp"), float(np.log(points.shape[2])))
    return add("Sub", add("Mul", add.total(vectors, 1, "ReduceSumSquare"), 0.5), near)


def _dimension(rows: Rows, detector: Detector) -> str:
    statistics = [one for one in detector.statistics if isinstance(one, LocalDimension)]
    fitted, counts = [one.points for one in statistics], {int(one.neighbours) for one in statistics}
    if len(counts) > 1:
        raise NoisecError(
            f"detector {detector.name}: {min(counts)} neighbours at one noise level and {max(counts)} at another have no graph; give more "
            "fit images, or serve the guard staged"
        )
    levels, count, (neighbours,) = len(fitted), max(map(len, fitted)), counts
    points = np.stack([np.pad(one, ((0, count - len(one)), (0, 0))) for one in fitted])
    lengths = [np.pad(squared_lengths(one), (0, count - len(one)), constant_values=np.inf) for one in fitted]
    add, vectors = rows.add, rows.vectors(detector)
    products = add("Reshape", add("MatMul", vectors, points.reshape(levels * count, -1).T), np.array([-1, levels, count]))
    own = rows.picked(products, [levels, count], 1, rows.level)
    both = add("Add", add.total(vectors, 1, "ReduceSumSquare", keep=True), rows.own(np.stack(lengths)))
    squared = add("Max", add("Sub", both, add("Mul", own, 2.0)), 1e-12)
    nearest = add("Neg", add("TopK", add("Neg", squared), np.array([neighbours]), axis=1, unread=[f"{detector.name}/places"]))
    farthest = add("Gather", nearest, np.array([neighbours - 1]), axis=1)
    ratios = add("Mul", add.total(add("Log", add("Div", nearest, farthest)), 1, "ReduceMean"), 0.5)
    return add("Div", -1.0, add("Min", ratios, -1e-6))


def _mutation(rows: Rows, detector: Detector) -> str:
    add, weights, classes = rows.add, _stacked(detector, "weights"), len(rows._head.bias)
    levels, width, columns = weights.shape
    read = add("Relu", detector.inputs[0]) if rows._head.rectified else detector.inputs[0]
    products = add("Reshape", add("MatMul", read, weights.transpose(1, 0, 2).reshape(width, -1)), np.array([-1, levels, columns]))
    logits = add("Add", rows.picked(products, [levels, columns], 1, rows.level), rows.own(_stacked(detector, "bias")))
    probabilities = add("Softmax", add("Reshape", logits, np.array([-1, columns // classes, classes])), axis=2)
    kept = add.total(rows.picked(probabilities, [columns // classes, classes], 2, rows.label), 1, "ReduceMean")
    tiny = 1e-7
    rate = add("Log", add("Div", add("Add", add("Sub", 1.0, kept), tiny), add("Add", kept, tiny)))
    difference = add("Sub", rate, rows.own(_stacked(detector, "centre")))
    below, above = (rows.own(spread) for spread in _stacked(detector, "spreads").T)
    return add("Div", add("Abs", difference), add("Where", add("Less", difference, 0.0), below, above))


def _reconstruction_error(rows: Rows, detector: Detector) -> str:
    return rows.add("Squeeze", detector.inputs[0], np.array([1]))


def _confidence(rows: Rows, detector: Detector) -> str:
    add, sure = rows.add, []
    for name in detector.inputs:
        label, others = rows.parted(rows.logits(name))
        sure.append(add("Sub", label, add.total(others, 1, "ReduceLogSumExp", keep=True)))
    return add.total(add("Concat", *sure, axis=1), 1, "ReduceMean")


def _dissent(rows: Rows, detector: Detector) -> str:
    label, others = rows.parted(rows.logits(detector.inputs[1]))
    return rows.add("Squeeze", rows.add("Sub", rows.add.total(others, 1, "ReduceMax", keep=True), label), np.array([1]))


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
"""kind of a detector -> its statistic, float32 [n]"""


def scorer_graph(scorer: Scorer) -> ModelProto:
    """The graph that gives SCORE, float32 [n, 1] in nats, of the scorer's inputs; NaN where the scorer's own is.

    Raises:
        NoisecError: a detector is of a kind that has no formula here.
    """
    unknown = sorted({one.kind for one in scorer.detectors} - KINDS.keys())
    if unknown:
        raise NoisecError(f"detectors of kind {', '.join(map(repr, unknown))} have no graph; known are {', '.join(KINDS)}")
    rows = Rows(scorer)
    add = rows.add
    raw = add("Concat", *(add.column(KINDS[one.kind](rows, one)) for one in scorer.detectors), axis=1)
    segments = [np.stack([scale.segments for scale in one.scales], axis=1) for one in scorer.detectors]
    start, surprisal, slope = np.stack(segments, axis=2).astype(np.float32)  # [L, D, m] each
    each = add.on_scale(raw, *map(rows.own, (start, surprisal, slope, start[..., 1:])))
    sound = add(
        "Min",
        add.all_of(add("LessOrEqual", add("Abs", add("Concat", *scorer.inputs, axis=1)), LARGEST)),
        add.all_of(add("GreaterOrEqual", each, -LARGEST)),
        add.all_of(add("Equal", IN_RANGE, 1.0)),
    )
    add("Where", add("Greater", sound, 0.5), _fused(add, scorer, each), float("nan"), output=contract.SCORE)
    entries = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", None]) for name in scorer.inputs]
    graph = helper.make_graph(
        add.nodes, "scorer", entries, [helper.make_tensor_value_info(contract.SCORE, TensorProto.FLOAT, ["batch", 1])], add.weights
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="noisec")
    onnx.checker.check_model(model)
    return model


def _fused(add: Nodes, scorer: Scorer, each: str) -> str:
    """As :meth:`noisec.python_backend.scorer.scoring.Scorer.score`: [n, 1] from surprisals [n, D]."""

    def those(chosen: npt.NDArray[np.bool_]) -> str:
        return add("Gather", each, np.flatnonzero(chosen), axis=1)

    def summed(surprisals: str) -> str:
        return add.total(add("Relu", surprisals), 1, keep=True)

    if scorer.fusion == "tippett" or len(scorer.detectors) == 1:
        return add.total(each, 1, "ReduceMax", keep=True)
    if scorer.in_sum.all():
        return summed(each)
    rivals = [those(scorer.apart)] if scorer.apart.any() else []
    if scorer.in_sum.any():
        total = summed(those(scorer.in_sum))
        if scorer.together:
            start, surprisal, slope = scorer.together.segments.astype(np.float32)
            total = add.on_scale(total, start, surprisal, slope, start[1:])
        rivals.append(total)
    strongest = [add.total(add("Concat", *rivals, axis=1), 1, "ReduceMax", keep=True)] if rivals else []
    others = [those(scorer.independent)] if scorer.independent.any() else []
    return summed(add("Concat", *strongest, *others, axis=1)) if others else strongest[0]
