"""A classifier of your own: find its penultimate layer, and make it the guard's classifier stage without touching its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from noisec import contract
from noisec.builders.spec import PreprocessingSpec
from noisec.errors import NoisecError

OPSET = 18
"""of the graphs that are written here"""
MIN_OPSET, MAX_OPSET = 11, 21
"""21 is the newest that ONNX Runtime 1.19, the one in Triton 24.10, runs"""
IR_VERSION = 10
"""the newest that ONNX Runtime 1.19, the one in Triton 24.10, reads"""
AFTER_LOGITS = {"Softmax", "LogSoftmax", "Identity", "Cast"}
SHAPE_ONLY = {
    "Flatten",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Dropout",
    "Identity",
    "Cast",
    "QuantizeLinear",
    "DequantizeLinear",
    "Transpose",
}
POOLS = {"GlobalAveragePool", "AveragePool", "ReduceMean"}
ACTIVATIONS = {"Relu", "LeakyRelu", "Elu", "Selu", "Gelu", "HardSwish", "Sigmoid", "Tanh", "Clip", "Softplus", "PRelu"}
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}


@dataclass(frozen=True)
class Candidate:
    """A tensor that may serve as penultimate layer."""

    tensor: str
    width: int
    spatial: bool
    """whether it is [batch, d, H, W], to be averaged over its positions"""
    why: str


@dataclass(frozen=True)
class Anatomy:
    """What a classifier looks like from outside."""

    input: str
    input_shape: tuple[int | str, ...]
    """with the batch; a name where a size is dynamic"""
    output: str
    """of the graph's outputs the one that answers, logits or what follows from them"""
    logits: str
    classes: int
    candidates: tuple[Candidate, ...]
    """the likeliest first"""
    parameters: int
    multiply_adds: int
    """of one image, in convolutions and dense layers"""
    opset: int

    @property
    def channels_last(self) -> bool:
        return len(self.input_shape) == 4 and self.input_shape[3] in (1, 3) and self.input_shape[1] not in (1, 3)

    @property
    def image_shape(self) -> tuple[int | str, int | str, int | str] | None:
        """(C, H, W) as the classifier takes it; None where it takes flat vectors"""
        if len(self.input_shape) != 4:
            return None
        _, first, second, third = self.input_shape
        return (third, first, second) if self.channels_last else (first, second, third)


def read_model(path: Path) -> ModelProto:
    """An ONNX file with its external data.

    Raises:
        NoisecError: the file is missing, is no ONNX model, or its external data is missing.
    """
    if not path.is_file():
        raise NoisecError(f"{path}: no such file")
    try:
        model = onnx.load(path, format="protobuf")
        onnx.checker.check_model(model)
    except DecodeError as error:
        raise NoisecError(f"{path}: not an ONNX model: {error}") from error
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise NoisecError(f"{path}: not a usable ONNX model (external data has to lie beside it): {error}") from error
    return model


