"""Your own classifier becomes a stage, its weights untouched, its penultimate layer found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from noisec import contract
from noisec.builders import protect
from noisec.builders.classifier import _scale, choose_penultimate, dissect, make_stage, read_model
from noisec.builders.export import export_plain
from noisec.builders.graphs import save_graph
from noisec.builders.head import read_head
from noisec.builders.images import Images, Splits
from noisec.builders.inspect import inspect_classifier
from noisec.builders.protect import Preprocessing
from noisec.builders.spec import PreprocessingSpec, read_spec
from noisec.builders.torchgraph import TorchGraph
from noisec.builders.workbench import Workbench
from noisec.errors import NoisecError
from noisec.python_backend.scorer.session import open_session

SHAPE = (3, 16, 16)
PLAIN = PreprocessingSpec()
IMAGES = np.random.default_rng(0).random((5, *SHAPE), dtype=np.float32)


class TwoParts(nn.Module):
    """Features and a head, so that a test knows both answers."""

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.head = head

    def forward(self, images):
        return self.head(self.features(images))


def trunk(*after: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *after)


FAMILIES = {
    "dense head": lambda: TwoParts(trunk(nn.Flatten(), nn.Linear(512, 24), nn.ReLU()), nn.Sequential(nn.Dropout(), nn.Linear(24, 7))),
    "softmax at the end": lambda: TwoParts(trunk(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Sequential(nn.Linear(8, 7), nn.Softmax(1))),
    "log softmax at the end": lambda: TwoParts(trunk(nn.Flatten()), nn.Sequential(nn.Linear(512, 7), nn.LogSoftmax(1))),
    "no bias": lambda: TwoParts(trunk(nn.Flatten()), nn.Linear(512, 7, bias=False)),
    "convolution after pooling": lambda: TwoParts(
        trunk(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 12, 1), nn.Hardswish()), nn.Sequential(nn.Conv2d(12, 7, 1), nn.Flatten())
    ),
    "convolution before pooling": lambda: TwoParts(
        trunk(), nn.Sequential(nn.Conv2d(8, 7, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(1))
    ),
    "a perceptron": lambda: TwoParts(nn.Sequential(nn.Flatten(), nn.Linear(768, 24), nn.Tanh()), nn.Linear(24, 7)),
}


def staged(model: onnx.ModelProto, tmp_path, penultimate=None, shape=SHAPE, preprocessing=PLAIN):
    """LOGITS and PENULTIMATE of the stage that is made of a model, for IMAGES."""
    anatomy = dissect(model)
    stage = make_stage(model, anatomy, choose_penultimate(anatomy, model, penultimate), shape, preprocessing)
    onnx.checker.check_model(stage)
    onnx.save(stage, tmp_path / "stage.onnx")
    return open_session(tmp_path / "stage.onnx").run([contract.LOGITS, contract.PENULTIMATE], {contract.IMAGE: IMAGES})


def exported(module: nn.Module, tmp_path) -> onnx.ModelProto:
    export_plain(module.eval(), torch.rand(2, *SHAPE), tmp_path / "model.onnx")
    return read_model(tmp_path / "model.onnx")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_penultimate_layer_is_found_by_itself(tmp_path, family):
    torch.manual_seed(0)
    module = FAMILIES[family]().eval()
    logits, penultimate = staged(exported(module, tmp_path), tmp_path)
    with torch.no_grad():
        features = module.features(torch.from_numpy(IMAGES))
        answer = module(torch.from_numpy(IMAGES)).numpy()
    features = features.mean(dim=(2, 3)) if features.ndim == 4 else features
    assert np.abs(penultimate - features.numpy()).max() < 1e-5
    assert np.array_equal(logits.argmax(axis=1), answer.argmax(axis=1))
    if "softmax" in family:
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        assert np.abs(probabilities - (np.exp(answer) if "log" in family else answer)).max() < 1e-5
        assert not np.allclose(logits.sum(axis=1), 1)


def test_weights_and_nodes_of_the_classifier_stay_as_they_are(tmp_path):
    model = exported(FAMILIES["dense head"](), tmp_path)
    anatomy = dissect(model)
    stage = make_stage(model, anatomy, anatomy.candidates[0], SHAPE, PreprocessingSpec(mean=(0.5,) * 3, std=(0.2,) * 3))
    kept = {tensor.name: tensor.SerializeToString() for tensor in stage.graph.initializer}
    assert all(kept[tensor.name] == tensor.SerializeToString() for tensor in model.graph.initializer)
    nodes = [node.SerializeToString() for node in stage.graph.node]
    assert all(node.SerializeToString() in nodes for node in model.graph.node)


def test_a_named_tensor_is_taken_instead(tmp_path):
    torch.manual_seed(0)
    module = FAMILIES["dense head"]().eval()
    model = exported(module, tmp_path)
    before = dissect(model).candidates[1]
    assert "before its Relu" in before.why
    _, penultimate = staged(model, tmp_path, before.tensor)
    with torch.no_grad():
        assert np.abs(penultimate - module.features[:-1](torch.from_numpy(IMAGES)).numpy()).max() < 1e-5


def test_a_stage_of_ours_can_be_protected_again(tmp_path):
    model = exported(FAMILIES["dense head"](), tmp_path)
    anatomy = dissect(model)
    once = make_stage(model, anatomy, anatomy.candidates[0], SHAPE, PreprocessingSpec())
    expected = staged(model, tmp_path)
    for found, wanted in zip(staged(once, tmp_path), expected, strict=True):
        assert np.abs(found - wanted).max() < 1e-6


PREPROCESSING = {
    "mean and deviation": PreprocessingSpec(mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3)),
    "bytes, blue first": PreprocessingSpec(scale=255, channel_order="bgr", mean=(104, 117, 123)),
    "smaller": PreprocessingSpec(size=(8, 12)),
    "larger": PreprocessingSpec(size=(40, 36), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
}


@pytest.mark.parametrize("spec", PREPROCESSING.values(), ids=PREPROCESSING)
def test_compiled_preprocessing_equals_the_declared_one(tmp_path, spec):
    torch.manual_seed(0)
    module = TwoParts(trunk(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(8, 7)).eval()
    ready = Preprocessing(spec)(torch.from_numpy(IMAGES))
    export_plain(module, ready[:2], tmp_path / "model.onnx")
    logits, _ = staged(read_model(tmp_path / "model.onnx"), tmp_path, preprocessing=spec)
    with torch.no_grad():
        assert np.abs(logits - module(ready).numpy()).max() < 1e-3 * max(1, spec.scale / 10)


def by_hand(
    opset=17, batch="batch", channels_last=False, reshape=False, inputs=1, output=TensorProto.FLOAT, ending=None, kind=TensorProto.FLOAT
):
    """A small classifier written with the ONNX helper: what exporters of other frameworks leave."""
    generator = np.random.default_rng(0)
    weights = {
        "kernel": generator.standard_normal((8, 3, 3, 3)).astype(np.float32),
        "dense": generator.standard_normal((8, 7)).astype(np.float32),
        "bias": generator.standard_normal(7).astype(np.float32),
        "flat": np.array([batch if isinstance(batch, int) else -1, 8], np.int64),
    }
    nodes = [helper.make_node("Transpose", ["pixels"], ["chw"], perm=[0, 3, 1, 2])] if channels_last else []
    nodes += [
        helper.make_node("Conv", ["chw" if channels_last else "pixels", "kernel"], ["convolved"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["convolved"], ["rectified"]),
        helper.make_node("GlobalAveragePool", ["rectified"], ["pooled"]),
        helper.make_node("Reshape", ["pooled", "flat"], ["flattened"])
        if reshape
        else helper.make_node("Flatten", ["pooled"], ["flattened"]),
        helper.make_node("MatMul", ["flattened", "dense"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["answer"]),
    ]
    if output != TensorProto.FLOAT:
        nodes.append(helper.make_node("ArgMax", ["answer"], ["label"], axis=1, keepdims=0))
    if ending:
        nodes.append(helper.make_node(ending, ["answer"], ["ended"]))
    name = "label" if output != TensorProto.FLOAT else "ended" if ending else "answer"
    size = ["batch"] if output != TensorProto.FLOAT else [batch, 7]
    image = [batch, 16, 16, 3] if channels_last else [batch, 3, 16, 16]
    values = [helper.make_tensor_value_info("pixels", kind, image)]
    values += [helper.make_tensor_value_info(f"extra{index}", TensorProto.FLOAT, [1]) for index in range(1, inputs)]
    graph = helper.make_graph(
        nodes,
        "by hand",
        values,
        [helper.make_tensor_value_info(name, output, size)],
        [numpy_helper.from_array(value, key) for key, value in weights.items() if key != "flat" or reshape],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize("opset", [11, 13, 15, 17, 18, 20, 21])
def test_every_opset_from_eleven_on_gives_the_same_stage(tmp_path, opset):
    spec = PreprocessingSpec(mean=(0.5,) * 3, std=(0.5,) * 3, channel_order="bgr", scale=2.0)
    found = staged(by_hand(opset), tmp_path, preprocessing=spec)
    for one, other in zip(found, staged(by_hand(17), tmp_path, preprocessing=spec), strict=True):
        assert np.array_equal(one, other)


def half_inside(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same classifier, computing in fp16 behind float images and answers."""
    graph = model.graph
    for tensor in graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    graph.node[0].input[0], graph.node[-1].output[0] = "half", "half answer"
    graph.node.insert(0, helper.make_node("Cast", ["pixels"], ["half"], to=TensorProto.FLOAT16))
    graph.node.append(helper.make_node("Cast", ["half answer"], ["answer"], to=TensorProto.FLOAT))
    return model


