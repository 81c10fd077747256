"""Stages and scorer -> a Triton model repository, with complete configurations."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as triton

from noisec import contract
from noisec.builders.graphs import save_model
from noisec.builders.onegraph import guard_graph, process_graphs
from noisec.builders.passes import own_passes, passes_needed, scorer_inputs
from noisec.builders.spec import GuardSpec
from noisec.contract import stage_model
from noisec.manifest import CONFIG, UNFINISHED, manifest_path
from noisec.python_backend.runtimes.tensorrt.names import graph_sizes
from noisec.python_backend.scorer import scoring

SCORER_CODE = Path(scoring.__file__).parent
NO_PLANS: Mapping[str, str] = MappingProxyType({})
SCORING_FILES = tuple(SCORER_CODE / name for name in ("scoring.py", "detectors.py", "memory.py", "batching.py"))
SCORER_FILES = (SCORER_CODE / "model.py", *SCORING_FILES)
GUARD_FILES = (*(SCORER_CODE / name for name in ("single.py", "guard.py", "session.py")), *SCORING_FILES)
"""code of a guard in one process"""


@dataclass(frozen=True)
class Widths:
    """Sizes that the configurations state."""

    shape: tuple[int, int, int]
    classes: int
    features: int


def _tensor(name: str, dims: tuple[int, ...], kind: str = "TYPE_FP32") -> dict[str, object]:
    return {"name": name, "data_type": getattr(triton, kind), "dims": dims}


def _image(spec: GuardSpec, widths: Widths) -> dict[str, object]:
    return _tensor(contract.IMAGE, widths.shape, {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8"}[spec.serving.input])


def network_config(spec: GuardSpec, stage: str, widths: Widths, plans: Mapping[str, str] = NO_PLANS) -> triton.ModelConfig:
    """Configuration of the ``autoencoder`` or ``classifier`` stage.

    Args:
        plans: compute capability -> TensorRT plan; empty for the ONNX runtime
    """
    outputs = {
        "autoencoder": [
            _tensor(contract.NOISE, widths.shape),
            _tensor(contract.RECONSTRUCTION, widths.shape),
            _tensor(contract.NOISE_LEVEL, (1,)),
            _tensor(contract.IN_RANGE, (1,)),
            *(_tensor(name, widths.shape) for name in spec.autoencoder_outputs if name == contract.NOISE_INPUT),
            *(_tensor(contract.PASSES[one], (widths.features,)) for one in own_passes(spec)),
        ],
        "classifier": [_tensor(contract.LOGITS, (widths.classes,)), _tensor(contract.PENULTIMATE, (widths.features,))],
    }
    config = triton.ModelConfig(
        name=stage_model(spec.name, stage),
        max_batch_size=spec.serving.max_batch_size,
        input=[_image(spec, widths)],
        output=outputs[stage],
        dynamic_batching=_batching(spec),
    )
    config.MergeFrom(_for_tensorrt(spec, widths, plans) if plans else _for_onnxruntime())
    config.instance_group.add(count=spec.serving.instances, kind=triton.ModelInstanceGroup.KIND_AUTO)
    return config


def _batching(spec: GuardSpec) -> triton.ModelDynamicBatching:
    """How requests wait for the networks."""
    found = triton.ModelDynamicBatching(max_queue_delay_microseconds=spec.serving.queue_delay_microseconds)
    if spec.serving.preferred_batch_size:
        found.preferred_batch_size.append(spec.serving.preferred_batch_size)
    if spec.serving.max_queue_size:
        found.default_queue_policy.max_queue_size = spec.serving.max_queue_size
    return found


def _for_onnxruntime() -> triton.ModelConfig:
    """What an ONNX model has besides. One thread on the CPU: the native backend would give each instance one for every core, which wait in
    loops for work and take the cores from each other."""
    one = {"intra_op_thread_count": {"string_value": "1"}, "inter_op_thread_count": {"string_value": "1"}}
    return triton.ModelConfig(backend="onnxruntime", default_model_filename="model.onnx", parameters=one)


def _for_tensorrt(spec: GuardSpec, widths: Widths, plans: Mapping[str, str]) -> triton.ModelConfig:
    """What a TensorRT stage has besides: its plans, a CUDA graph for every power of two up to the largest batch, pinned memory, warm-up."""
    largest = spec.serving.max_batch_size
    graphs = [{"batch_size": size, "input": {contract.IMAGE: {"dim": widths.shape}}} for size in graph_sizes(largest)]
    zeros = {contract.IMAGE: {"data_type": triton.TYPE_FP32, "dims": widths.shape, "zero_data": True}}
    return triton.ModelConfig(
        backend="tensorrt",
        default_model_filename=next(iter(plans.values())),
        cc_model_filenames=plans,
        optimization={
            "cuda": {"graphs": True, "graph_spec": graphs},
            "input_pinned_memory": {"enable": True},
            "output_pinned_memory": {"enable": True},
        },
        parameters={"FORCE_CPU_ONLY_INPUT_TENSORS": {"string_value": "no"}},  # read by the stand-in backend, ignored by the native one
        model_warmup=[{"name": f"batch of {size}", "batch_size": size, "inputs": zeros} for size in (1, largest)],
    )


def scorer_config(spec: GuardSpec, widths: Widths) -> triton.ModelConfig:
    """Configuration of the scorer stage; of one that is the whole guard in one graph, where the layout says so."""
    if spec.serving.layout == "graph":
        return _graph_config(spec, widths)
    features = [_tensor(name, (widths.features,)) for name in scorer_inputs(spec)]
    return triton.ModelConfig(
        name=stage_model(spec.name, "scorer"),
        backend="python",
        default_model_filename="model.py",
        max_batch_size=spec.serving.max_batch_size,
        input=[*features, _tensor(contract.NOISE_LEVEL, (1,)), _tensor(contract.IN_RANGE, (1,))],
        output=_verdict(),
        dynamic_batching={"max_queue_delay_microseconds": spec.serving.scorer_delay_microseconds},
        instance_group=[{"count": 1, "kind": triton.ModelInstanceGroup.KIND_CPU}],
    )


def _graph_config(spec: GuardSpec, widths: Widths) -> triton.ModelConfig:
    config = _for_onnxruntime()
    config.MergeFrom(
        triton.ModelConfig(
            name=stage_model(spec.name, "scorer"),
            max_batch_size=spec.serving.max_batch_size,
            input=[_image(spec, widths)],
            output=_answers(widths),
            dynamic_batching=_batching(spec),
            instance_group=[{"count": spec.serving.instances, "kind": triton.ModelInstanceGroup.KIND_CPU}],
        )
    )
    return config


def _answers(widths: Widths) -> list[dict[str, object]]:
    """What a guard answers."""
    return [_tensor(contract.LOGITS, (widths.classes,)), *_verdict()]


def _verdict() -> list[dict[str, object]]:
    kinds = {contract.IS_MALICIOUS: "TYPE_BOOL", contract.RELEASE: "TYPE_INT32"}
    return [_tensor(name, (1,), kinds.get(name, "TYPE_FP32")) for name in contract.VERDICT]


def guard_config(spec: GuardSpec, widths: Widths, class_names: tuple[str, ...]) -> triton.ModelConfig:
    """Configuration of the guard itself: an ensemble of its stages, or one model that does without them.

    One graph makes all that it makes for every request: clients that want only labels are told to ask the classifier stage. Its ensemble of
    one step is for requests that claim to be empty batches: Triton's own ONNX Runtime backend fails those that it joins with one.
    """
    config = triton.ModelConfig(
        name=spec.name,
        max_batch_size=spec.serving.max_batch_size,
        input=[_image(spec, widths)],
        output=_answers(widths),
        parameters={"class_names": {"string_value": "\n".join(class_names)}},
    )
    if spec.serving.layout == "single":
        config.backend, config.default_model_filename = "python", "single.py"
        config.dynamic_batching.CopyFrom(_batching(spec))
        config.instance_group.add(count=spec.serving.instances, kind=triton.ModelInstanceGroup.KIND_CPU)
        return config
    config.platform = "ensemble"
    config.ensemble_scheduling.step.extend(ensemble_steps(spec))
    if spec.serving.layout == "graph":
        config.parameters[contract.LABEL_MODEL].string_value = stage_model(spec.name, "classifier")
    return config


def ensemble_steps(spec: GuardSpec) -> list[triton.ModelEnsembling.Step]:
    """The steps of the ensemble. Every output is a leaf, and every step is pinned to the release."""
    step = triton.ModelEnsembling.Step
    autoencoder, classifier, scorer = (stage_model(spec.name, stage) for stage in contract.STAGES)
    if spec.serving.layout == "graph":
        answers = {name: name for name in contract.OUTPUTS}
        return [step(model_name=scorer, model_version=spec.release, input_map={contract.IMAGE: contract.IMAGE}, output_map=answers)]
    views = scorer_inputs(spec)
    source = {"image": contract.IMAGE, "noise": spec.noise_source, "reconstruction": contract.RECONSTRUCTION}
    own = own_passes(spec)
    made = [contract.PASSES[one] if one in own else source[one] for one in passes_needed(spec) if one != "image"]
    used = {name: name for name in made}
    flags = {contract.NOISE_LEVEL: contract.NOISE_LEVEL, contract.IN_RANGE: contract.IN_RANGE}
    steps = [
        step(model_name=autoencoder, model_version=spec.release, input_map={contract.IMAGE: contract.IMAGE}, output_map={**used, **flags})
    ]
    for one in (one for one in passes_needed(spec) if one not in own):
        outputs = {contract.LOGITS: contract.LOGITS} if one == "image" else {}
        if contract.PASSES[one] in views:
            outputs[contract.PENULTIMATE] = contract.PASSES[one]
        steps.append(step(model_name=classifier, model_version=spec.release, input_map={contract.IMAGE: source[one]}, output_map=outputs))
    steps.append(
        step(
            model_name=scorer,
            model_version=spec.release,
            input_map={**{name: name for name in views}, **flags},
            output_map={name: name for name in contract.VERDICT},
        )
    )
    return steps


def write_repository(
    repository: Path,
    spec: GuardSpec,
    widths: Widths,
    class_names: tuple[str, ...],
    stages: Mapping[str, Path],
    scorer: scoring.Scorer,
    plans: Mapping[str, str] = NO_PLANS,
) -> None:
    """Write every model of the guard, replacing an earlier build of the same release; other releases and guards stay.

    Everything is written beside the models first, and then put into its place: whatever fails before, such as a disk that is full,
    leaves the repository as it was. The release's manifest goes first and comes back last, so that a release that was put half into its
    place is known for one. Releases share their stages' configurations: one whose tensors or files differ from those of the older releases
    is the only one that is served from then on.

    Args:
        stages: ``autoencoder`` and ``classifier`` -> folder with ``model.onnx`` and, where it has any, its external data and plans
        plans: compute capability -> name of the TensorRT plan in every stage's folder; empty for the ONNX runtime
    """
    own, created = repository / spec.name, not repository.exists()
    own.mkdir(parents=True, exist_ok=True)
    for left in own.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left)
    try:
        with tempfile.TemporaryDirectory(dir=own, prefix=UNFINISHED) as place:
            new = Path(place, "new")
            for stage in contract.STAGES:
                config = scorer_config(spec, widths) if stage == "scorer" else network_config(spec, stage, widths, plans)
                config.version_policy.CopyFrom(served_versions(repository / config.name, config, spec.release))
                folder = _new_version(new, config, spec.release)
                if stage == "scorer":
                    _write_scorer(folder, spec, stages, scorer)
                else:
                    _copy(_network_files(stages[stage]), folder)
            folder = _new_version(new, guard_config(spec, widths, class_names), spec.release)
            if spec.serving.layout == "single":
                _write_single(folder, spec, stages, scorer)
            manifest_path(repository, spec.name, spec.release).unlink(missing_ok=True)
            for model in sorted(new.iterdir()):
                _put_in_place(model, repository / model.name, Path(place, "former"))
    except BaseException:
        with suppress(OSError):  # a guard that is new leaves no empty folder
            own.rmdir()
            if created:
                repository.rmdir()
        raise


def _write_scorer(folder: Path, spec: GuardSpec, stages: Mapping[str, Path], scorer: scoring.Scorer) -> None:
    """What the scorer stage runs: its code and arrays, or one graph of the whole guard, beside the arrays that it was made of."""
    scorer.save(folder / "scorer.npz")
    if spec.serving.layout == "graph":
        save_model(guard_graph(spec, stages, scorer), folder)
    else:
        _copy(SCORER_FILES, folder)


def _write_single(folder: Path, spec: GuardSpec, stages: Mapping[str, Path], scorer: scoring.Scorer) -> None:
    """What a guard in one process runs: its code and its scorer, and below it the networks' graphs and the scorer's."""
    _copy(GUARD_FILES, folder)
    scorer.save(folder / "scorer.npz")
    arranged = process_graphs(spec, stages, scorer)
    for name in {*stages, *arranged}:
        (folder / name).mkdir()
    for name, graph in arranged.items():
        save_model(graph, folder / name)
    for stage in stages.keys() - arranged:
        _copy(_network_files(stages[stage]), folder / stage)


def _copy(files: Iterable[Path], folder: Path) -> None:
    for path in files:
        shutil.copyfile(path, folder / path.name)


def _network_files(folder: Path) -> list[Path]:
    """A network stage's graph, and its external data and plans where it has any."""
    return sorted(folder.glob("model*"))


