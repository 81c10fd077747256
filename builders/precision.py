"""Lower precision, written into a stage's graph: no builder flag and no runtime option changes it afterwards."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from noisec import contract
from noisec.builders.images import Floats
from noisec.builders.spec import Calibration, Precision
from noisec.errors import NoisecError

STAGE = "model.onnx"
LOWERED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""operations whose inputs and weights are quantised"""
EXACT = (
    *("Sub", "Pow", "ReduceMean", "Sqrt", "Unsqueeze", "GreaterOrEqual", "LessOrEqual", "And", "Cast", "ReduceMin"),
    *("Div", "Mul", "Resize", "Flatten"),
)
"""operations that stay in fp32: the subtraction that makes the noise, its level, the range check, and preprocessing"""


def lower(stage: Path, precision: Precision, images: Iterable[Floats], calibration: Calibration, folder: Path) -> None:
    """Write a stage's graph in another precision.

    Whatever the precision, IMAGE, NOISE, RECONSTRUCTION, LOGITS and PENULTIMATE are fp32, the noise is the difference of the image as it
    came in and its reconstruction, and PENULTIMATE is what the layer before it computes, never a quantised copy of that.

    Args:
        stage: folder with ``model.onnx`` in fp32
        images: what the stage will be fed, float32 [n, C, H, W] each; int8 takes its ranges from them
        folder: gets ``model.onnx``
    """
    if precision == "fp32":
        for path in stage.glob(f"{STAGE}*"):
            shutil.copyfile(path, folder / path.name)
    elif precision == "fp16":
        onnx.save(_half(stage / STAGE), folder / STAGE)
    else:
        _quantise(stage / STAGE, images, calibration, folder / STAGE)


def _half(path: Path) -> ModelProto:
    """FP16 by ModelOpt's AutoCast; inputs and outputs stay fp32."""
    try:
        from modelopt.onnx.autocast import convert_to_mixed_precision
    except ImportError as error:
        raise NoisecError(f"precision = 'fp16' needs {error.name or 'nvidia-modelopt'}: pip install 'noisec-triton[precision]'") from error
    for name in ("modelopt.onnx", "modelopt.onnx.autocast"):
        logging.getLogger(name).setLevel(logging.WARNING)
    model: ModelProto = convert_to_mixed_precision(
        onnx_path=path.as_posix(), low_precision_type="fp16", keep_io_types=True, op_types_to_exclude=list(EXACT)
    )
    return model


def _quantise(path: Path, images: Iterable[Floats], calibration: Calibration, target: Path) -> None:
    """INT8 by explicit quantise/dequantise pairs with fp32 scales: symmetric, weights by channel."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    methods = {"max": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy, "percentile": CalibrationMethod.Percentile}
    ready = target.with_suffix(".ready")
    quant_pre_process(path, ready, skip_symbolic_shape=True)
    named = onnx.load(ready)
    for place, node in enumerate(named.graph.node):
        node.name = f"{node.name or node.op_type}_{place}"  # what is left out is left out by name
    onnx.save(named, ready)
    with redirect_stdout(StringIO()):  # the histograms' sizes, which nobody asked for
        quantize_static(
            ready,
            target,
            _Reader(iter(images)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(LOWERED),
            nodes_to_exclude=shared_with_exact_path(named),
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            calibrate_method=methods[calibration],
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "AddQDQPairToWeight": True,
                "OpTypesToExcludeOutputQuantization": list(LOWERED),
            },
        )
    ready.unlink()


def shared_with_exact_path(model: ModelProto) -> list[str]:
    """Names of the operations that may not be quantised, because a quantiser that rounds their input rounds it for everybody who reads it.

    These are the ones that read IMAGE, from which the noise is subtracted, and the ones that read what PENULTIMATE is made of.
    """
    producers = {output: node for node in model.graph.node for output in node.output}
    shared = {contract.IMAGE}
    for output in model.graph.output:
        name = output.name
        shared.add(name)
        while (node := producers.get(name)) is not None and node.op_type not in LOWERED:
            name = node.input[0]
            shared.add(name)
    readers = [node for node in model.graph.node if node.op_type in LOWERED and shared & set(node.input)]
    preprocessed = _after_preprocessing(model)
    return [node.name for node in {node.name: node for node in [*readers, *preprocessed]}.values()]


def _after_preprocessing(model: ModelProto) -> list[onnx.NodeProto]:
    """The first convolutions or dense layers that IMAGE reaches: the classifier's input may be an image or a noise a hundred times
    smaller, and one step for both would erase the noise."""
    reached = {contract.IMAGE}
    first = []
    for node in model.graph.node:
        if reached & set(node.input):
            if node.op_type in LOWERED:
                first.append(node)
            elif node.op_type in (*EXACT, "Identity", "Gather", "Transpose", "Reshape"):
                reached |= set(node.output)
    return first


class _Reader:
    """Calibration images, as ONNX Runtime's quantiser reads them."""

    def __init__(self, batches: Iterator[Floats]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {contract.IMAGE: batch}