def test_a_classifier_that_computes_in_fp16_answers_floats(tmp_path):
    found, exact = staged(half_inside(by_hand()), tmp_path), staged(by_hand(), tmp_path)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == np.float32
        assert np.abs(one - other).max() < 0.01 * np.abs(other).max()


FORMS = {
    "pieces of given sizes": [helper.make_node("Split", ["IMAGE", "sizes"], ["rest", "answer"], axis=2)],
    "a slice of the first axes": [helper.make_node("Slice", ["IMAGE", "starts", "ends"], ["answer"])],
    "one place of an axis": [helper.make_node("Gather", ["IMAGE", "place"], ["answer"], axis=-2)],
    "places in rows": [helper.make_node("Gather", ["IMAGE", "places"], ["answer"], axis=1)],
    "a constant number": [
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Mul", ["IMAGE", "two"], ["answer"]),
    ],
    "constant numbers": [
        helper.make_node("Constant", [], ["shape"], value_ints=[0, 48]),
        helper.make_node("Reshape", ["IMAGE", "shape"], ["answer"]),
    ],
}


@pytest.mark.parametrize("nodes", FORMS.values(), ids=FORMS)
def test_a_graph_in_torch_answers_what_the_runtime_answers(tmp_path, nodes):
    numbers = {"sizes": [1, 3], "starts": [0, 1], "ends": [9, 3], "place": 2, "places": [[0, 2], [1, 1]]}
    used = {name for node in nodes for name in node.input}
    constants = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in numbers.items() if name in used]
    values = [
        helper.make_tensor_value_info("IMAGE", TensorProto.FLOAT, ["batch", 3, 4, 4]),
        helper.make_tensor_value_info("answer", TensorProto.FLOAT, None),
    ]
    graph = helper.make_graph(nodes, "form", values[:1], values[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "model.onnx")
    images = np.random.default_rng(0).random((5, 3, 4, 4), dtype=np.float32)
    (wanted,) = open_session(tmp_path / "model.onnx").run(["answer"], {"IMAGE": images})
    (found,) = TorchGraph(tmp_path / "model.onnx")(torch.from_numpy(images))
    assert np.array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_fixed_batch_size_is_freed(tmp_path, batch):
    for one, other in zip(staged(by_hand(batch=batch, reshape=True), tmp_path), staged(by_hand(), tmp_path), strict=True):
        assert np.abs(one - other).max() < 1e-6


def test_channels_last_is_noticed(tmp_path):
    model = by_hand(channels_last=True)
    assert dissect(model).channels_last
    for one, other in zip(staged(model, tmp_path), staged(by_hand(), tmp_path), strict=True):
        assert np.abs(one - other).max() < 1e-6


def test_quantised_classifiers_are_seen_through(tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"pixels": IMAGES}])

        def get_next(self):
            return next(self.batches, None)

    onnx.save(by_hand(), tmp_path / "float.onnx")
    quantize_static(tmp_path / "float.onnx", tmp_path / "int8.onnx", Reader(), quant_format=QuantFormat.QDQ)
    model = read_model(tmp_path / "int8.onnx")
    assert "DequantizeLinear" in {node.op_type for node in model.graph.node}
    assert dissect(model).candidates[0].width == 8
    logits, penultimate = staged(model, tmp_path)
    exact = staged(by_hand(), tmp_path)
    assert np.abs(penultimate - exact[1]).max() < 0.05 * np.abs(exact[1]).max()
    head = read_head(tmp_path / "stage.onnx", IMAGES)
    assert np.array_equal(head.logits(penultimate).argmax(axis=1), logits.argmax(axis=1))
    assert np.array_equal(logits.argmax(axis=1), exact[0].argmax(axis=1))


