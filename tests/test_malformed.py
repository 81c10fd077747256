"""Bad specifications and data files: each gets an error that names the value, the limit and the fix."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from noisec.builders import datasets
from noisec.builders.images import Images, cut
from noisec.builders.sources import fashion_mnist, npz
from noisec.builders.spec import GUARDS, read_spec
from noisec.errors import NoisecError

DEMO = (GUARDS / "demo.toml").read_text()

SPECS = {
    "not TOML": (lambda text: text + "\n[", "not TOML"),
    "unknown key": (lambda text: "colour = 1\n" + text, "colour: Extra inputs are not permitted"),
    "capital name": (lambda text: text.replace('name = "demo"', 'name = "Demo"'), "name: String should match"),
    "path as a name": (lambda text: text.replace('name = "demo"', 'name = "../demo"'), "name: String should match"),
    "no name": (lambda text: text.replace('name = "demo"', ""), "name: Field required"),
    "release zero": (lambda text: "release = 0\n" + text, "release: Input should be greater than 0"),
    "rate of one": (lambda text: text.replace("target_fpr = 0.01", "target_fpr = 1"), "target_fpr: Input should be less than 1"),
    "rate too small": (
        lambda text: text.replace("target_fpr = 0.01", "target_fpr = 0.0001"),
        "data.calibrate is 1600: a false-positive rate of 0.0001 needs at least 9999 calibration images",
    ),
    "unknown source": (lambda text: text.replace('"fashion-mnist-test"', '"imagenet"'), "data.source: Input should be 'fashion-mnist'"),
    "npz without a path": (lambda text: text.replace('"fashion-mnist-test"', '"npz"'), "data.path goes with source = 'npz'"),
    "a path without npz": (
        lambda text: text.replace("train = ", 'path = "a.npz"\ntrain = ', 1),
        "path goes with source = 'npz' or 'folder', may go with 'gtsrb', and goes with no other",
    ),
    "folder without a path": (
        lambda text: text.replace('"fashion-mnist-test"', '"folder"'),
        "source is 'folder', path is None",
    ),
    "a size for a fixed source": (
        lambda text: text.replace("train = ", "size = [32, 32]\ntrain = ", 1),
        r"data.size goes with source = 'folder' or 'gtsrb' and with no other; source is 'fashion-mnist-test', size is \(32, 32\)",
    ),
    "channels for a fixed source": (lambda text: text.replace("train = ", "channels = 3\ntrain = ", 1), "data.channels goes with source"),
    "two channels": (
        lambda text: text.replace('"fashion-mnist-test"', '"gtsrb"\nchannels = 2'),
        "data.channels: Input should be 1 or 3",
    ),
    "no height": (
        lambda text: text.replace('"fashion-mnist-test"', '"gtsrb"\nsize = [0, 32]'),
        "data.size.0: Input should be greater than 0",
    ),
    "no images": (lambda text: text.replace("fit = 2400", "fit = 0"), "data.fit: Input should be greater than 0"),
    "unknown classifier": (lambda text: text.replace('"conv3"', '"resnet"'), "classifier.network: Input should be 'conv3'"),
    "unknown autoencoder": (lambda text: text.replace('"unet"', '"vae"'), "autoencoder.network: Input should be 'unet'"),
    "poison of everything": (
        lambda text: text.replace("share = 0.05", "share = 1.0"),
        "classifier.backdoor.share: Input should be less than 1",
    ),
    "unknown view": (
        lambda text: text.replace('view = "delta"', 'view = "logits"'),
        "detectors.1.view: Input should be 'pixels', 'noise', 'delta', 'image', 'amplified' or 'hardened'",
    ),
    "a detector twice": (lambda text: text.replace('view = "image"', 'view = "noise"'), r"listed twice: \['noise-class-gaussian'\]"),
    "a view that does not fit": (
        lambda text: text.replace('view = "delta"', 'view = "noise"'),
        "a detector of kind 'divergence' has view 'delta' or 'hardened'; view is 'noise'",
    ),
    "no detectors": (lambda text: "detectors = []\n" + text.split("[[detectors]]")[0], "detectors: Tuple should have at least 1 item"),
    "no levels": (
        lambda text: text.replace("noise_levels = 4", "noise_levels = 0"),
        "noise_levels: Input should be greater than or equal to 1",
    ),
    "unknown runtime": (lambda text: 'runtime = "tflite"\n' + text, "runtime: Input should be 'onnxruntime'"),
    "text for a number": (
        lambda text: text.replace("epochs = 12", 'epochs = "many"'),
        "classifier.epochs: Input should be a valid integer",
    ),
}


@pytest.mark.parametrize(("change", "message"), SPECS.values(), ids=SPECS)
def test_a_bad_specification_is_refused(tmp_path, change, message):
    path = tmp_path / "guard.toml"
    path.write_text(change(DEMO))
    assert path.read_text() != DEMO
    with pytest.raises(NoisecError, match=message):
        read_spec(path)


def test_a_missing_specification_lists_the_reference_guards(tmp_path):
    with pytest.raises(NoisecError, match=r"no such file; reference guards: .*demo\.toml, fashion_mnist\.toml"):
        read_spec(tmp_path / "guard.toml")


IMAGES, LABELS = np.zeros((6, 8, 8), np.uint8), np.arange(6)
ARCHIVES = {
    "no labels": ({"images": IMAGES}, "no array labels; it holds \\['images'\\]"),
    "too few labels": (
        {"images": IMAGES, "labels": LABELS[:5]},
        r"labels is int64 \[5\]; expected integers from 0, one for each of 6 images",
    ),
    "float labels": ({"images": IMAGES, "labels": LABELS * 1.0}, "labels is float64"),
    "negative labels": ({"images": IMAGES, "labels": LABELS - 1}, "expected integers from 0"),
    "five channels": ({"images": np.zeros((6, 5, 8, 8), np.uint8), "labels": LABELS}, r"images are \[6, 5, 8, 8\]; expected"),
    "int images": ({"images": IMAGES.astype(np.int32), "labels": LABELS}, "images are int32; expected uint8"),
    "floats to 255": ({"images": IMAGES + 255.0, "labels": LABELS}, r"float images reach from 255.0 to 255.0; expected \[0, 1\]"),
    "NaN": ({"images": IMAGES + np.nan, "labels": LABELS}, r"float images reach from nan to nan; expected \[0, 1\] and no NaN"),
    "pickled objects": ({"images": IMAGES, "labels": LABELS.astype(object)}, "not a readable npz file: .*allow_pickle=False"),
}


@pytest.mark.parametrize(("arrays", "message"), ARCHIVES.values(), ids=ARCHIVES)
def test_a_bad_archive_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(NoisecError, match=message):
        npz.load(tmp_path / "data.npz")


def test_a_truncated_archive_is_refused(tmp_path):
    np.savez(tmp_path / "whole.npz", images=IMAGES, labels=LABELS)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:200])
    with pytest.raises(NoisecError, match="cut.npz: not a readable npz file"):
        npz.load(tmp_path / "cut.npz")


WHOLE = (fashion_mnist.SHIPPED / "t10k-labels-idx1-ubyte.gz").read_bytes()
IDX = {
    "truncated gzip": (WHOLE[:1000], "not a readable gzip file"),
    "not gzip": (b"labels", "not a readable gzip file"),
    "not idx": (gzip.compress(b"\1\2\3\4 labels"), "not an idx file of unsigned bytes; it begins with 01020304"),
    "empty": (gzip.compress(b""), "it begins with nothing"),
    "too short": (gzip.compress(gzip.decompress(WHOLE)[:-7]), r"9993 bytes of data where its header \(10000,\) asks for 10000"),
}


@pytest.mark.parametrize(("content", "message"), IDX.values(), ids=IDX)
def test_a_bad_idx_file_is_refused(tmp_path, content, message):
    (tmp_path / "labels.gz").write_bytes(content)
    with pytest.raises(NoisecError, match=message):
        fashion_mnist.read_idx(tmp_path / "labels.gz")


def test_asking_for_more_images_than_there_are_is_refused(tmp_path):
    data = read_spec(GUARDS / "demo.toml").data.model_copy(update={"train": 9000})
    with pytest.raises(NoisecError, match="14000 in all, of a pool of 10000; ask for fewer"):
        datasets.load_splits(data, 0, cache=tmp_path)


def test_missing_classes_and_wrong_names_are_refused(tmp_path):
    np.savez(tmp_path / "data.npz", images=np.zeros((400, 8, 8), np.uint8), labels=np.repeat([0, 2], 200))
    data = read_spec(GUARDS / "demo.toml").data
    sizes = {"train": 100, "fit": 100, "calibrate": 100, "report": 100}
    data = data.model_copy(update={"source": "npz", "path": tmp_path / "data.npz", **sizes})
    with pytest.raises(NoisecError, match=r"classes \[1\] have no image in the 100 training images"):
        datasets.load_splits(data, 0, cache=tmp_path)
    with pytest.raises(NoisecError, match="data.class_names has 2 names; the labels go from 0 to 2"):
        datasets.load_splits(data.model_copy(update={"class_names": ("a", "b")}), 0, cache=tmp_path)


def test_the_four_sets_are_disjoint():
    shipped = fashion_mnist.load("t10k")
    marked = Images.whole(np.arange(len(shipped), dtype=np.int64)[:, None, None, None], shipped.labels)
    parts = cut(marked, (5000, 2400, 1600, 1000), [0])
    rows = np.concatenate([part.pixels.ravel() for part in parts])
    assert len(np.unique(rows)) == len(rows) == 10000


def test_shipped_files_are_the_official_ones():
    import hashlib

    for path in fashion_mnist.SHIPPED.glob("*.gz"):
        assert hashlib.md5(path.read_bytes()).hexdigest() == fashion_mnist.MD5[path.name]
