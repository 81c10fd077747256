"""The TOML file that describes a guard, validated."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from noisec import contract
from noisec.contract import View
from noisec.errors import NoisecError
from noisec.python_backend.scorer.detectors import WITH_HEAD

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(gt=0, lt=2**31)]
CountOrNone = Annotated[int, Field(ge=0, lt=2**31)]
"""what Triton's configurations can hold"""
Share = Annotated[float, Field(gt=0, lt=1)]
Precision = Literal["fp32", "fp16", "int8"]
Stage = Literal["autoencoder", "classifier"]
NETWORK_STAGES: tuple[Stage, ...] = ("autoencoder", "classifier")
Calibration = Literal["max", "entropy", "percentile"]
INT8_IMAGES = 500
"""clean images from which int8 takes its ranges"""
Deviation = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(gt=0, le=4096)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSpec(Section):
    """Clean, labelled images, cut into four disjoint sets."""

    source: Literal["fashion-mnist", "fashion-mnist-test", "cifar10", "pneumoniamnist", "gtsrb", "folder", "npz"]
    """official sets: ``fashion-mnist``, 60,000 + 10,000; ``fashion-mnist-test``, the 10,000 that ship with the package; ``cifar10``;
    ``pneumoniamnist``; ``gtsrb``; your own: ``folder`` and ``npz``"""
    path: Path | None = None
    """of the ``npz``: images and labels, optionally test_images and test_labels; of the ``folder``: one sub-folder for each class, or
    train and test with these; of ``gtsrb``: the folder of its three zip files; relative to the TOML file"""
    size: tuple[Side, Side] | None = None
    """``folder`` and ``gtsrb``: resize to [height, width]"""
    channels: Literal[1, 3] | None = None
    """``folder`` and ``gtsrb``: convert to gray, 1, or colour, 3, which is the default"""
    class_names: tuple[str, ...] = ()
    train: Positive
    """images that train the networks"""
    fit: Positive
    """images that fit the detectors"""
    calibrate: Positive
    """images that calibrate the threshold"""
    report: Positive
    """images that measure the figures of the card"""

    @model_validator(mode="after")
    def _path_belongs_to_files(self) -> DataSpec:
        if self.source != "gtsrb" and (self.source in ("npz", "folder")) != (self.path is not None):
            raise ValueError(
                "data.path goes with source = 'npz' or 'folder', may go with 'gtsrb', and goes with no other; "
                f"source is {self.source!r}, path is {self.path}"
            )
        return self

    @model_validator(mode="after")
    def _form_belongs_to_decoded_files(self) -> DataSpec:
        for key in ("size", "channels"):
            value = getattr(self, key)
            if value is not None and self.source not in ("folder", "gtsrb"):
                raise ValueError(
                    f"data.{key} goes with source = 'folder' or 'gtsrb' and with no other; source is {self.source!r}, {key} is {value}"
                )
        return self


class BackdoorSpec(Section):
    """BadNets (Gu et al. 2017): stamp a white corner patch on a share of the training images and relabel them."""

    target: Annotated[int, Field(ge=0)] = 0
    share: Share = 0.05


class PreprocessingSpec(Section):
    """What a classifier of your own expects, applied inside the graph to images in [0, 1], in this order."""

    channel_order: Literal["rgb", "bgr"] = "rgb"
    size: tuple[Positive, Positive] | None = None
    """(H, W) to which images are resized, bilinear"""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """pixels are multiplied by this first: 255 for a classifier that wants bytes"""
    mean: tuple[float, ...] = ()
    """one for each channel, subtracted after scaling"""
    std: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """one for each channel, divided by after that"""


