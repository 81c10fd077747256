"""An ONNX graph as torch operations, with gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper, version_converter
from torch import Tensor
from torch.nn import functional

from noisec import contract
from noisec.builders.classifier import OPSET
from noisec.builders.precision import EXACT, LOWERED
from noisec.errors import NoisecError


def _padding(attributes: Mapping[str, Any]) -> list[int]:
    pads = list(attributes.get("pads", (0, 0, 0, 0)))
    if pads[:2] != pads[2:] or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise NoisecError(f"padding {pads} ({attributes.get('auto_pad')}) cannot run as a torch operation: it has to be even")
    return pads[:2]


def _convolution(attributes: Mapping[str, Any], images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    strides, dilations, groups = attributes.get("strides", 1), attributes.get("dilations", 1), attributes.get("group", 1)
    return functional.conv2d(images, weight, bias, strides, _padding(attributes), dilations, groups)


def _transposed_convolution(attributes: Mapping[str, Any], images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    strides, dilations, groups = attributes.get("strides", 1), attributes.get("dilations", 1), attributes.get("group", 1)
    added = attributes.get("output_padding", 0)
    return functional.conv_transpose2d(images, weight, bias, strides, _padding(attributes), added, groups, dilations)


def _max_pool(attributes: Mapping[str, Any], images: Tensor) -> Tensor:
    kernel, strides, dilations = attributes["kernel_shape"], attributes.get("strides", 1), attributes.get("dilations", 1)
    return functional.max_pool2d(images, kernel, strides, _padding(attributes), dilations, bool(attributes.get("ceil_mode", 0)))


def _average_pool(attributes: Mapping[str, Any], images: Tensor) -> Tensor:
    kernel, strides, counted = attributes["kernel_shape"], attributes.get("strides", 1), bool(attributes.get("count_include_pad", 0))
    return functional.avg_pool2d(images, kernel, strides, _padding(attributes), bool(attributes.get("ceil_mode", 0)), counted)


def _gemm(attributes: Mapping[str, Any], left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    left = left.T if attributes.get("transA", 0) else left
    right = right.T if attributes.get("transB", 0) else right
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    return alpha * (left @ right) if bias is None else torch.addmm(bias, left, right, beta=beta, alpha=alpha)


def _reshape(attributes: Mapping[str, Any], tensor: Tensor, sizes: list[int]) -> Tensor:
    kept = not attributes.get("allowzero", 0)
    return tensor.reshape([tensor.shape[axis] if kept and size == 0 else size for axis, size in enumerate(sizes)])


def _flatten(attributes: Mapping[str, Any], tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[: attributes.get("axis", 1)]), -1)


def _unsqueeze(attributes: Mapping[str, Any], tensor: Tensor, axes: list[int]) -> Tensor:
    for axis in sorted(axes):
        tensor = tensor.unsqueeze(axis)
    return tensor


def _slice(
    attributes: Mapping[str, Any],
    tensor: Tensor,
    starts: list[int],
    ends: list[int],
    axes: list[int] | None = None,
    steps: list[int] | None = None,
) -> Tensor:
    chosen = [slice(None)] * tensor.ndim
    for start, end, axis, step in zip(starts, ends, axes or range(len(starts)), steps or [1] * len(starts), strict=True):
        chosen[axis] = slice(start, end, step)
    return tensor[tuple(chosen)]


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """Lists of integers as tensors, too, where the others are."""
    device = next((value.device for value in values if isinstance(value, Tensor)), None)
    return [torch.as_tensor(value, device=device) for value in values]


def _gather(attributes: Mapping[str, Any], *values: Tensor | list[int] | int) -> Tensor:
    tensor, index = _tensors(values)
    axis = attributes.get("axis", 0) % tensor.ndim
    return tensor.index_select(axis, index.flatten()).reshape(*tensor.shape[:axis], *index.shape, *tensor.shape[axis + 1 :])


def _resize(attributes: Mapping[str, Any], images: Tensor, region: None, scales: Tensor, sizes: list[int] | None = None) -> Tensor:
    how = {name: attributes.get(name, b"").decode() for name in ("mode", "coordinate_transformation_mode")}
    if sizes is not None or how not in RESIZED:
        raise NoisecError(f"Resize with {how} cannot run as a torch operation")
    height, width = (int(size * scale) for size, scale in zip(images.shape[2:], scales.tolist()[2:], strict=True))
    return functional.interpolate(images, (height, width), mode="bilinear", align_corners=False)


def _split(attributes: Mapping[str, Any], tensor: Tensor, sizes: list[int] | None = None) -> tuple[Tensor, ...]:
    axis = attributes.get("axis", 0)
    return tensor.chunk(attributes["num_outputs"], axis) if sizes is None else torch.split(tensor, sizes, axis)


def _pad(attributes: Mapping[str, Any], tensor: Tensor, pads: list[int], value: Tensor | None = None, axes: None = None) -> Tensor:
    sides = [side for axis in reversed(range(tensor.ndim)) for side in (pads[axis], pads[axis + tensor.ndim])]
    mode = {b"constant": "constant", b"edge": "replicate", b"reflect": "reflect"}[attributes.get("mode", b"constant")]
    if mode != "constant":  # torch wants only the axes that are padded
        return functional.pad(tensor, sides[: 2 * (tensor.ndim - 2)], mode=mode)
    return functional.pad(tensor, sides, value=0.0 if value is None else float(value))


def _batch_norm(attributes: Mapping[str, Any], images: Tensor, *parts: Tensor) -> Tensor:
    scale, bias, mean, variance = parts
    return functional.batch_norm(images, mean, variance, scale, bias, eps=attributes.get("epsilon", 1e-5))


def _reduce(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda attributes, tensor, axes=None: function(
        tensor, axes or [*range(tensor.ndim)], keepdim=bool(attributes.get("keepdims", 1))
    )


def _sum_of_squares(tensor: Tensor, axes: list[int], *, keepdim: bool) -> Tensor:
    return tensor.square().sum(axes, keepdim=keepdim)


def _top(attributes: Mapping[str, Any], tensor: Tensor, count: list[int]) -> tuple[Tensor, ...]:
    largest, ordered = bool(attributes.get("largest", 1)), bool(attributes.get("sorted", 1))
    return tuple(tensor.topk(count[0], dim=attributes.get("axis", -1), largest=largest, sorted=ordered))


def _plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda attributes, *values: function(*_tensors(values))


def _repeated(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda attributes, *tensors: reduce(function, tensors)


RESIZED = [{"mode": "linear", "coordinate_transformation_mode": mode} for mode in ("pytorch_half_pixel", "half_pixel")]
TYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
}
OPERATIONS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "Gemm": _gemm,
    "MatMul": _plain(torch.matmul),
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": lambda attributes, images, scale, bias: functional.instance_norm(
        images, weight=scale, bias=bias, eps=attributes.get("epsilon", 1e-5)
    ),
    "GlobalAveragePool": lambda attributes, images: images.mean(dim=(2, 3), keepdim=True),
    "GlobalMaxPool": lambda attributes, images: images.amax(dim=(2, 3), keepdim=True),
    "Identity": lambda attributes, tensor: tensor,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": lambda attributes, tensor, places: tensor.gather(attributes.get("axis", 0), places),
    "TopK": _top,
    "ArgMax": lambda attributes, tensor: tensor.argmax(attributes.get("axis", 0), keepdim=bool(attributes.get("keepdims", 1))),
    "Expand": lambda attributes, tensor, sizes: tensor.broadcast_to(np.broadcast_shapes(tensor.shape, tuple(sizes))),
    "Where": _plain(torch.where),
    "Resize": _resize,
    "Split": _split,
    "Pad": _pad,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Unsqueeze": _unsqueeze,
    "Squeeze": lambda attributes, tensor, axes=None: tensor.squeeze() if axes is None else tensor.squeeze(axes),
    "Transpose": lambda attributes, tensor: tensor.permute(attributes.get("perm", [*reversed(range(tensor.ndim))])),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceMax": _reduce(torch.amax),
    "ReduceSum": _reduce(torch.sum),
    "ReduceSumSquare": _reduce(_sum_of_squares),
    "ReduceLogSumExp": _reduce(torch.logsumexp),
    "Concat": lambda attributes, *tensors: torch.cat(tensors, attributes["axis"]),
    "Cast": lambda attributes, tensor: tensor.to(TYPES[attributes["to"]]),
    "Relu": _plain(torch.relu),
    "LeakyRelu": lambda attributes, tensor: functional.leaky_relu(tensor, attributes.get("alpha", 0.01)),
    "Clip": lambda attributes, tensor, low=None, high=None: tensor if low is None and high is None else tensor.clamp(low, high),
    "Sigmoid": _plain(torch.sigmoid),
    "HardSigmoid": lambda attributes, tensor: (attributes.get("alpha", 0.2) * tensor + attributes.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": _plain(functional.hardswish),
    "Elu": lambda attributes, tensor: functional.elu(tensor, attributes.get("alpha", 1.0)),
    "Selu": _plain(torch.selu),
    "PRelu": lambda attributes, tensor, slope: torch.where(tensor < 0, slope * tensor, tensor),
    "Gelu": lambda attributes, tensor: functional.gelu(tensor, approximate=attributes.get("approximate", b"none").decode()),
    "Softplus": _plain(functional.softplus),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Log": _plain(torch.log),
    "Abs": _plain(torch.abs),
    "Neg": _plain(torch.neg),
    "Tanh": _plain(torch.tanh),
    "Softmax": lambda attributes, tensor: tensor.softmax(attributes.get("axis", -1)),
    "Add": _plain(torch.add),
    "Sub": _plain(torch.sub),
    "Mul": _plain(torch.mul),
    "Div": _plain(torch.div),
    "Pow": _plain(torch.pow),
    "Sqrt": _plain(torch.sqrt),
    "Min": _repeated(torch.minimum),
    "Max": _repeated(torch.maximum),
    "Equal": _plain(torch.eq),
    "Less": _plain(torch.lt),
    "Greater": _plain(torch.gt),
    "GreaterOrEqual": _plain(torch.ge),
    "LessOrEqual": _plain(torch.le),
    "And": _plain(torch.logical_and),
}
"""ONNX operation -> (attributes, *inputs) -> its first output, or all; integers are lists, so that no shape is read back from a GPU"""


@dataclass(frozen=True)
class Step:
    """One node of a graph."""

    kind: str
    attributes: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


After = Callable[[Step, Tensor], Tensor]
"""(a node, its first output) -> what the nodes behind it read"""


def _recent(model: onnx.ModelProto, where: Path | str) -> onnx.ModelProto:
    """The same model in an opset in which operations are as `OPERATIONS` has them: axes are inputs from 13 and 18 on.

    Raises:
        NoisecError: it cannot be converted.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), OPSET)
    if opset >= OPSET:
        return model
    try:
        return version_converter.convert_version(model, OPSET)
    except Exception as error:  # the converter raises whatever its C++ throws
        raise NoisecError(f"{where}: opset {opset} cannot be converted to {OPSET}: {error}; export it again with that opset") from error


