"""The TOML file that describes a guard, validated."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from noisec.contract import View
from noisec.errors import NoisecError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Deviation = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSpec(Section):
    """Clean, labelled images, cut into four disjoint sets."""

    source: Literal["fashion-mnist", "fashion-mnist-test", "npz"]
    """``fashion-mnist``: the official 60,000 + 10,000; ``fashion-mnist-test``: the 10,000 that ship with the package"""
    path: Path | None = None
    """of the ``npz``: images and labels, optionally test_images and test_labels; relative to the TOML file"""
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
    def _path_belongs_to_npz(self) -> DataSpec:
        if (self.source == "npz") != (self.path is not None):
            raise ValueError(f"data.path goes with source = 'npz' and with no other; source is {self.source!r}, path is {self.path}")
        return self


class BackdoorSpec(Section):
    """BadNets (Gu et al. 2017): stamp a white corner patch on a share of the training images and relabel them."""

    target: Annotated[int, Field(ge=0)] = 0
    share: Share = 0.05


class ClassifierSpec(Section):
    """A reference classifier, trained from scratch."""

    network: Literal["conv3", "conv6"]
    epochs: Positive
    batch_size: Positive = 128
    learning_rate: Annotated[float, Field(gt=0)] = 4e-3
    backdoor: BackdoorSpec | None = None


class AutoencoderSpec(Section):
    """The denoiser: trained on clean images to undo random corruption (NoiSec section 4.1)."""

    network: Literal["unet", "unet-small", "bottleneck"] = "unet"
    epochs: Positive
    batch_size: Positive = 64
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    noise_sd: Annotated[float, Field(gt=0, le=1)] = 0.15
    """the training noise has a standard deviation drawn from [0, noise_sd] for each image"""
    patches: Annotated[float, Field(ge=0, le=1)] = 0.0
    """share of the training images that also get a small random patch, so that the denoiser learns to remove triggers"""


class DetectorSpec(Section):
    """One Gaussian mixture on one view."""

    view: View
    """``noise``: F(n), as published; ``delta``: F(x) - F(A(x)); ``image``: F(x)"""
    components: Positive = 1
    """Gaussians in each mixture; the paper uses one"""

    @property
    def name(self) -> str:
        return f"{self.view}-{self.components}"


class ServingSpec(Section):
    max_batch_size: Positive = 64
    queue_delay_microseconds: Annotated[int, Field(ge=0)] = 0
    """how long Triton's dynamic batcher waits for more requests"""


class GuardSpec(Section):
    """Everything that a guard is built from."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
    release: Positive = 1
    target_fpr: Share = 0.01
    """alpha: the share of clean inputs that may be called malicious"""
    seed: Annotated[int, Field(ge=0)] = 0
    runtime: Literal["onnxruntime"] = "onnxruntime"
    precision: Literal["fp32"] = "fp32"
    natural_noise_sd: Deviation = 0.0
    """clean images are fitted and calibrated half as they are, half with sensor noise of a deviation drawn from [0, this]"""
    noise_levels: Annotated[int, Field(ge=1, le=16)] = 1
    """each input is compared with natural images of its own noise level, one of this many; 1 is the published method"""
    data: DataSpec
    classifier: ClassifierSpec
    autoencoder: AutoencoderSpec
    detectors: Annotated[tuple[DetectorSpec, ...], Field(min_length=1)]
    serving: ServingSpec = ServingSpec()

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
    try:
        spec = GuardSpec.model_validate(content)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or 'guard'}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise NoisecError(f"{path}: not a guard's specification:\n" + "\n".join(lines)) from error
    if spec.data.path is not None and not spec.data.path.is_absolute():
        data = spec.data.model_copy(update={"path": path.parent / spec.data.path})
        spec = spec.model_copy(update={"data": data})
    return spec


GUARDS = Path(__file__).parent / "guards"
"""where the reference guards' TOML files lie"""