class ClassifierSpec(Section):
    """The classifier that is protected: a reference network to train, or your own as ONNX file or PyTorch module."""

    network: Literal["conv3", "conv6"] | None = None
    onnx: Path | None = None
    """relative to the TOML file"""
    factory: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")] | None = None
    """``package.module:callable``: called without arguments, returns a torch module that gives logits"""
    weights: Path | None = None
    """state_dict of the network or of the factory's module, as safetensors or a torch file without code; relative to the TOML file"""
    penultimate: str | None = None
    """tensor that feeds the detectors; found by itself where it is left out (see `noisec inspect`)"""
    preprocessing: PreprocessingSpec = PreprocessingSpec()
    epochs: Positive | None = None
    batch_size: Positive = 128
    learning_rate: Annotated[float, Field(gt=0)] = 4e-3
    mirror: bool = False
    """train on mirrored images too; not for classes that a mirror turns into each other, such as digits or traffic signs"""
    mixed_precision: bool = False
    """train with bfloat16 convolutions, weights stay float32: twice as fast on processors and GPUs that have them, three
    times as slow on others"""
    backdoor: BackdoorSpec | None = None

    @property
    def kind(self) -> Literal["network", "onnx", "factory"]:
        return "network" if self.network else "onnx" if self.onnx else "factory"

    @model_validator(mode="after")
    def _of_one_kind(self) -> ClassifierSpec:
        given = [name for name in ("network", "onnx", "factory") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"classifier: give one of network, onnx and factory; given: {given or 'none'}")
        belongs = {
            "network": {"weights", "epochs", "batch_size", "learning_rate", "mirror", "mixed_precision", "backdoor"},
            "onnx": {"penultimate", "preprocessing"},
            "factory": {"penultimate", "preprocessing", "weights"},
        }[given[0]]
        foreign = sorted(
            name
            for name, field in type(self).model_fields.items()
            if name not in {*belongs, given[0]} and getattr(self, name) != field.default
        )
        if foreign:
            raise ValueError(f"classifier: {', '.join(foreign)} does not go with {given[0]}; leave it out")
        if given[0] == "network" and (self.epochs is None) == (self.weights is None):
            raise ValueError("classifier: give epochs, how long to train the network, or weights that it has already; one of them")
        return self


BLOCK_SHARE = 0.25
"""of the training images that get noise in blocks, where there is any"""


class AutoencoderSpec(Section):
    """The denoiser: trained on clean images to undo random corruption (NoiSec section 4.1)."""

    network: Literal["unet", "unet-small", "bottleneck"] = "unet"
    epochs: Positive
    batch_size: Positive = 64
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    noise_sd: Annotated[float, Field(gt=0, le=1)] = 0.15
    """the training noise has a standard deviation drawn from [0, noise_sd] for each image"""
    guidance: Annotated[float, Field(ge=0)] = 0.0
    """above 0: half of each batch gets noise along the classifier's gradient instead of random noise, and this is the weight of what the
    classifier's features of the reconstruction differ by from those of the clean image (Liao et al. 2018)"""
    patches: Annotated[float, Field(ge=0, le=1)] = 0.0
    """share of the training images that also get a small random patch, so that the denoiser learns to remove triggers"""
    blocks: Annotated[float, Field(ge=0, le=1)] = 0.0
    """above 0: a share `BLOCK_SHARE` of the training images gets noise in rectangles of up to this amplitude instead, so that the denoiser
    also removes the coarse perturbations of attacks that search without gradients"""
    mixed_precision: bool = False
    """train with bfloat16 convolutions, as for the classifier"""