def _constant(node: onnx.NodeProto) -> npt.NDArray[Any]:
    """What a Constant node holds.

    Raises:
        NoisecError: neither numbers nor a dense tensor.
    """
    (attribute,) = node.attribute
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return numpy_helper.to_array(value)
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if attribute.name not in kinds:
        raise NoisecError(
            f"Constant {node.output[0]!r} with {attribute.name} cannot run as a torch operation; known are {', '.join(kinds)}"
        )
    return np.array(value, kinds[attribute.name])


class TorchGraph:
    """An ONNX graph, executed with torch operation by operation; gradients flow through it.

    Args:
        source: ``model.onnx`` of a stage, or a graph
        half: convolutions and dense layers compute in fp16; what is exact in every precision stays fp32

    Raises:
        NoisecError: the graph has an operation that is not in ``OPERATIONS``.
    """

    def __init__(self, source: Path | onnx.ModelProto, device: str = "cpu", *, half: bool = False) -> None:
        model, where = (onnx.load(source), source) if isinstance(source, Path) else (source, source.graph.name)
        graph = _recent(model, where).graph
        unknown = sorted({node.op_type for node in graph.node} - OPERATIONS.keys() - {"Constant"})
        if unknown:
            raise NoisecError(f"{where}: {', '.join(unknown)} cannot run as torch operations; known are {', '.join(OPERATIONS)}")
        self.shape = tuple(int(size.dim_value) for size in graph.input[0].type.tensor_type.shape.dim[1:])
        """(C, H, W)"""
        self.outputs = tuple(str(value.name) for value in graph.output)
        self._half = half
        self.steps = [
            Step(node.op_type, {a.name: helper.get_attribute_value(a) for a in node.attribute}, tuple(node.input), tuple(node.output))
            for node in graph.node
            if node.op_type != "Constant"
        ]
        lowered = {name for step in self.steps if half and step.kind in LOWERED for name in step.inputs[1:]}
        self.constants: dict[str, Any] = {"": None}  # an input that is left out has no name
        """name -> weights as a tensor, shapes and axes as a list"""
        outside = ((tensor.name, numpy_helper.to_array(tensor)) for tensor in graph.initializer)
        for name, array in [*outside, *((node.output[0], _constant(node)) for node in graph.node if node.op_type == "Constant")]:
            if array.dtype == np.int64:
                self.constants[name] = array.tolist()
            else:
                weight = torch.from_numpy(array.copy()).to(device)
                self.constants[name] = weight.half() if name in lowered else weight

    def __call__(
        self, images: Tensor | Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None, after: After | None = None
    ) -> tuple[Tensor, ...]:
        """float32 [n, C, H, W] -> the graph's outputs in their order, float32 [n, ...] each.

        Args:
            images: or, of a graph with other inputs, each by its name
            weights: tensors that stand in for constants of their names
            after: what becomes of a node's first output
        """
        given = images if isinstance(images, Mapping) else {contract.IMAGE: images}
        values = {**self.constants, **(weights or {}), **given}
        for step in self.steps:
            inputs = [self._cast(step.kind, values[name]) for name in step.inputs]
            made = OPERATIONS[step.kind](step.attributes, *inputs)
            first, *rest = made if isinstance(made, tuple) else (made,)
            values |= zip(
                step.outputs, (after(step, first) if after else first, *rest), strict=False
            )  # what a graph leaves out has no name
        return tuple(values[name].float() for name in self.outputs)

    def named(self, images: Tensor) -> dict[str, Tensor]:
        """float32 [n, C, H, W] -> output name -> float32 [n, ...]"""
        return dict(zip(self.outputs, self(images), strict=True))

    def _cast(self, kind: str, value: Any) -> Any:
        if not self._half or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.half() if kind in LOWERED else value.float() if kind in EXACT else value