@pytest.mark.parametrize("form", ["Transpose", "Identity"])
def test_a_head_is_read_through_what_a_graph_does_to_its_weights(tmp_path, form):
    model = by_hand()
    head = next(node for node in model.graph.node if node.op_type == "MatMul")
    (weights,) = (tensor for tensor in model.graph.initializer if tensor.name == head.input[1])
    array = numpy_helper.to_array(weights)
    weights.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array.T if form == "Transpose" else array), weights.name))
    head.input[1] = "made"
    model.graph.node.insert(0, helper.make_node(form, [weights.name], ["made"]))
    logits, penultimate = staged(model, tmp_path)
    np.testing.assert_allclose(read_head(tmp_path / "stage.onnx", IMAGES).logits(penultimate), logits, atol=1e-5)


def test_of_several_outputs_the_one_with_logits_answers(tmp_path):
    model = by_hand()
    model.graph.output.insert(0, helper.make_tensor_value_info(dissect(model).candidates[0].tensor, TensorProto.FLOAT, ["batch", 8]))
    onnx.save(model, tmp_path / "two.onnx")
    found = protect._onnx_predictor(tmp_path / "two.onnx", PLAIN)(IMAGES)
    np.testing.assert_allclose(found, staged(model, tmp_path)[0], atol=1e-5)