def served_versions(model: Path, config: triton.ModelConfig, release: int) -> triton.ModelVersionPolicy:
    """Which versions of a stage Triton keeps loaded: all of them while one configuration fits them, so that one release follows the other
    without a gap; else this one and those since it changed."""
    everything = triton.ModelVersionPolicy(all={})
    others = [path for path in model.glob("[0-9]*") if path.name != str(release)]
    if not others or not (model / CONFIG).is_file():
        return everything
    old = read_config(model)
    if _bound(old) != _bound(config):
        return triton.ModelVersionPolicy(specific={"versions": [release]})
    if old.version_policy.WhichOneof("policy_choice") == "specific":
        return triton.ModelVersionPolicy(specific={"versions": sorted({*old.version_policy.specific.versions, release})})
    return everything


def _bound(config: triton.ModelConfig) -> tuple[object, ...]:
    """What every version of a stage has to go with: tensors and files, and the largest batch where plans are made for one."""
    files = config.default_model_filename, dict(config.cc_model_filenames)
    return list(config.input), list(config.output), config.backend, files, config.max_batch_size if config.cc_model_filenames else 0


def read_config(model: Path) -> triton.ModelConfig:
    """A model's configuration."""
    return text_format.Parse((model / CONFIG).read_text(), triton.ModelConfig())


