"""Tuning measures settings on the real server, keeps to its budget, and changes settings alone."""

from __future__ import annotations

import shutil
import time

import pytest
from conftest import GUARD, REPOSITORY

from noisec import manifest
from noisec.benchmarks.throughput import tuning
from noisec.benchmarks.throughput.load import Load
from noisec.benchmarks.throughput.tuning import Trial, Wish, axes, memories, tune, tuning_rows, without_effect
from noisec.builders.layout import rearrange
from noisec.builders.repository import read_config
from noisec.builders.spec import GuardSpec, MemorySpec, ServingSpec, changed
from noisec.errors import NoisecError


def load(per_second: float, p99: float = 3.0) -> Load:
    return Load(10, 10, 1.0, per_second, 1.0, 2.0, p99, 0)


def trial(gain: float, p99: float) -> Trial:
    return Trial(ServingSpec(), load(10 * gain, p99), gain)


def test_a_sweep_keeps_to_its_budget_and_leaves_the_repository_alone(tmp_path):
    start = time.monotonic()
    found = tune(REPOSITORY, GUARD, Wish("throughput", 2, 4, None), 12, tmp_path, 0.3)
    assert time.monotonic() - start < 60
    assert not found.complete
    assert [one.serving.layout for one in found.trials[:2]] == ["fused", "single"]
    assert all(one.load.failed == 0 and one.load.per_second > 0 for one in found.trials)
    assert found.best in found.trials
    assert manifest.verify_repository(REPOSITORY) == []
    assert len(tuning_rows(found)[1]) == len(found.trials)


def test_of_two_turns_the_slower_one_counts():
    rates = {"present": iter((100.0, 100.0)), "other": iter((150.0, 120.0))}
    found = tuning._in_turns(lambda url: load(next(rates[url])), ServingSpec(), "present", "other")
    assert found.load.per_second == 120
    assert found.gain == pytest.approx(1.35)


def test_every_axis_leaves_out_the_present_value():
    layouts, instances, preferred, _, _, largest = axes(ServingSpec(layout="staged"), "onnxruntime", 4, 1)
    assert layouts == [{"layout": "fused"}, *({"layout": layout, "instances": 4} for layout in ("fused", "single", "graph"))]
    assert instances == [{"instances": 1}, {"instances": 4}]
    assert preferred == [{"preferred_batch_size": 4}, {"preferred_batch_size": 8}]
    assert largest == [{"max_batch_size": 16}, {"max_batch_size": 128}]
    assert axes(ServingSpec(instances=1), "tensorrt", 4, 1)[0] == [{"instances": 2}, {"instances": 4}]
    remembering = axes(ServingSpec(layout="fused", instances=4), "onnxruntime", 4, 1, remembers=True)
    assert remembering[0] == [{"layout": "single", "instances": 4}], "a graph has no memory"
    assert axes(ServingSpec(), "tensorrt", 2, 1)[-1] == [{"max_batch_size": 16}], "a plan takes no larger batches"
    assert axes(ServingSpec(), "onnxruntime", 2, 32)[-1] == [{"max_batch_size": 32}, {"max_batch_size": 128}]


def test_what_has_no_effect_is_not_measured():
    delay = {"scorer_delay_microseconds": 100}
    assert without_effect(ServingSpec(layout="single"), delay)
    assert without_effect(ServingSpec(layout="graph"), delay)
    assert not without_effect(ServingSpec(layout="single"), {"queue_delay_microseconds": 100})
    assert not without_effect(ServingSpec(layout="fused"), delay)
    assert without_effect(ServingSpec(max_batch_size=8, preferred_batch_size=8), {"preferred_batch_size": 8})
    assert not without_effect(ServingSpec(max_batch_size=8, preferred_batch_size=4), {"preferred_batch_size": 4})


def test_several_processes_with_a_memory_each_are_told_of(spec):
    single = ServingSpec(layout="single", instances=2)
    remembering = changed(spec, memory=MemorySpec())
    assert "a search by queries goes on about 2 times as long" in memories(remembering, single)
    assert memories(spec, single) == ""
    for serving in (ServingSpec(layout="single", instances=1), ServingSpec(layout="fused", instances=2)):
        assert memories(remembering, serving) == ""


def test_a_setting_within_the_bound_beats_every_one_outside():
    wish = Wish("latency", 1, 1, 5.0)
    assert wish.beats(trial(0.5, 4.0), trial(2.0, 6.0))
    assert wish.beats(trial(1.0, 6.0), trial(2.0, 9.0))
    assert not wish.beats(trial(1.01, 4.0), trial(1.0, 4.0))
    assert Wish("throughput", 1, 1, None).beats(trial(1.5, 100.0), trial(1.0, 1.0))


def test_a_bound_and_a_batch_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(NoisecError, match="goes with --goal latency"):
        Wish("throughput", 1, 1, 5.0)
    with pytest.raises(NoisecError, match="takes at most 64 images"):
        tune(REPOSITORY, GUARD, Wish("throughput", 1, 65, None), 1, tmp_path)


def test_a_setting_that_does_not_run_here_spoils_no_other(tmp_path, monkeypatch, capsys):
    whole = tuning.served

    def served(target, serving):
        if serving.layout == "single":
            raise NoisecError("no room for it")
        return whole(target, serving)

    monkeypatch.setattr(tuning, "served", served)
    monkeypatch.setattr(tuning, "axes", lambda *given, remembers: [[{"layout": "single"}]])
    found = tune(REPOSITORY, GUARD, Wish("throughput", 1, 1, None), 30, tmp_path, 0.2)
    assert len(found.trials) == 1
    assert found.complete
    assert "'single'} does not run here: no room for it" in " ".join(capsys.readouterr().err.split())


def test_settings_are_written_into_a_repository_and_its_manifest(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(REPOSITORY, copy)
    serving = ServingSpec(layout="fused", instances=2, queue_delay_microseconds=200, scorer_delay_microseconds=100, max_batch_size=32)
    rearrange(copy, GUARD, serving, copy)
    assert manifest.verify_repository(copy) == []
    content = manifest.read_manifest(copy, GUARD)
    assert GuardSpec.model_validate(content["spec"]).serving == serving
    assert content["figures"] == manifest.read_manifest(REPOSITORY, GUARD)["figures"]
    network, scorer = (read_config(copy / f"{GUARD}_{stage}") for stage in ("autoencoder", "scorer"))
    assert (network.instance_group[0].count, network.max_batch_size) == (2, 32)
    delays = [config.dynamic_batching.max_queue_delay_microseconds for config in (network, scorer)]
    assert delays == [200, 100]