class Graph:
    """Look-ups in a model's main graph."""

    def __init__(self, model: ModelProto) -> None:
        inferred = onnx.shape_inference.infer_shapes(model)
        graph = inferred.graph
        self.nodes: list[NodeProto] = list(graph.node)
        self.opsets: dict[str, Any] = {entry.domain: entry.version for entry in model.opset_import}
        self.producer = {name: node for node in self.nodes for name in node.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = [value for value in graph.input if value.name not in self.constants]
        self.outputs = list(graph.output)
        self.types = {value.name: value.type.tensor_type for value in [*graph.input, *graph.output, *graph.value_info]}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t

    def shape(self, name: str) -> tuple[int | str, ...] | None:
        """Sizes of a tensor, a name for a dynamic one; None where they are unknown."""
        if name in self.constants:
            return tuple(self.constants[name].dims)
        if name not in self.types or not self.types[name].HasField("shape"):
            return None
        return tuple(size.dim_value or size.dim_param or "?" for size in self.types[name].shape.dim)

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is a weight, through quantisation and shape operations."""
        while name not in self.constants:
            node = self.producer.get(name)
            if node is None or node.op_type not in SHAPE_ONLY:
                return False
            name = node.input[0]
        return True

    def value(self, name: str) -> npt.NDArray[np.generic]:
        """A weight (:meth:`is_constant`), dequantised and in the shape in which it is used."""
        if name in self.constants:
            return numpy_helper.to_array(self.constants[name])
        node = self.producer[name]
        (found,) = ReferenceEvaluator(node, opsets=self.opsets).run([name], {used: self.value(used) for used in node.input if used})
        return np.asarray(found)

    def data_input(self, node: NodeProto) -> str | None:
        """The one input of a node that is no weight; None where there are several or none."""
        data = [name for name in node.input if name and not self.is_constant(name)]
        return data[0] if len(data) == 1 or node.op_type in SHAPE_ONLY else None

    def back(self, name: str, through: set[str]) -> str:
        """The tensor from which ``name`` follows by operations of ``through`` alone."""
        while (node := self.producer.get(name)) is not None and node.op_type in through:
            name = node.input[0]
        return name


def dissect(model: ModelProto, where: str = "model") -> Anatomy:
    """Find a classifier's input, logits and penultimate layer.

    Logits are the output before any softmax. The penultimate layer is the data input of the last linear layer that makes them: Gemm, MatMul
    with or without bias, or a 1x1 convolution, looking through flattening, dropout, pooling and quantise/dequantise pairs.

    Raises:
        NoisecError: several inputs, no floating-point output, no linear head, or an opset below 11; the message names what was found.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < MIN_OPSET:
        raise NoisecError(
            f"{where}: opset {opset}; at least {MIN_OPSET} is needed: export it again, or convert it with onnx.version_converter"
        )
    if opset > MAX_OPSET:
        raise NoisecError(
            f"{where}: opset {opset}; servers of today run up to {MAX_OPSET}: export it with opset_version={MAX_OPSET} or lower"
        )
    graph = Graph(model)
    if len(graph.inputs) != 1:
        raise NoisecError(
            f"{where}: inputs are {[value.name for value in graph.inputs]}; a guard protects a classifier with one image input"
        )
    entry = graph.inputs[0]
    if entry.type.tensor_type.elem_type != TensorProto.FLOAT:
        kind = TensorProto.DataType.Name(entry.type.tensor_type.elem_type)
        raise NoisecError(
            f"{where}: input {entry.name!r} is {kind}; it has to be FLOAT: export the classifier without its integer input cast"
        )
    heads = [(output.name, head) for output in graph.outputs if _is_float(graph, output.name) and (head := find_head(graph, output.name))]
    if not heads:
        raise NoisecError(f"{where}: {_no_head(graph)}")
    output, head = heads[0]
    logits = graph.back(output, AFTER_LOGITS)
    shape = graph.shape(logits)
    width = [size for size in (shape or ("?", "?"))[1:] if size != 1]
    if len(width) != 1 or not isinstance(width[0], int):
        raise NoisecError(
            f"{where}: logits {logits!r} are {shape or 'of unknown shape'}; expected [batch, classes] with at least 2 classes"
        )
    return Anatomy(
        input=entry.name,
        input_shape=graph.shape(entry.name) or (),
        output=output,
        logits=logits,
        classes=width[0],
        candidates=tuple(_candidates(graph, head)),
        parameters=sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer if tensor.data_type in FLOATS),
        multiply_adds=_multiply_adds(graph),
        opset=opset,
    )


def _is_float(graph: Graph, name: str) -> bool:
    return name in graph.types and graph.types[name].elem_type in FLOATS


