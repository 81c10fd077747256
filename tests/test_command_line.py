"""The command line, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import GUARD, REPOSITORY
from PIL import Image

from noisec.builders.spec import GUARDS


def noisec(*arguments, code=0, cwd=None):
    """Standard output of a command that is expected to end with ``code``; its errors where that is not 0."""
    done = subprocess.run([sys.executable, "-m", "noisec", *map(str, arguments)], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if code else done.stdout


@pytest.fixture
def files(tmp_path, report):
    Image.fromarray(report.pixels[0, 0]).save(tmp_path / "one.png")
    noise = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    np.savez(tmp_path / "two.npz", images=np.stack([report.pixels[1, 0], noise])[:, None])
    return [tmp_path / "one.png", tmp_path / "two.npz"]


def test_classify_prints_a_table_and_writes_json(server, client, files, tmp_path, report):
    names = [path.name for path in files]
    out = noisec("classify", "--url", server.grpc_url, "--guard", GUARD, *names, "--json", "verdicts.json", cwd=tmp_path)
    rows = json.loads((tmp_path / "verdicts.json").read_text())
    expected = client.classify(report.pixels[:2])
    assert [row["label"] for row in rows[:2]] == expected.labels.tolist()
    assert [row["malicious"] for row in rows[:2]] == expected.is_malicious.tolist()
    assert rows[2]["malicious"] is True
    assert rows[2]["file"].endswith("two.npz[1]")
    assert client.interface.name_of(expected.labels[0]) in out
    assert "malicious" in out
    assert "two.npz[1]" in out


def test_classify_writes_only_json_to_standard_output(server, files):
    rows = json.loads(noisec("classify", "--url", server.grpc_url, "--guard", GUARD, *files, "--json", "-", "--labels-only"))
    assert [sorted(row) for row in rows] == [["class", "file", "label"]] * 3


def test_a_request_may_take_as_long_as_it_is_given(server, files):
    out = noisec("classify", "--url", server.grpc_url, "--guard", GUARD, *files, "--timeout", "0.001", code=1)
    assert "Deadline" in out or "within timeout = 0.001 s" in out


def test_a_quick_measurement_has_no_page_to_tell_a_soak_on():
    out = noisec("bench", "throughput", REPOSITORY, "--guard", GUARD, "--quick", "--soak", "600", code=1)
    assert "--soak 600 with --quick" in out


def test_files_that_do_not_fit_are_named(server, tmp_path):
    Image.new("L", (32, 32)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("not a picture")
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    Image.fromarray(np.arange(784, dtype=np.uint16).reshape(28, 28) * 80).save(tmp_path / "deep.png")
    Image.new("RGBA", (28, 28)).save(tmp_path / "clear.png")
    Image.new("P", (28, 28)).save(tmp_path / "holes.png", transparency=0)
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for name, message in {
        "large.png": "large.png: the picture is 32 x 32; fashion_mnist takes 28 x 28",
        "text.png": "text.png: not a readable picture",
        "other.npz": "other.npz: no array 'images'; it holds ['pictures']",
        "deep.png": "deep.png: a picture with more than 8 bits a channel (I;16)",
        "clear.png": "clear.png: a picture with transparency (RGBA)",
        "holes.png": "holes.png: a picture with transparency (P)",
        "array.npz": "array.npz: not a readable npz file",
        "missing.png": "missing.png: not a readable picture",
        "missing.npz": "missing.npz: not a readable npz file",
    }.items():
        assert message in noisec("classify", "-u", server.grpc_url, "-g", GUARD, tmp_path / name, code=1)


def test_verify_tells_an_untouched_repository_from_a_changed_one(tmp_path):
    import shutil

    assert "every file is as it was built" in noisec("verify", REPOSITORY)
    copy = shutil.copytree(REPOSITORY, tmp_path / "copy")
    (copy / GUARD / "config.pbtxt").write_text("")
    (copy / "stranger" / "1").mkdir(parents=True)
    said = noisec("verify", copy, code=1)
    assert f"{GUARD}/config.pbtxt: changed since the build" in said
    assert "stranger/: belongs to no guard" in said


def test_errors_are_printed_alone(tmp_path):
    assert "no such file; reference guards" in noisec("build", tmp_path / "none.toml", code=1)
    assert "no guard in this folder" in noisec("serve", tmp_path, code=1)
    assert "no guard in this folder" in noisec("verify", tmp_path, code=1)
    assert "IPv6 addresses are not supported" in noisec("serve", REPOSITORY, "--host", "::1", code=1)
    assert "cannot be written; name a file" in noisec("classify", "-g", GUARD, "x.png", "--json", tmp_path / "none" / "a.json", code=1)
    demo = GUARDS / "demo.toml"
    assert "--plot a.foo: no kind of picture" in noisec("audit", demo, "--plot", "a.foo", code=1)
    assert "cannot be written; name a file" in noisec("repair", demo, "--out", tmp_path / "none" / "a.safetensors", code=1)
    bench = ("bench", "detection", REPOSITORY, "--guard", GUARD)
    assert "--ladder x: expected numbers" in noisec(*bench, "--attacks", "", "--ladder", "x", code=1)
    for command in ("hardening", "memory"):
        assert "--eps 8: an epsilon lies in (0, 1]" in noisec("bench", command, REPOSITORY, "--guard", GUARD, "--eps", "8", code=1)
    (tmp_path / GUARD / "1").mkdir(parents=True)
    (tmp_path / GUARD / "1" / "manifest.json").write_text("[]")
    assert "manifest.json: damaged" in noisec("verify", tmp_path, code=1)


@pytest.mark.parametrize("command", ["build", "calibrate", "compile", "inspect", "serve", "classify", "verify", "demo"])
def test_every_command_explains_itself_with_an_example(command):
    assert f"Example: noisec {command}" in " ".join(noisec(command, "--help").split())


KILLED = """
import time
from noisec.cli import app, bench

@bench.command()
def nothing():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)

app(["bench", "nothing"])
"""


def test_a_measurement_that_is_killed_cleans_up_as_after_ctrl_c():
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.terminate()
        assert process.communicate(timeout=30)[0] == "cleaned up\n"