@pytest.mark.parametrize(("size", "wanted"), [(96, 224), (48, 224), (100, 32), (110, 64), (28, 227), (224, 96), (32, 32)])
def test_an_image_gets_exactly_the_size_that_the_classifier_takes(size, wanted):
    scale = _scale(size, wanted)
    assert scale.dtype == np.float32
    assert scale == pytest.approx(wanted / size, rel=1e-6)
    for kind in (np.float32, np.float64):  # runtimes compute in either
        assert int(kind(scale) * kind(size)) == wanted


def test_external_data_stays_external_and_is_missed_when_it_is_gone(tmp_path, monkeypatch):
    model = by_hand()
    onnx.save(model, tmp_path / "big.onnx", save_as_external_data=True, location="big.bin", size_threshold=0)
    read = read_model(tmp_path / "big.onnx")
    anatomy = dissect(read)
    monkeypatch.chdir(tmp_path)
    kept = Path("model.onnx.data")
    kept.write_bytes(b"of the working directory")  # as an export by torch leaves it
    target = tmp_path / "stage"
    target.mkdir()
    for _ in range(2):  # an interrupted run has left its own
        save_graph(make_stage(read, anatomy, anatomy.candidates[0], SHAPE, PreprocessingSpec()), target / "model.onnx", external=True)
    assert (target / "model.onnx.data").stat().st_size < 2 * sum(len(tensor.raw_data) for tensor in by_hand().graph.initializer)
    assert kept.read_bytes() == b"of the working directory"
    found = open_session(target / "model.onnx").run([contract.LOGITS], {contract.IMAGE: IMAGES})[0]
    assert np.array_equal(found, staged(by_hand(), tmp_path)[0])
    (tmp_path / "big.bin").unlink()
    with pytest.raises(NoisecError, match="external data has to lie beside it"):
        read_model(tmp_path / "big.onnx")