def _no_head(graph: Graph) -> str:
    outputs = [f"{output.name} ({TensorProto.DataType.Name(output.type.tensor_type.elem_type)})" for output in graph.outputs]
    if not any(_is_float(graph, output.name) for output in graph.outputs):
        return f"outputs are {', '.join(outputs)}: none is floating point; export the classifier with its logits or probabilities as output"
    ends = sorted(
        {node.op_type for output in graph.outputs if (node := graph.producer.get(graph.back(output.name, AFTER_LOGITS | SHAPE_ONLY)))}
    )
    return (
        f"no linear layer (Gemm, MatMul, 1x1 Conv) makes the outputs {', '.join(outputs)}; they end in "
        f"{', '.join(ends) or 'the input itself'}: "
        "export a classifier whose last layer is linear"
    )


def find_head(graph: Graph, output: str) -> NodeProto | None:
    """The last linear layer before an output."""
    name = graph.back(output, AFTER_LOGITS)
    node = graph.producer.get(graph.back(name, SHAPE_ONLY))
    seen_pool = False
    while node is not None:
        data = graph.data_input(node)
        if node.op_type in ("Gemm", "MatMul", "Conv") and data is not None:
            return node if node.op_type != "Conv" or _is_pointwise(graph, node) else None
        pooled = node.op_type in POOLS | ACTIVATIONS
        if data is None or not (node.op_type == "Add" or pooled):
            return None
        if node.op_type in ACTIVATIONS and not seen_pool:  # an activation ends a head only before its pooling, as in SqueezeNet
            return None
        seen_pool = seen_pool or node.op_type in POOLS
        node = graph.producer.get(graph.back(data, SHAPE_ONLY))
    return None


def _is_pointwise(graph: Graph, node: NodeProto) -> bool:
    shape = graph.shape(node.input[1])
    return shape is not None and all(size == 1 for size in shape[2:])


def _candidates(graph: Graph, head: NodeProto) -> list[Candidate]:
    """Tensors before the head, the nearest first: its input, that input before its activation, and the inputs of earlier dense layers."""
    found: list[Candidate] = []
    why = f"input of the last linear layer ({head.op_type})"
    node: NodeProto | None = head
    while node is not None and (name := graph.data_input(node)):
        _add(graph, found, name, why)
        activation = graph.producer.get(graph.back(name, SHAPE_ONLY))
        if activation is not None and activation.op_type in ACTIVATIONS:
            _add(graph, found, activation.input[0], f"the same before its {activation.op_type}")
            activation = graph.producer.get(graph.back(activation.input[0], SHAPE_ONLY))
        if activation is not None and activation.op_type == "Add":
            data = graph.data_input(activation)
            activation = graph.producer.get(data) if data else None
        node = activation if activation is not None and activation.op_type in ("Gemm", "MatMul") else None
        why = "input of an earlier dense layer"
    return found


def _add(graph: Graph, found: list[Candidate], name: str, why: str) -> None:
    shape = graph.shape(name)
    if shape and len(shape) in (2, 4) and isinstance(shape[1], int) and name not in {candidate.tensor for candidate in found}:
        spatial = len(shape) == 4
        found.append(Candidate(name, shape[1], spatial, why + (", averaged over its positions" if spatial else "")))


def _multiply_adds(graph: Graph) -> int:
    total = 0
    for node in graph.nodes:
        weight, output = graph.shape(node.input[1]) if len(node.input) > 1 else None, graph.shape(node.output[0])
        if not weight or not output or not all(isinstance(size, int) for size in (*weight, *output[1:])):
            continue
        if node.op_type == "Conv":
            total += int(np.prod([int(size) for size in (*weight, *output[2:])]))
        elif node.op_type in ("Gemm", "MatMul") and graph.is_constant(node.input[1]):
            total += int(np.prod([int(size) for size in weight])) * int(np.prod([int(size) for size in output[1:-1]]))
    return total