def read_widths(repository: Path, guard: str) -> tuple[Widths, tuple[str, ...]]:
    """Sizes and class names of a guard, from its configurations."""
    ensemble, classifier = read_config(repository / guard), read_config(repository / stage_model(guard, "classifier"))
    sizes = {output.name: int(output.dims[0]) for output in classifier.output}
    channels, height, width = (int(size) for size in ensemble.input[0].dims)
    names = tuple(ensemble.parameters["class_names"].string_value.split("\n"))
    return Widths((channels, height, width), sizes[contract.LOGITS], sizes[contract.PENULTIMATE]), names


def read_plans(repository: Path, guard: str) -> dict[str, str]:
    """Compute capability -> TensorRT plan of the guard's newest release; empty where it serves ONNX."""
    return dict(read_config(repository / stage_model(guard, "classifier")).cc_model_filenames)


def _new_version(new: Path, config: triton.ModelConfig, release: int) -> Path:
    """The empty version folder of a model that has its configuration, below ``new``."""
    folder = new / str(config.name) / str(release)
    folder.mkdir(parents=True)
    (folder.parent / CONFIG).write_text(text_format.MessageToString(config))
    return folder


def _put_in_place(new: Path, model: Path, former: Path) -> None:
    """Move a model's new version folder and configuration to where they are served from, and those that were there to ``former``."""
    model.mkdir(exist_ok=True)
    for entry in sorted(new.iterdir(), reverse=True):  # the configuration first: it fits the former versions as well
        target = model / entry.name
        if target.is_dir():
            (former / model.name).mkdir(parents=True)
            target.rename(former / model.name / entry.name)
        entry.replace(target)