def no_head():
    node = helper.make_node("GlobalAveragePool", ["pixels"], ["answer"])
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in (("pixels", [1, 3, 8, 8]), ("answer", [1, 3, 1, 1]))
    ]
    return helper.make_model(helper.make_graph([node], "pool", values[:1], values[1:]), opset_imports=[helper.make_opsetid("", 17)])


MODELS = {
    "two inputs": (lambda: by_hand(inputs=2), r"inputs are \['pixels', 'extra1'\]; a guard protects a classifier with one image input"),
    "integer output": (
        lambda: by_hand(output=TensorProto.INT64),
        r"outputs are label \(INT64\): none is floating point; export the classifier with",
    ),
    "integer input": (lambda: by_hand(kind=TensorProto.UINT8), "input 'pixels' is UINT8; it has to be FLOAT"),
    "no linear layer": (no_head, r"no linear layer \(Gemm, MatMul, 1x1 Conv\) makes the outputs answer \(FLOAT\)"),
    "one sigmoid": (lambda: by_hand(ending="Sigmoid"), r"no linear layer .* they end in Sigmoid"),
    "new opset": (lambda: by_hand(opset=23), "opset 23; servers of today run up to 21: export it with"),
    "old opset": (lambda: by_hand(opset=9), "opset 9; at least 11 is needed: export it again"),
}


@pytest.mark.parametrize(("make", "message"), MODELS.values(), ids=MODELS)
def test_what_is_no_classifier_of_images_is_refused(make, message):
    with pytest.raises(NoisecError, match=message):
        dissect(make())


STAGES = {
    "no such tensor": ({"penultimate": "nothing"}, r"penultimate = 'nothing' is no tensor of this model; .*candidates: flattened"),
    "a tensor of the wrong shape": ({"penultimate": "bias"}, r"penultimate = 'bias' is \(7,\); it has to be \[batch, d\]"),
    "images of another size": ({"shape": (3, 32, 32)}, r"takes images of \[3, 16, 16\]; after preprocessing they are \[3, 32, 32\]: set"),
    "grey images": ({"shape": (1, 16, 16)}, r"after preprocessing they are \[1, 16, 16\].*data.channels"),
    "two means": ({"preprocessing": PreprocessingSpec(mean=(0.5, 0.5))}, "preprocessing.mean has 2 values; the images have 3 channels"),
    "one deviation": ({"preprocessing": PreprocessingSpec(std=(0.5,))}, "preprocessing.std has 1 values; the images have 3 channels"),
}


@pytest.mark.parametrize(("arguments", "message"), STAGES.values(), ids=STAGES)
def test_a_stage_that_does_not_fit_is_refused(tmp_path, arguments, message):
    with pytest.raises(NoisecError, match=message):
        staged(by_hand(), tmp_path, **arguments)


def test_files_that_are_no_models_are_refused(tmp_path):
    (tmp_path / "text.onnx").write_text("not a model" * 50)
    (tmp_path / "cut.onnx").write_bytes(by_hand().SerializeToString()[:300])
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name in ("config.pbtxt", "net.json", "net.prototxt", "net.onnxtxt"):  # onnx would choose another parser for each
        (tmp_path / name).write_text("name: 'something else'")
    for name in ("text.onnx", "cut.onnx", "empty.onnx", "config.pbtxt", "net.json", "net.prototxt", "net.onnxtxt"):
        with pytest.raises(NoisecError, match=f"{name}: not a"):
            read_model(tmp_path / name)
    with pytest.raises(NoisecError, match="no such file"):
        read_model(tmp_path / "missing.onnx")


def not_a_module():
    return 3


def a_module():
    return FAMILIES["dense head"]()


FACTORIES = {
    "no such package": ("nowhere.at.all:build", "cannot be called: ModuleNotFoundError"),
    "no such name": ("noisec.builders.networks:Missing", "cannot be called: AttributeError"),
    "needs arguments": ("noisec.builders.networks:ConvClassifier", "cannot be called: TypeError"),
    "no module": (f"{__name__}:not_a_module", "returned int; expected a torch.nn.Module"),
}


@pytest.mark.parametrize(("factory", "message"), FACTORIES.values(), ids=FACTORIES)
def test_a_factory_that_makes_no_module_is_refused(factory, message):
    with pytest.raises(NoisecError, match=message):
        protect.load_module(factory, None)


