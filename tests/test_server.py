"""The embedded server starts, says why it cannot, and leaves nothing behind."""

from __future__ import annotations

import py_compile
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import GUARD, REPOSITORY

from noisec.builders.layout import rearrange
from noisec.builders.spec import ServingSpec
from noisec.clients import GuardClient
from noisec.contract import stage_model
from noisec.errors import NoisecError
from noisec.manifest import verify
from noisec.python_backend.server import (
    EmbeddedServer,
    _assemble_backends,
    _Config,
    _ports,
    _remove_abandoned,
    _Server,
    _wait_for,
    get_libs_path,
    get_root_module_path,
)

SERVE = [sys.executable, "-m", "noisec", "serve", "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(REPOSITORY, tmp_path / "a repository"))


@pytest.fixture
def stand_ins(monkeypatch):
    """Backends in Python, each of whose instances is a process, whatever this run is to take instead."""
    monkeypatch.delenv("NOISEC_BACKENDS", raising=False)


@pytest.fixture
def launch():
    """Starts the command for a repository; what a failed test leaves of it ends with the test."""
    launched = []

    def start(repository):
        launched.append(subprocess.Popen([*SERVE, str(repository)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return launched[-1]

    yield start
    for process in launched:
        process.terminate()
    for process in launched:
        process.wait(timeout=30)


def ready(process):
    """Its gRPC address, once it says that it is ready."""
    line = process.stdout.readline()
    match = re.search(r"gRPC (\S+),", line)
    assert match, line + process.stdout.read()
    return match[1]


@pytest.mark.parametrize(("number", "layout"), [(signal.SIGINT, "fused"), (signal.SIGTERM, "staged")])
@pytest.mark.usefixtures("stand_ins")
def test_serve_is_ready_in_ten_seconds_and_stops_without_a_trace(launch, pixels, number, layout, tmp_path):
    rearrange(REPOSITORY, GUARD, ServingSpec(layout=layout), tmp_path)
    start = time.monotonic()
    process = launch(tmp_path)
    url = ready(process)
    assert time.monotonic() - start < 10
    with GuardClient(url, GUARD) as client:
        assert len(client.classify(pixels[:3])) == 3
    children = psutil.Process(process.pid).children(recursive=True)
    regions = list(Path("/dev/shm").glob(f"noisec-{process.pid}-*"))
    assert len(children) >= 4
    assert regions
    process.send_signal(number)
    assert process.wait(timeout=30) == 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not [region for region in regions if region.exists()]
    warning = f"clients that give up can end this server: noisec arrange copies {GUARD} fused"
    assert (warning in process.stdout.read()) == (layout == "staged")


@pytest.mark.parametrize("seconds", [0, 0.005, 0.1])
def test_serve_stops_without_a_trace_while_it_loads(launch, seconds):
    process = launch(REPOSITORY)
    while not (children := psutil.Process(process.pid).children(recursive=True)):
        time.sleep(0.0005)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert "stopped before the models were loaded" in process.stdout.read()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not list(Path("/dev/shm").glob(f"noisec-{process.pid}-*"))


@pytest.mark.parametrize("seconds", [0.001, 0.05, 0.3])
@pytest.mark.parametrize("background", [False, True])
def test_a_server_that_takes_too_long_says_how_to_wait_longer_and_is_stopped_at_once(seconds, background):
    start = time.monotonic()
    former = signal.signal(signal.SIGINT, signal.SIG_IGN) if background else signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(NoisecError, match=rf"not ready after {seconds} s: give it more \(ready_seconds, or --ready-seconds\)"):
            EmbeddedServer(REPOSITORY, ready_seconds=seconds).start()
    finally:
        signal.signal(signal.SIGINT, former)
    assert time.monotonic() - start < 15


def test_what_another_users_dead_server_left_stops_nobody(monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = Path("/dev/shm", f"noisec-{ended.pid}-left")
    left.touch()

    def refused(path, missing_ok=False):
        raise PermissionError(1, "Operation not permitted")

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", refused)
            _remove_abandoned()
        assert left.exists()
        _remove_abandoned()
        assert not left.exists()
    finally:
        left.unlink(missing_ok=True)


def test_a_killed_parent_leaves_no_orphans(launch):
    process = launch(REPOSITORY)
    ready(process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    _remove_abandoned()
    assert not list(Path(tempfile.gettempdir()).glob(f"noisec-server-{process.pid}-*"))
    assert not list(Path("/dev/shm").glob(f"noisec-{process.pid}-*"))


@pytest.mark.usefixtures("stand_ins")
def test_a_busy_server_that_was_killed_leaves_no_processes(pixels):
    server = EmbeddedServer(REPOSITORY).start()
    (triton,) = [child for child in psutil.Process().children() if f"--grpc-port={server.grpc_port}" in child.cmdline()]
    stubs = triton.children(recursive=True)
    assert len(stubs) >= 3

    def ask():
        with suppress(NoisecError), GuardClient(server.grpc_url, GUARD) as client:
            while True:
                client.classify(pixels)

    with ThreadPoolExecutor(3) as clients:
        for _ in range(3):
            clients.submit(ask)
        time.sleep(0.5)
        triton.kill()
        while server.is_alive():
            time.sleep(0.05)
        server.stop()
    _, alive = psutil.wait_procs(stubs, timeout=5)
    assert not alive


def test_a_taken_port_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(NoisecError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*choose another port"):
            EmbeddedServer(REPOSITORY, grpc_port=port)


def test_each_protocol_needs_a_port_of_its_own():
    with pytest.raises(NoisecError, match="HTTP, gRPC and metrics ports are 8000, 8000, 0: each needs one of its own, or 0"):
        EmbeddedServer(REPOSITORY, http_port=8000, grpc_port=8000)


def test_a_temporary_folder_with_spaces_is_named(tmp_path, monkeypatch):
    (tmp_path / "with spaces").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "with spaces"))
    with pytest.raises(NoisecError, match="with spaces': set TMPDIR to one without spaces"):
        EmbeddedServer(REPOSITORY).start()


@pytest.mark.usefixtures("stand_ins")
def test_a_second_signal_does_not_cut_the_cleaning_up_short(launch):
    process = launch(REPOSITORY)
    while len(psutil.Process(process.pid).children(recursive=True)) < 3:  # the server and the first of its Python processes
        assert process.poll() is None
        time.sleep(0.001)
    children = psutil.Process(process.pid).children(recursive=True)
    for _ in range(4):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.03)
    process.wait(timeout=30)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not list(Path("/dev/shm").glob(f"noisec-{process.pid}-*"))
    assert not list(Path(tempfile.gettempdir()).glob(f"noisec-server-{process.pid}-*"))


def test_backends_of_tritons_own_take_the_place_of_the_stand_ins(tmp_path, monkeypatch):
    own = tmp_path / "backends" / "onnxruntime" / "libtriton_onnxruntime.so"
    monkeypatch.setenv("NOISEC_BACKENDS", str(tmp_path / "backends"))
    with pytest.raises(NoisecError, match="no onnxruntime/libtriton_onnxruntime.so and no tensorrt/libtriton_tensorrt.so in this folder"):
        EmbeddedServer(REPOSITORY).start()
    own.parent.mkdir(parents=True)
    own.write_bytes(b"no library")
    with pytest.raises(NoisecError, match=r"unable to load shared library: .*/onnxruntime/libtriton_onnxruntime.so"):
        EmbeddedServer(REPOSITORY).start()


def test_a_folder_without_guards_is_refused(tmp_path):
    with pytest.raises(NoisecError, match="no guard in this folder; build one with"):
        EmbeddedServer(tmp_path)


def test_a_repository_whose_path_holds_spaces_is_served(copy, pixels):
    with EmbeddedServer(copy) as server, GuardClient(server.grpc_url, GUARD) as client:
        assert len(client.classify(pixels[:2])) == 2


def test_a_repository_that_is_not_as_it_was_built_is_not_served(copy):
    planted = copy / stage_model(GUARD, "scorer") / "2" / "model.py"
    planted.parent.mkdir()
    planted.write_text("benign for everybody")
    with pytest.raises(NoisecError, match=r"not as it was built, so it is not served(.|\n)*scorer/2/model.py: not in a manifest"):
        EmbeddedServer(copy)


def test_compiled_code_beside_a_model_is_named_and_never_run(copy, pixels):
    version = copy / stage_model(GUARD, "scorer") / "1"
    source = version / "scoring.py"
    lying = source.read_text().replace("~(score <= self.threshold)", "np.zeros(len(score), bool)")
    (version / "lying.py").write_text(lying)
    cache = version / "__pycache__" / f"scoring.{sys.implementation.cache_tag}.pyc"
    py_compile.compile(str(version / "lying.py"), str(cache), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    (version / "lying.py").unlink()
    assert [problem for problem in verify(copy, GUARD) if "__pycache__" in problem]
    noise = np.random.default_rng(0).random((20, 1, 28, 28), dtype=np.float32)
    with EmbeddedServer(copy, check=False) as server, GuardClient(server.grpc_url, GUARD) as client:
        assert client.classify(noise).is_malicious.any(), "the code beside it calls nothing malicious"


def test_a_half_written_release_is_not_served(copy):
    (copy / GUARD / "1" / "manifest.json").unlink()
    with pytest.raises(NoisecError, match="no guard in this folder"):
        EmbeddedServer(copy)


def test_serving_leaves_the_repository_as_it_was(copy, pixels):
    with EmbeddedServer(copy) as server, GuardClient(server.grpc_url, GUARD) as client:
        client.classify(pixels[:2])
    assert verify(copy, GUARD) == []


FIRST = "noise-class-gaussian/0"
"""the reference guard's first detector at its first noise level"""
BROKEN = {
    "calibration scores that do not ascend": lambda arrays: arrays | {"calibration": arrays["calibration"][::-1]},
    "no calibration scores": lambda arrays: arrays | {"calibration": arrays["calibration"][:0]},
    "a calibration score that is no number": lambda arrays: arrays | {"calibration": np.append(arrays["calibration"], np.float32("nan"))},
    "alpha of one": lambda arrays: arrays | {"alpha": np.array(1.0)},
    "no detector": lambda arrays: arrays | {"detectors": np.array([], "U9")},
    "a mean that is no number": lambda arrays: arrays | {f"{FIRST}/means": arrays[f"{FIRST}/means"] * np.float32("nan")},
    "a scale that falls": lambda arrays: arrays | {f"{FIRST}/scores": arrays[f"{FIRST}/scores"][::-1]},
    "another release": lambda arrays: arrays | {"release": np.array(7, np.int32)},
    "a last layer that is no number": lambda arrays: arrays | {"head/bias": arrays["head/bias"] * np.float32("inf")},
    "a noise level that is no number": lambda arrays: arrays | {"edges": arrays["edges"] * np.float32("nan")},
}


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN)
def test_a_scorer_with_values_that_mean_nothing_is_not_served(copy, spoil):
    path = copy / stage_model(GUARD, "scorer") / "1" / "scorer.npz"
    with np.load(path) as archive:
        arrays = spoil(dict(archive))
    np.savez(path, **arrays)
    with pytest.raises(NoisecError, match=r"the server stopped while it loaded(.|\n)*fashion_mnist_scorer"):
        EmbeddedServer(copy, check=False).start()


MEMORY = {"radius": np.float32(1), "neighbours": np.int64(2), "size": np.int64(10)}


@pytest.mark.parametrize(
    "other",
    [
        lambda arrays: {"repeats/centre": np.zeros(3, np.float32), **{f"repeats/{name}": value for name, value in MEMORY.items()}},
        lambda arrays: {"head/weights": arrays["head/weights"][1:]},
    ],
    ids=["memory", "head"],
)
def test_a_scorer_for_other_widths_is_not_served(copy, other):
    path = copy / stage_model(GUARD, "scorer") / "1" / "scorer.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **arrays | other(arrays))
    with pytest.raises(NoisecError, match=r"scorer.npz does not fit the widths in config.pbtxt, .*'IMAGE_PENULTIMATE': 128"):
        EmbeddedServer(copy, check=False).start()


def test_a_broken_scorer_stops_the_start_with_its_reason(copy):
    (copy / stage_model(GUARD, "scorer") / "1" / "scorer.npz").write_bytes(b"not an archive")
    with pytest.raises(NoisecError, match=r"the server stopped while it loaded(.|\n)*fashion_mnist_scorer"):
        EmbeddedServer(copy, check=False).start()


def test_a_broken_network_stops_the_start_with_its_reason(copy):
    (copy / stage_model(GUARD, "autoencoder") / "1" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(NoisecError, match=r"the server stopped while it loaded(.|\n)*fashion_mnist_autoencoder"):
        EmbeddedServer(copy, check=False).start()


def test_a_scorer_that_expects_other_tensors_is_refused(copy):
    config = copy / stage_model(GUARD, "scorer") / "config.pbtxt"
    config.write_text(config.read_text().replace("NOISE_PENULTIMATE", "OTHER_PENULTIMATE"))
    ensemble = copy / GUARD / "config.pbtxt"
    ensemble.write_text(re.sub(r'key: "NOISE_PENULTIMATE"', 'key: "OTHER_PENULTIMATE"', ensemble.read_text()))
    with pytest.raises(NoisecError, match="scorer.npz needs"):
        EmbeddedServer(copy, check=False).start()


def test_tritons_own_defaults_serve_the_repository(tmp_path, client, pixels):
    """Without the embedded server's flags, as in a container: Triton completes configurations there, for one."""
    shutil.copytree(REPOSITORY, tmp_path / "models")
    _assemble_backends(tmp_path / "backends")
    ports = dict(zip(("grpc", "http", "metrics"), _ports("127.0.0.1", 0, 0, 0), strict=True))
    config = _Config()
    config.update_config({"model-repository": tmp_path / "models", "backend-directory": tmp_path / "backends"})
    config.update_config({f"{protocol}-address": "127.0.0.1" for protocol in ports})
    config.update_config({f"{protocol}-port": port for protocol, port in ports.items()})
    binary = get_root_module_path() / "tritonserver" / "bin" / "tritonserver"
    server = _Server(path=binary, libs_path=get_libs_path(), config=config, verbose=False)
    server.start()
    try:
        _wait_for(lambda: "Started GRPCInferenceService" in server.logs() or not server.is_alive(), 30)
        assert server.is_alive(), server.logs()
        with GuardClient(f"127.0.0.1:{ports['grpc']}", GUARD) as defaults:
            found, expected = defaults.classify(pixels), client.classify(pixels)
    finally:
        server.stop()
    np.testing.assert_array_equal(found.is_malicious, expected.is_malicious)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3, atol=1e-3)


def test_two_servers_run_side_by_side(server, pixels):
    with EmbeddedServer(REPOSITORY) as other, GuardClient(server.grpc_url, GUARD) as one, GuardClient(other.grpc_url, GUARD) as two:
        assert np.array_equal(one.classify(pixels[:5]).scores, two.classify(pixels[:5]).scores)