def choose_penultimate(anatomy: Anatomy, model: ModelProto, wanted: str | None, where: str = "model") -> Candidate:
    """The penultimate tensor: the one asked for, else the likeliest.

    Raises:
        NoisecError: there is no such tensor, or its shape does not serve.
    """
    if wanted is None:
        if not anatomy.candidates:
            raise NoisecError(f"{where}: the penultimate layer's shape is unknown; name a tensor with classifier.penultimate")
        return anatomy.candidates[0]
    shape = Graph(model).shape(wanted)
    usable = shape is not None and len(shape) in (2, 4) and isinstance(shape[1], int)
    if shape is None or not usable:
        known = ", ".join(candidate.tensor for candidate in anatomy.candidates)
        raise NoisecError(
            f"{where}: classifier.penultimate = {wanted!r} is {shape or 'no tensor of this model'}; "
            f"it has to be [batch, d] or [batch, d, H, W]; candidates: {known}"
        )
    return Candidate(wanted, int(shape[1]), len(shape) == 4, "as asked for")


def make_stage(
    model: ModelProto,
    anatomy: Anatomy,
    penultimate: Candidate,
    shape: tuple[int, int, int],
    preprocessing: PreprocessingSpec,
    where: str = "model",
) -> ModelProto:
    """The guard's classifier stage: IMAGE -> preprocessing -> the classifier, unchanged -> LOGITS, PENULTIMATE.

    Args:
        shape: (C, H, W) of the images that the guard takes

    Raises:
        NoisecError: images of this shape do not fit the classifier after preprocessing.
    """
    stage = ModelProto()
    stage.CopyFrom(model)
    stage.ir_version = min(stage.ir_version, IR_VERSION)
    if {contract.IMAGE, contract.LOGITS, contract.PENULTIMATE} & _tensor_names(stage):
        stage = _renamed(stage)
        prefix = "classifier/"
    else:
        prefix = ""
    graph = stage.graph
    before = _preprocess(graph, prefix + anatomy.input, anatomy, shape, preprocessing, where)
    read = {contract.LOGITS: (anatomy.logits, False), contract.PENULTIMATE: (penultimate.tensor, penultimate.spatial)}
    kinds = {name: kind.elem_type for name, kind in Graph(model).types.items()}
    after = [
        node
        for name, (source, averaged) in read.items()
        for node in _flat(prefix + source, name, averaged=averaged, single=kinds.get(source, TensorProto.FLOAT) == TensorProto.FLOAT)
    ]
    _free_batch(graph, anatomy)
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.output[:], graph.value_info[:]
    kept = [value for value in graph.input if value.name != prefix + anatomy.input]
    del graph.input[:]
    graph.input.extend([helper.make_tensor_value_info(contract.IMAGE, TensorProto.FLOAT, ["batch", *shape]), *kept])
    widths = {contract.LOGITS: anatomy.classes, contract.PENULTIMATE: penultimate.width}
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name, width in widths.items())
    graph.node.extend(nodes)
    return stage


def _renamed(model: ModelProto) -> ModelProto:
    renamed: ModelProto = onnx.compose.add_prefix(model, "classifier/")
    return renamed


def _tensor_names(model: ModelProto) -> set[str]:
    graph = model.graph
    made = {name for node in graph.node for name in node.output}
    return made | {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}


def _flat(source: str, name: str, *, averaged: bool, single: bool) -> list[NodeProto]:
    """float32 [batch, d] from a tensor of the classifier; the operations are the same in every opset from 11 on."""
    mean, flat = f"noisec/{name}_mean", f"noisec/{name}_flat"
    pool = [helper.make_node("GlobalAveragePool", [source], [mean], name=mean)] if averaged else []
    flattened = helper.make_node("Flatten", [mean if averaged else source], [name if single else flat], axis=1, name=f"noisec/{name}")
    return [*pool, flattened, *([] if single else [helper.make_node("Cast", [flat], [name], to=TensorProto.FLOAT, name=f"{flat}_cast")])]


def check_preprocessing(spec: PreprocessingSpec, channels: int) -> None:
    """Refuse means or deviations that are not one for each channel.

    Raises:
        NoisecError: there are more or fewer.
    """
    for name, values in (("mean", spec.mean), ("std", spec.std)):
        if values and len(values) != channels:
            raise NoisecError(f"classifier.preprocessing.{name} has {len(values)} values; the images have {channels} channels")