def test_a_module_that_answers_more_than_logits_is_refused():
    class Both(nn.Module):
        def forward(self, images):
            return images.mean(dim=(2, 3)), images

    with pytest.raises(NoisecError, match="the module answers a tuple; .* logits"):
        protect._check_answer("mine:Both", Both(), torch.from_numpy(IMAGES))
    with pytest.raises(NoisecError, match=r"the module does not run on images of \[3, 16, 16\]"):
        protect._check_answer("mine:Small", nn.Linear(3, 3), torch.from_numpy(IMAGES))


def test_weights_of_any_kind_have_a_fingerprint():
    one, other = (nn.Linear(3, 2).to(torch.bfloat16) for _ in range(2))
    assert protect.fingerprint(one) != protect.fingerprint(other)
    other.load_state_dict(one.state_dict())
    assert protect.fingerprint(one) == protect.fingerprint(other)


def test_a_factory_with_a_mean_too_few_is_refused_and_other_code_is_another_classifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "supplied.py").write_text("from noisec.builders.networks import ResNet20 as build")
    protect.load_module("supplied:build", None)
    before = protect.code_digest("supplied:build")
    (tmp_path / "supplied.py").write_text("from noisec.builders.networks import ResNet20 as build  # another")
    assert protect.code_digest("supplied:build") != before
    (tmp_path / "guard.toml").write_text(
        """
name = "supplied"
[data]
source = "cifar10"
train = 100
fit = 100
calibrate = 100
report = 100
[classifier]
factory = "supplied:build"
preprocessing = { mean = [0.5, 0.5] }
[autoencoder]
epochs = 1
[[detectors]]
view = "noise"
"""
    )
    images = Images.whole(np.zeros((4, 3, 32, 32), np.uint8), np.arange(4))
    splits = Splits(images, images, images, images, tuple("abcdefghij"))
    with pytest.raises(NoisecError, match="preprocessing.mean has 2 values; the images have 3 channels"):
        protect.protect(read_spec(tmp_path / "guard.toml"), splits, Workbench(tmp_path))


def test_weights_load_from_torch_and_safetensors_files(tmp_path):
    from safetensors.torch import save_file

    state = a_module().state_dict()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "weights.th")
    save_file(state, tmp_path / "weights.safetensors")
    for name in ("weights.th", "weights.safetensors"):
        loaded = protect.load_module(f"{__name__}:a_module", tmp_path / name).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_weights_that_do_not_fit_or_hold_code_are_refused(tmp_path):
    torch.save({"other": torch.zeros(3)}, tmp_path / "other.th")
    torch.save(a_module(), tmp_path / "pickled.th")
    torch.save([1, 2], tmp_path / "list.th")
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 40)
    for name, message in {
        "other.th": "weights do not fit",
        "pickled.th": "not a file of weights alone",
        "list.th": "holds a list; expected a state_dict",
        "broken.safetensors": "not a file of weights alone",
        "missing.th": "no such file",
    }.items():
        with pytest.raises(NoisecError, match=message):
            protect.load_module(f"{__name__}:a_module", tmp_path / name)


def test_inspect_counts_what_a_classifier_costs(tmp_path):
    onnx.save(by_hand(), tmp_path / "model.onnx")
    facts, candidates = inspect_classifier(str(tmp_path / "model.onnx"), "")
    assert dict(facts) == {
        "input": "pixels [batch, 3, 16, 16]",
        "logits": "answer [batch, 7]",
        "parameters": f"{8 * 27 + 56 + 7:,}",
        "multiply-adds an image": f"{8 * 27 * 256 + 56:,}",
        "opset": "17",
    }
    assert candidates[0] == ["flattened", "8", "input of the last linear layer (MatMul)"]
    facts, candidates = inspect_classifier("noisec.builders.networks:ResNet20", "3,32,32")
    assert dict(facts)["parameters"] == "268,346"  # batch norms are folded into the convolutions
    assert candidates[0][1] == "64"
    with pytest.raises(NoisecError, match="--shape '3,32': expected C,H,W"):
        inspect_classifier("noisec.builders.networks:ResNet20", "3,32")