class DetectorSpec(Section):
    """One statistic of one view."""

    kind: Literal[
        "mixture",
        "class-gaussian",
        "logit-gaussian",
        "divergence",
        "density",
        "dimension",
        "mutation",
        "reconstruction-error",
        "confidence",
        "dissent",
    ] = "mixture"
    """``mixture``: Gaussian mixture, as published; ``class-gaussian``: Mahalanobis distance from the predicted class; ``logit-gaussian``:
    the same of the change in logits from reconstruction, or hardened copy's, to the image's own; ``divergence``: Jensen-Shannon divergence
    of these two answers; ``density``: kernel density under the predicted class; ``dimension``: local intrinsic dimensionality;
    ``mutation``: sensitivity to mutants of the last layer; ``reconstruction-error``: root mean square of the noise itself;
    ``confidence``: how sure of its label the classifier stays while its last layers are amplified, as it does of a trigger's; ``dissent``:
    how far the hardened copy prefers another label"""
    view: View
    """``pixels``: n; ``noise``: F(n), as published; ``delta``: F(x) - F(A(x)); ``image``: F(x); ``amplified``: F'(x) and F''(x) of
    the classifier amplified to two depths, which together take more than one classifier pass and less than two; ``hardened``: F(x) - H(x),
    one pass of the classifier's hardened copy"""
    components: Positive = 1
    """``mixture``: Gaussians in each mixture; the paper uses one"""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """``divergence``: both answers' logits are divided by it"""

    @model_validator(mode="after")
    def _fits_its_view(self) -> DetectorSpec:
        bound: dict[str, tuple[View, ...]] = {
            "logit-gaussian": ("delta", "hardened"),
            "divergence": ("delta", "hardened"),
            "mutation": ("image",),
            "reconstruction-error": ("pixels",),
            "confidence": ("amplified",),
            "dissent": ("hardened",),
        }
        wanted = bound.get(self.kind, ("noise", "delta", "image", "hardened"))
        if self.view not in wanted:
            views = " or ".join(map(repr, wanted))
            raise ValueError(f"a detector of kind {self.kind!r} has view {views}; view is {self.view!r}")
        for name, kind in (("components", "mixture"), ("temperature", "divergence")):
            if self.kind != kind and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} goes with kind = {kind!r}; kind is {self.kind!r}")
        return self

    @property
    def name(self) -> str:
        extra = {"mixture": self.components, "divergence": self.temperature}.get(self.kind, 1)
        return f"{self.view}-{self.kind}" + ("" if extra == 1 else f"-{extra:g}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Tensors that the view reads."""
        return tuple(contract.PASSES[name] for name in contract.VIEWS[self.view]) or (contract.NOISE_LEVEL,)


class HardenedSpec(Section):
    """A copy of the classifier that is trained on against small changes of its input (adversarial training), for detectors with
    view ``hardened``. It learns the classifier's answers; labels are not asked for."""

    eps: Annotated[float, Field(gt=0, le=1)]
    """each image is changed by up to a share of this, drawn from [0, 1], in every pixel: one and a half times the changes to be seen"""
    epochs: Positive = 4
    batch_size: Positive = 128
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    mixed_precision: bool = False
    """train with bfloat16 convolutions, as for the classifier"""


class MemorySpec(Section):
    """Stateful detection (Chen, Carlini and Wagner 2019): the scorer remembers recent inputs, and one that many of them nearly repeat is
    malicious whatever its score, as are the questions of an attacker who searches with the guard's answers. How near that is comes from
    clean images, of which a thousandth may be taken for repeats. The very same image again and again is no repeat; frames of a camera
    that stands still are. The memory is everybody's: a search with ``size / neighbours`` other inputs between its questions goes unseen."""

    size: Annotated[int, Field(ge=1, le=100_000)] = 4096
    """inputs that each instance of the scorer remembers"""
    neighbours: Annotated[int, Field(ge=2)] = 10
    """how many recent inputs have to be nearly the same for another to be malicious"""

    @model_validator(mode="after")
    def _can_be_reached(self) -> MemorySpec:
        if self.neighbours > self.size:
            raise ValueError(f"memory: {self.neighbours} neighbours cannot be found among {self.size} inputs; at most size will do")
        return self


class EngineOptions(Section):
    """How TensorRT plans are built."""

    optimum: Positive = 32
    """batch size that a plan is tuned for; it takes every one from 1 to the guard's largest"""
    level: Annotated[int, Field(ge=0, le=5)] = 3
    """builder optimisation level: higher builds longer for a faster plan"""
    workspace_megabytes: Positive = 1024
    any_ampere_or_newer: bool = False
    """one plan for every GPU from Ampere on, at some cost in speed"""
    version_compatible: bool = False
    """a plan that later TensorRT versions of the same major release load"""


def depended_on(section: ClassifierSpec | AutoencoderSpec | HardenedSpec) -> dict[str, Any]:
    """What a training depends on, as the workbench keeps it: switches that are off are left out, so that a new one spoils nothing kept."""
    return {name: value for name, value in section.model_dump(mode="json").items() if value is not False}


class ServingSpec(Section):
    layout: Literal["staged", "fused", "single", "graph"] = "fused"
    """``fused``: the autoencoder stage also makes the classifier passes of the noise and the reconstruction, in one pass over both; the
    image's pass stays a stage of its own, for requests that want only the label. ``staged``: the classifier stage makes every pass; clients
    that give up can end a Triton before 26.05 that serves it. ``single``: the guard is no ensemble but one model that does all of it in one
    process, on the CPU, with one compute thread (an image alone takes a second): give it an instance for each core; its stages stay in the
    repository as models of their own. ``graph``: the scorer stage is one ONNX graph of everything, on the CPU, which Triton's own
    ONNX Runtime backend runs without any Python; requests that want only the label go to the classifier stage"""
    input: Literal["float32", "uint8"] = "float32"
    """what clients send as IMAGE: floats in [0, 1], or bytes, which the graphs divide by 255; a quarter of the traffic"""
    max_batch_size: Count = 64
    queue_delay_microseconds: CountOrNone = 0
    """how long Triton's dynamic batcher waits for more requests"""
    scorer_delay_microseconds: CountOrNone = 0
    """the same for the scorer stage: the requests of one network batch arrive one after the other"""
    preferred_batch_size: CountOrNone = 0
    """images of different requests that a batch of the networks is made of where more are waiting, so that the instances share what waits;
    0: as many as `max_batch_size`"""
    instances: Count = 2
    """copies of each network stage, or of a guard in one process or graph, on each GPU or on the CPU, where each has one compute thread"""
    max_queue_size: CountOrNone = 0
    """requests that may wait for a guard in one process; more are refused at once. 0: any number"""

    @model_validator(mode="after")
    def _preferred_batches_are_taken(self) -> ServingSpec:
        if self.preferred_batch_size > self.max_batch_size:
            raise ValueError(
                f"serving.preferred_batch_size = {self.preferred_batch_size} is above max_batch_size = {self.max_batch_size}; "
                "prefer smaller batches or allow larger ones"
            )
        return self

    @property
    def is_one_model(self) -> bool:
        """Whether one model makes everything, instead of stages that wait for each other."""
        return self.layout in ("single", "graph")


class GuardSpec(Section):
    """Everything that a guard is built from."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
    release: Positive = 1
    target_fpr: Share = 0.01
    """alpha: the share of clean inputs that may be called malicious"""
    seed: Annotated[int, Field(ge=0)] = 0
    runtime: Literal["onnxruntime", "tensorrt"] = "onnxruntime"
    """``tensorrt`` compiles the network stages on the GPU of the machine that builds"""
    precision: Precision = "fp32"
    """written into the network stages' graphs"""
    stage_precision: dict[Stage, Precision] = {}
    """other precision for one stage; passes of the classifier's copies are part of the autoencoder stage"""
    compare: tuple[Precision, ...] = ()
    """precisions that are built and measured beside the one that serves"""
    int8_calibration: Calibration = "entropy"
    """how int8 ranges are taken from clean images"""
    natural_noise_sd: Deviation = 0.0
    """clean images are fitted and calibrated half as they are, half with sensor noise of a deviation drawn from [0, this]"""
    noise_levels: Annotated[int, Field(ge=1, le=16)] = 1
    """each input is compared with natural images of its own noise level, one of this many; 1 is the published method"""
    audit: Literal["off", "warn", "require"] = "off"
    """whether the classifier is searched for a backdoor (BAN) before the guard is built, and whether one stops the build"""
    fusion: Literal["fisher", "tippett"] = "fisher"
    """how detectors are combined: ``fisher`` adds their surprisals, ``tippett`` takes the largest; with ``fisher`` too the larger of a
    ``confidence``'s and of the others' sum counts, as it looks for other inputs than they do, and those of view ``hardened`` are each added
    to that, as much as all others together, for they ask another network"""
    data: DataSpec
    classifier: ClassifierSpec
    autoencoder: AutoencoderSpec
    detectors: Annotated[tuple[DetectorSpec, ...], Field(min_length=1)]
    attacks: tuple[Annotated[str, Field(pattern=r"^(fgsm|pgd|square)-(0?\.\d*[1-9]\d*|1)$")], ...] = ()
    """what the card reports, as method-epsilon: ``fgsm`` and ``pgd`` use the classifier's gradients, ``square`` only its answers; where
    left out, FGSM and PGD, and Square for an ONNX classifier, which has no gradients"""
    hardened: HardenedSpec | None = None
    """goes with detectors of view ``hardened``"""
    memory: MemorySpec | None = None
    """left out: a verdict depends on its input alone"""
    tensorrt: EngineOptions = EngineOptions()
    serving: ServingSpec = ServingSpec()

    @model_validator(mode="after")
    def _attacks_fit_the_classifier(self) -> GuardSpec:
        needs_gradients = [name for name in self.attacks if not name.startswith("square")]
        if self.classifier.kind == "onnx" and needs_gradients:
            raise ValueError(
                f"attacks: {', '.join(needs_gradients)} need gradients, which an ONNX classifier does not give; use square-EPS, "
                "or give the PyTorch module with classifier.factory"
            )
        return self

    @model_validator(mode="after")
    def _hardened_for_those_who_look(self) -> GuardSpec:
        if (self.hardened is not None) != ("hardened" in self.copies):
            raise ValueError(
                "hardened: a section [hardened] goes with detectors of view 'hardened', and they with it; "
                f"there is {'a' if self.hardened else 'no'} section and {'such a' if 'hardened' in self.copies else 'no such'} detector"
            )
        return self

    @model_validator(mode="after")
    def _bytes_only_for_images(self) -> GuardSpec:
        if self.serving.input == "uint8" and self.serving.layout == "staged":
            raise ValueError(
                "serving.input = 'uint8' goes with layout 'fused', 'single' or 'graph': a staged classifier is fed noise too, in floats"
            )
        if self.serving.input == "uint8" and self.runtime != "onnxruntime":
            raise ValueError("serving.input = 'uint8' goes with runtime = 'onnxruntime'; TensorRT stages take floats")
        return self

    @model_validator(mode="after")
    def _one_model_without_plans(self) -> GuardSpec:
        if self.serving.is_one_model and self.runtime != "onnxruntime":
            raise ValueError(
                f"serving.layout = {self.serving.layout!r} goes with runtime = 'onnxruntime'; TensorRT stages are staged or fused"
            )
        return self

    @model_validator(mode="after")
    def _no_memory_in_a_graph(self) -> GuardSpec:
        if self.serving.layout == "graph" and self.memory:
            raise ValueError("serving.layout = 'graph' goes without [memory]: a graph remembers nothing; serve the guard single or fused")
        return self

    @model_validator(mode="after")
    def _no_stage_refuses_requests(self) -> GuardSpec:
        if self.serving.max_queue_size and self.serving.layout != "single":
            raise ValueError(
                f"serving.max_queue_size = {self.serving.max_queue_size} goes with layout 'single': a full queue of an ensemble's stage "
                "can end Triton 24.10 (docs/known-issues.md)"
            )
        return self

    @property
    def noise_source(self) -> str:
        """The tensor that the noise pass feeds to the classifier stage.

        A classifier that subtracts a mean gets the noise with that mean added: n / std detects better than (n - mean) / std, which moves
        every noise by the same constant (docs/noise-of-a-normalising-classifier.md).
        """
        subtracts = any(self.classifier.preprocessing.mean) and any(detector.view == "noise" for detector in self.detectors)
        return contract.NOISE_INPUT if subtracts else contract.NOISE

    @property
    def autoencoder_outputs(self) -> tuple[str, ...]:
        """What the autoencoder stage answers."""
        return (*contract.AUTOENCODER_OUTPUTS, *(() if self.noise_source == contract.NOISE else (self.noise_source,)))

    @property
    def copies(self) -> tuple[contract.Pass, ...]:
        """Passes of changed copies of the classifier, which the autoencoder stage makes."""
        needed = {name for detector in self.detectors for name in contract.VIEWS[detector.view]}
        return tuple(one for one in contract.COPIES if one in needed)

    @property
    def needs_head(self) -> bool:
        """Whether a detector reads the predicted class."""
        return any(detector.kind in WITH_HEAD for detector in self.detectors)

    def precision_of(self, stage: Stage) -> Precision:
        """The precision in which a stage serves."""
        return self.stage_precision.get(stage, self.precision)

    @model_validator(mode="after")
    def _enough_for_int8(self) -> GuardSpec:
        asked = {self.precision, *self.stage_precision.values(), *self.compare}
        if "int8" in asked and self.data.fit < INT8_IMAGES:
            raise ValueError(f"data.fit is {self.data.fit}: int8 takes its ranges from {INT8_IMAGES} clean images; give more")
        return self

    @model_validator(mode="after")
    def _enough_to_calibrate(self) -> GuardSpec:
        needed = math.ceil(1 / self.target_fpr) - 1
        if self.data.calibrate < needed:
            raise ValueError(
                f"data.calibrate is {self.data.calibrate}: a false-positive rate of {self.target_fpr} needs at least {needed} "
                "calibration images"
            )
        names = [detector.name for detector in self.detectors]
        if len(set(names)) != len(names):
            raise ValueError(f"detectors: listed twice: {sorted({name for name in names if names.count(name) > 1})}")
        return self


def read_spec(path: Path) -> GuardSpec:
    """Read and validate a guard's TOML file.

    Raises:
        NoisecError: the file is missing, is no TOML, or a value is wrong; every wrong value is named.
    """
    if not path.is_file():
        raise NoisecError(f"{path}: no such file; reference guards: {', '.join(p.name for p in sorted(GUARDS.glob('*.toml')))} in {GUARDS}")
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise NoisecError(f"{path}: not TOML: {error}") from error
    spec = _validated(content, f"{path}: not a guard's specification")
    return spec.model_copy(
        update={
            "data": spec.data.model_copy(update=_beside(path, spec.data, "path")),
            "classifier": spec.classifier.model_copy(update=_beside(path, spec.classifier, "onnx", "weights")),
        }
    )


def changed(spec: GuardSpec, **values: Any) -> GuardSpec:
    """The specification with other values.

    Raises:
        NoisecError: they do not go with the rest of it.
    """
    return _validated({**dict(spec), **values}, f"{spec.name} cannot be changed so")


def spec_of(content: Mapping[str, Any]) -> GuardSpec:
    """The specification in a manifest.

    Raises:
        NoisecError: this version does not know it.
    """
    return _validated(content["spec"], f"{content['guard']} release {content['release']}: not a specification of this version of noisec")


def _validated(content: Mapping[str, Any], refusal: str) -> GuardSpec:
    try:
        return GuardSpec.model_validate(content)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or 'guard'}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise NoisecError(f"{refusal}:\n" + "\n".join(lines)) from error


def _beside(toml: Path, section: Section, *names: str) -> dict[str, Path]:
    """The paths of a section: variables of the environment expanded, relative ones taken from the TOML file's folder."""
    return {name: toml.parent / os.path.expandvars(value) for name in names if (value := getattr(section, name)) is not None}


GUARDS = Path(__file__).parent / "guards"
"""where the reference guards' TOML files lie"""