def _scale(size: int, wanted: int) -> np.float32:
    """What takes ``size`` pixels to ``wanted``: runtimes round their product down, so the factor is never rounded down below it."""
    scale = np.float32(wanted / size)
    return scale if int(float(scale) * size) == wanted else np.nextafter(scale, np.float32(np.inf))


def _preprocess(
    graph: onnx.GraphProto, target: str, anatomy: Anatomy, shape: tuple[int, int, int], spec: PreprocessingSpec, where: str
) -> list[NodeProto]:
    """Nodes from IMAGE to the classifier's own input."""
    channels, height, width = shape
    check_preprocessing(spec, channels)
    nodes: list[NodeProto] = []
    current = contract.IMAGE

    def then(kind: str, *inputs: str, **attributes: Any) -> None:
        nonlocal current
        output = f"noisec/preprocessed_{len(nodes)}"
        nodes.append(helper.make_node(kind, [current, *inputs], [output], name=f"noisec/{kind.lower()}_{len(nodes)}", **attributes))
        current = output

    def constant(name: str, values: npt.NDArray[np.generic]) -> str:
        graph.initializer.append(numpy_helper.from_array(values, f"noisec/{name}"))
        return f"noisec/{name}"

    if spec.channel_order == "bgr":
        then("Gather", constant("bgr", np.arange(channels)[::-1].copy()), axis=1)
    if spec.size and spec.size != (height, width):
        scales = np.array([1, 1, _scale(height, spec.size[0]), _scale(width, spec.size[1])], np.float32)
        then("Resize", "", constant("scales", scales), mode="linear", coordinate_transformation_mode="pytorch_half_pixel")
        height, width = spec.size
    if spec.scale != 1:
        then("Mul", constant("scale", np.array(spec.scale, np.float32)))
    for kind, name, values in (("Sub", "mean", spec.mean), ("Div", "std", spec.std)):
        if values:
            then(kind, constant(name, np.array(values, np.float32).reshape(1, channels, 1, 1)))
    _check_fit(anatomy, (channels, height, width), where)
    if anatomy.image_shape is None:
        then("Flatten", axis=1)
    elif anatomy.channels_last:
        then("Transpose", perm=[0, 2, 3, 1])
    nodes.append(helper.make_node("Identity", [current], [target], name="noisec/image"))
    return nodes


def _check_fit(anatomy: Anatomy, found: tuple[int, int, int], where: str) -> None:
    expected = anatomy.image_shape
    if expected is None:
        flat = int(np.prod(found))
        if len(anatomy.input_shape) != 2 or (isinstance(anatomy.input_shape[1], int) and anatomy.input_shape[1] != flat):
            raise NoisecError(f"{where}: takes {list(anatomy.input_shape)}; images of {list(found)} flatten to [batch, {flat}]")
    elif any(isinstance(size, int) and size != own for size, own in zip(expected, found, strict=True)):
        raise NoisecError(
            f"{where}: takes images of {list(expected)}; after preprocessing they are {list(found)}: set classifier.preprocessing.size, or "
            "data.channels"
        )


def _free_batch(graph: onnx.GraphProto, anatomy: Anatomy) -> None:
    """Where the model was exported for one batch size, let reshapes keep whatever batch comes in."""
    batch = anatomy.input_shape[0] if anatomy.input_shape else "?"
    if not isinstance(batch, int):
        return
    targets = {node.input[1] for node in graph.node if node.op_type == "Reshape"}
    tensors = [tensor for tensor in graph.initializer if tensor.name in targets]
    tensors += [node.attribute[0].t for node in graph.node if node.op_type == "Constant" and node.output[0] in targets]
    for tensor in tensors:
        sizes = numpy_helper.to_array(tensor).copy()
        if sizes.ndim == 1 and len(sizes) > 1 and sizes[0] == batch:
            sizes[0] = 0 if -1 in sizes[1:] else -1
            tensor.CopyFrom(numpy_helper.from_array(sizes, tensor.name))
