"""Data sources: what is read is what lies there, once; what cannot be used is named; nothing large is held in memory."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import tarfile
import threading
import tracemalloc
import zipfile
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler

import numpy as np
import pytest
from PIL import Image

from noisec.builders import datasets
from noisec.builders.images import Images
from noisec.builders.sources import cifar10, decoded, fashion_mnist, folder, gtsrb, official, pneumoniamnist
from noisec.builders.sources.faults import NAMED, Faults
from noisec.builders.spec import DataSpec
from noisec.errors import NoisecError

SHIPPED = fashion_mnist.load("t10k")
REAL = SHIPPED[np.concatenate([np.flatnonzero(SHIPPED.labels == label)[:6] for label in range(10)])]
"""six of each class"""
NAMES = [f"{number} {name.split('/')[0]}" for number, name in enumerate(fashion_mnist.CLASSES)]


def data(source, path=None, **options):
    return DataSpec(source=source, path=path, **({"train": 30, "fit": 10, "calibrate": 10, "report": 10} | options))


def load(spec, cache):
    """Pools and faults of a source."""
    faults = Faults()
    return datasets.SOURCES[spec.source](spec, cache, faults), faults


def class_folders(root, images=REAL):
    """Real images as PNG files in class folders, in the order in which they are read."""
    for name in NAMES:
        (root / name).mkdir(parents=True)
    for index, (pixels, label) in enumerate(zip(images.pixels[:, 0], images.labels, strict=True)):
        Image.fromarray(pixels).save(root / NAMES[label] / f"{index:03}.png")
    return images[np.argsort(images.labels, kind="stable")]


@pytest.fixture
def pictures(tmp_path):
    """A folder with one sub-folder for each class."""
    class_folders(tmp_path / "pictures")
    return tmp_path / "pictures"


def test_a_folder_gives_the_pixels_labels_and_names_that_lie_in_it(tmp_path):
    written = class_folders(tmp_path / "pictures")
    pools, faults = load(data("folder", tmp_path / "pictures", channels=1), tmp_path / "cache")
    np.testing.assert_array_equal(pools.learn.pixels, written.pixels)
    np.testing.assert_array_equal(pools.learn.labels, written.labels)
    assert (pools.held_out, pools.class_names, len(faults)) == (None, tuple(NAMES), 0)


def test_images_are_colour_unless_gray_is_asked_for(tmp_path, pictures):
    pools, _ = load(data("folder", pictures), tmp_path / "cache")
    assert pools.learn.shape == (3, 28, 28)
    assert (pools.learn.pixels == pools.learn.pixels[:, :1]).all()


def test_train_and_test_folders_stay_apart(tmp_path):
    learn = class_folders(tmp_path / "pictures" / "train", REAL[:45])
    held_out = class_folders(tmp_path / "pictures" / "test", REAL[45:])
    (tmp_path / "pictures" / "notes.txt").write_text("of no class")
    pools, faults = load(data("folder", tmp_path / "pictures", channels=1), tmp_path / "cache")
    np.testing.assert_array_equal(pools.learn.pixels, learn.pixels)
    assert pools.held_out is not None
    np.testing.assert_array_equal(pools.held_out.pixels, held_out.pixels)
    np.testing.assert_array_equal(pools.held_out.labels, held_out.labels)
    assert faults.lines() == ["data: 1 left out, outside every class folder: notes.txt"]


def test_a_test_class_that_was_never_learned_is_named(tmp_path):
    class_folders(tmp_path / "pictures" / "train")
    (tmp_path / "pictures" / "test" / "Hat").mkdir(parents=True)
    Image.fromarray(REAL.pixels[0, 0]).save(tmp_path / "pictures" / "test" / "Hat" / "a.png")
    pools, faults = load(data("folder", tmp_path / "pictures"), tmp_path / "cache")
    assert len(pools.held_out) == 0
    assert faults.lines() == ["data: 1 left out, class that train/ does not have: test/Hat/a.png"]


def test_images_of_any_size_are_resized_where_a_size_is_given(tmp_path, pictures):
    Image.effect_noise((50, 90), 40).save(pictures / NAMES[0] / "large.jpg")
    pools, faults = load(data("folder", pictures, size=[16, 20]), tmp_path / "cache")
    assert (pools.learn.shape, len(pools.learn), len(faults)) == ((3, 16, 20), len(REAL) + 1, 0)


PNG = io.BytesIO()
Image.fromarray(REAL.pixels[0, 0]).save(PNG, "png")
JPEG = io.BytesIO()
Image.effect_noise((28, 28), 60).save(JPEG, "jpeg")
FLIPPED = bytearray(PNG.getvalue())
FLIPPED[len(FLIPPED) // 2] ^= 255
FILES = {
    "text": (lambda path: path.write_text("no image"), "not an image"),
    "empty file": (lambda path: path.touch(), "not an image"),
    "truncated PNG": (lambda path: path.write_bytes(PNG.getvalue()[:-60]), "broken or truncated"),
    "truncated JPEG": (lambda path: path.write_bytes(JPEG.getvalue()[:-200]), "broken or truncated"),
    "a flipped byte": (lambda path: path.write_bytes(FLIPPED), "broken or truncated"),
    "another size": (lambda path: Image.new("L", (28, 29)).save(path, "png"), "mixed size, not the most common 28 x 28"),
    "16 bits": (lambda path: Image.fromarray(np.full((28, 28), 40_000, np.uint16)).save(path, "png"), "more than 8 bits a channel"),
    "32-bit floats": (lambda path: Image.fromarray(np.zeros((28, 28), np.float32)).save(path, "tiff"), "more than 8 bits a channel"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "not a readable file"),
    "pipe": (os.mkfifo, "not a readable file"),
}


@pytest.mark.parametrize(("make", "reason"), FILES.values(), ids=FILES)
def test_a_file_that_cannot_be_used_is_named_and_the_others_are_kept(tmp_path, pictures, make, reason):
    make(pictures / NAMES[3] / "odd")
    pools, faults = load(data("folder", pictures), tmp_path / "cache")
    assert faults.lines() == [f"data: 1 left out, {reason}: {NAMES[3]}/odd"]
    assert len(pools.learn) == len(REAL)
    assert pools.learn.labels.tolist() == sorted(REAL.labels.tolist())


PLACES = {
    "beside the classes": ("odd.png", "outside every class folder"),
    "below a class": (f"{NAMES[0]}/more/odd.png", "in a folder inside a class folder"),
    "hidden folder": (".thumbnails/odd.png", "outside every class folder"),
}


@pytest.mark.parametrize(("place", "reason"), PLACES.values(), ids=PLACES)
def test_an_image_in_the_wrong_place_is_named(tmp_path, pictures, place, reason):
    (pictures / place).parent.mkdir(exist_ok=True)
    (pictures / place).write_bytes(PNG.getvalue())
    pools, faults = load(data("folder", pictures), tmp_path / "cache")
    assert faults.lines() == [f"data: 1 left out, {reason}: {place}"]
    assert (len(pools.learn), len(pools.class_names)) == (len(REAL), 10)


def test_faults_are_printed_or_refused(tmp_path, pictures, capsys):
    for index in range(NAMED + 2):
        (pictures / NAMES[1] / f"a{index} [bold].png").write_text("no image")
    (pictures / NAMES[2] / "\x1b[31m\udcff.png").write_text("no image")
    (pictures / "list.csv").write_text("of no class")
    spec = data("folder", pictures)
    assert len(datasets.load_splits(spec, 0, cache=tmp_path / "cache").train) == 30
    printed = capsys.readouterr().err
    assert "data: 1 left out, outside every class folder: list.csv\n" in printed
    assert f"data: {NAMED + 3} left out, not an image: {NAMES[1]}/a0 [bold].png, " in printed
    assert "and 3 more\n" in printed
    assert "\x1b[31m" not in printed
    with pytest.raises(NoisecError, match=r"(?s)list\.csv.*8 left out, not an image: .*strict allows no fault; mend or remove"):
        datasets.load_splits(spec, 0, cache=tmp_path / "cache", strict=True)


def test_a_sound_folder_passes_strict(tmp_path, pictures):
    splits = datasets.load_splits(data("folder", pictures), 0, cache=tmp_path / "cache", strict=True)
    assert splits.class_names == tuple(NAMES)


def test_a_second_load_decodes_nothing_and_names_the_same_faults(tmp_path, pictures, capsys, monkeypatch):
    (pictures / NAMES[3] / "odd.png").write_text("no image")
    first, faults = load(data("folder", pictures), tmp_path / "cache")
    assert "reused" not in capsys.readouterr().err
    monkeypatch.setattr(decoded, "_read", None)
    again, same = load(data("folder", pictures), tmp_path / "cache")
    assert "images: unchanged, reused" in capsys.readouterr().err
    np.testing.assert_array_equal(first.learn.pixels, again.learn.pixels)
    assert faults.lines() == same.lines() != []
    assert first.digest == again.digest


CHANGES = {
    "rewritten": lambda path: Image.new("L", (28, 28), 77).save(path),
    "removed": lambda path: path.unlink(),
    "renamed": lambda path: path.rename(path.with_name("zzz.png")),
    "added": lambda path: Image.new("L", (28, 28), 77).save(path.with_name("more.png")),
    "same size, other time": lambda path: os.utime(path, ns=(1, 1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_file_is_noticed(tmp_path, pictures, change, capsys):
    first, _ = load(data("folder", pictures), tmp_path / "cache")
    change(min((pictures / NAMES[5]).iterdir()))
    again, _ = load(data("folder", pictures), tmp_path / "cache")
    assert "reused" not in capsys.readouterr().err
    assert first.digest != again.digest


def test_other_options_are_decoded_again(tmp_path, pictures):
    shapes = [
        load(data("folder", pictures, **options), tmp_path / "cache")[0].learn.shape
        for options in ({}, {"channels": 1}, {"size": [28, 30]}, {"channels": 1, "size": [28, 30]})
    ]
    assert shapes == [(3, 28, 28), (1, 28, 28), (3, 28, 30), (1, 28, 30)]


def test_an_interrupted_load_is_not_taken_for_finished(tmp_path, pictures, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(decoded, "_read", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load(data("folder", pictures), tmp_path / "cache")
    assert len(load(data("folder", pictures), tmp_path / "cache")[0].learn) == len(REAL)


def test_a_damaged_memory_map_is_refused(tmp_path, pictures):
    load(data("folder", pictures), tmp_path / "cache")
    [store] = (tmp_path / "cache").glob("images-*/images.npy")
    os.truncate(store, 1000)
    with pytest.raises(NoisecError, match="damaged memory map of images .*; remove this folder"):
        load(data("folder", pictures), tmp_path / "cache")


def test_memory_stays_far_below_the_decoded_size(tmp_path):
    large = [Image.fromarray(pixels).resize((224, 224)).convert("RGB") for pixels in REAL.pixels[:20, 0]]
    for index in range(300):
        target = tmp_path / "pictures" / str(index % 3)
        target.mkdir(parents=True, exist_ok=True)
        large[index % 20].save(target / f"{index}.jpg")
    size = 300 * 3 * 224 * 224
    tracemalloc.start()
    try:
        pools, _ = load(data("folder", tmp_path / "pictures"), tmp_path / "cache")
        loading = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        read = sum(batch.pixels.size for batch in pools.learn.batches(10))
        reading = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(pools.learn.store, np.memmap)
    assert (len(pools.learn), read) == (300, size)
    assert loading < size / 10
    assert reading < size / 10


def test_a_view_of_a_memory_map_gives_its_own_rows(tmp_path):
    np.save(tmp_path / "images.npy", REAL.pixels)
    store = np.load(tmp_path / "images.npy", mmap_mode="r")
    np.testing.assert_array_equal(Images.whole(store, REAL.labels).pixels, REAL.pixels)
    np.testing.assert_array_equal(Images.whole(store[7:], REAL.labels[7:]).pixels, REAL.pixels[7:])


def text_files(root):
    (root / "cat").mkdir()
    (root / "cat" / "a.txt").write_text("no image")


def unprintable(root):
    (root / "cat\ndog").mkdir()


ROOTS = {
    "no such folder": (lambda root: root.rmdir(), "no such folder; data.path of source = 'folder' is a folder with one sub-folder"),
    "a file": (lambda root: (root.rmdir(), root.touch()), "no such folder"),
    "empty": (lambda root: None, "no class folder in it; put the images of each class into a sub-folder"),
    "images without classes": (lambda root: (root / "a.png").write_bytes(PNG.getvalue()), "no class folder in it"),
    "no image at all": (lambda root: (root / "cat").mkdir(), "not one readable image; put images there or correct data.path"),
    "nothing readable": (text_files, r"(?s)1 left out, not an image: cat/a\.txt.*not one readable image"),
    "line break in a class name": (unprintable, r"class folder 'cat\\ndog' has characters that cannot be shown; rename it"),
}


@pytest.mark.parametrize(("make", "message"), ROOTS.values(), ids=ROOTS)
def test_a_folder_without_usable_images_is_refused(tmp_path, make, message):
    root = tmp_path / "pictures"
    root.mkdir()
    make(root)
    with pytest.raises(NoisecError, match=message):
        load(data("folder", root), tmp_path / "cache")


def test_a_class_without_images_is_refused(tmp_path, pictures):
    (pictures / "Empty").mkdir()
    with pytest.raises(NoisecError, match=r"classes \[10\] have no image in the 30 training images"):
        datasets.load_splits(data("folder", pictures), 0, cache=tmp_path / "cache")


# CIFAR-10


@pytest.fixture
def batches(tmp_path, monkeypatch):
    """Six batches of 20 rows in the official layout."""
    rows = np.random.default_rng(0).integers(0, 256, (6, 20, cifar10.ROW), np.uint8)
    rows[:, :, 0] %= 10
    target = tmp_path / cifar10.FOLDER
    target.mkdir()
    for name, batch in zip((*cifar10.LEARN, *cifar10.HELD_OUT), rows, strict=True):
        batch.tofile(target / name)
    monkeypatch.setenv("NOISEC_DATA", str(tmp_path))
    monkeypatch.setattr(cifar10, "ROWS", 20)
    return target, rows


def test_cifar_batches_are_read_in_their_order(batches, tmp_path):
    _, rows = batches
    pools, faults = load(data("cifar10"), tmp_path)
    learn = rows[:5].reshape(100, -1)
    np.testing.assert_array_equal(pools.learn.labels, learn[:, 0])
    np.testing.assert_array_equal(pools.learn.pixels, learn[:, 1:].reshape(100, 3, 32, 32))
    np.testing.assert_array_equal(pools.held_out.pixels, rows[5, :, 1:].reshape(20, 3, 32, 32))
    assert (len(faults), pools.class_names[3]) == (0, "cat")


def test_a_wrong_cifar_label_is_named_and_only_its_row_is_left_out(batches, tmp_path):
    target, rows = batches
    rows[1, [4, 7], 0] = 10, 255
    rows[1].tofile(target / "data_batch_2.bin")
    pools, faults = load(data("cifar10"), tmp_path)
    assert faults.lines() == ["data: 2 left out, label byte above 9: data_batch_2.bin row 4, data_batch_2.bin row 7"]
    assert len(pools.learn) == 98
    np.testing.assert_array_equal(pools.learn.pixels[24], rows[1, 5, 1:].reshape(3, 32, 32))
    with pytest.raises(NoisecError, match="label byte above 9: data_batch_2.bin row 4"):
        datasets.load_splits(data("cifar10"), 0, cache=tmp_path, strict=True)


def test_a_cifar_batch_cut_between_rows_is_named(batches, tmp_path):
    target, _ = batches
    os.truncate(target / "test_batch.bin", 18 * cifar10.ROW)
    _, faults = load(data("cifar10"), tmp_path)
    assert faults.lines() == ["data: 1 left out, truncated batch of fewer than 20 rows: test_batch.bin rows 18 to 19"]


@pytest.mark.parametrize("size", [0, 3072, 19 * 3073 + 5])
def test_a_cifar_batch_cut_within_a_row_is_refused(batches, tmp_path, size):
    target, _ = batches
    os.truncate(target / "data_batch_5.bin", size)
    with pytest.raises(NoisecError, match=rf"data_batch_5\.bin: {size} bytes, not a multiple of 3073; an official batch has 20 rows"):
        load(data("cifar10"), tmp_path)


def official_set(*parts):
    path = official.local(*parts)
    return pytest.mark.skipif(path is None, reason=f"{'/'.join(parts)} not found: put the official files into DIR and set NOISEC_DATA=DIR")


@official_set(cifar10.FOLDER, "data_batch_1.bin")
def test_the_official_cifar_images_are_all_read(tmp_path):
    pools, faults = load(data("cifar10"), tmp_path)
    assert (len(pools.learn), len(pools.held_out), len(faults)) == (50_000, 10_000, 0)
    assert np.bincount(pools.learn.labels).tolist() == [5000] * 10
    assert np.bincount(pools.held_out.labels).tolist() == [1000] * 10
    np.testing.assert_allclose(pools.learn.store.mean((0, 2, 3)) / 255, (0.4914, 0.4822, 0.4465), atol=1e-4)


# PneumoniaMNIST


def archive(tmp_path, monkeypatch, **changes):
    """Real images in the official arrays."""
    arrays = {}
    for split, part in (("train", REAL[:30]), ("val", REAL[30:40]), ("test", REAL[40:])):
        arrays |= {f"{split}_images": part.pixels[:, 0], f"{split}_labels": (part.labels % 2).astype(np.uint8)[:, None]}
    (tmp_path / "pneumoniamnist").mkdir()
    np.savez(tmp_path / "pneumoniamnist" / "pneumoniamnist.npz", **{k: v for k, v in (arrays | changes).items() if v is not None})
    monkeypatch.setenv("NOISEC_DATA", str(tmp_path))


def test_pneumonia_is_learned_from_train_and_val_and_judged_on_test(tmp_path, monkeypatch):
    archive(tmp_path, monkeypatch)
    pools, faults = load(data("pneumoniamnist"), tmp_path)
    np.testing.assert_array_equal(pools.learn.pixels, REAL[:40].pixels)
    np.testing.assert_array_equal(pools.learn.labels, REAL[:40].labels % 2)
    np.testing.assert_array_equal(pools.held_out.pixels, REAL[40:].pixels)
    assert (pools.class_names, len(faults)) == (("normal", "pneumonia"), 0)


def test_a_wrong_pneumonia_label_is_named_and_only_its_row_is_left_out(tmp_path, monkeypatch):
    labels = (REAL[30:40].labels % 2).astype(np.int64)[:, None]
    labels[[2, 5]] = [[2], [-1]]
    archive(tmp_path, monkeypatch, val_labels=labels)
    pools, faults = load(data("pneumoniamnist"), tmp_path)
    assert faults.lines() == ["data: 2 left out, label not 0 or 1: val_labels row 2, val_labels row 5"]
    np.testing.assert_array_equal(pools.learn.pixels, np.delete(REAL[:40].pixels, [32, 35], 0))


ARCHIVES = {
    "no validation set": ({"val_images": None, "val_labels": None}, "no arrays val_images and val_labels; put the official"),
    "no test labels": ({"test_labels": None}, "no array test_labels"),
    "too few labels": ({"train_labels": np.zeros((29, 1), np.uint8)}, r"train_labels is uint8 \[29, 1\]; expected integers .* 30 images"),
    "two labels a row": ({"train_labels": np.zeros((30, 2), np.uint8)}, r"train_labels is uint8 \[30, 2\]"),
    "larger images": ({"test_images": np.zeros((20, 64, 64), np.uint8)}, r"test_images are \[20, 1, 64, 64\]; expected \[n, 28, 28\]"),
}


@pytest.mark.parametrize(("changes", "message"), ARCHIVES.values(), ids=ARCHIVES)
def test_a_bad_pneumonia_archive_is_refused(tmp_path, monkeypatch, changes, message):
    archive(tmp_path, monkeypatch, **changes)
    with pytest.raises(NoisecError, match=message):
        load(data("pneumoniamnist"), tmp_path)


@official_set(pneumoniamnist.FOLDER, pneumoniamnist.NAME)
def test_the_official_pneumonia_images_are_all_read(tmp_path):
    pools, faults = load(data("pneumoniamnist"), tmp_path)
    assert (len(pools.learn), len(pools.held_out), len(faults)) == (4708 + 524, 624, 0)
    assert np.bincount(pools.held_out.labels).tolist() == [234, 390]


# GTSRB

HEADER = ("Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId")


def ppm(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).resize((40, 35)).convert("RGB").save(file, "ppm")
    return file.getvalue()


def sign(label):
    """uint8 [3, 32, 32], what the image of a class is read as"""
    picture = Image.open(io.BytesIO(ppm(REAL.pixels[label, 0])))
    return np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def table(rows):
    file = io.StringIO()
    writer = csv.writer(file, delimiter=";", lineterminator="\r\n")
    writer.writerows([HEADER, *((name, 40, 35, 5, 5, 35, 30, label) for name, label in rows)])
    return file.getvalue().encode()


def signs():
    """Real images in the official layout, one training and one test image a class: {zip: {member: content}}."""
    pixels = REAL.pixels[:43, 0]
    training = {}
    for label, image in enumerate(pixels):
        place = f"{gtsrb.TRAINING_IMAGES}{label:05}/"
        training |= {f"{place}GT-{label:05}.csv": table([("00000_00000.ppm", label)]), f"{place}00000_00000.ppm": ppm(image)}
    test = {f"{gtsrb.TEST_IMAGES}{index:05}.ppm": ppm(image) for index, image in enumerate(pixels)}
    test |= {f"{gtsrb.TEST_IMAGES}GT-final_test.test.csv": b"", "GTSRB/Readme-Images-Final-test.txt": b"read me"}
    truth = {gtsrb.TRUTH_TABLE: table([(f"{index:05}.ppm", index) for index in range(43)])}
    return {gtsrb.TRAINING: training, gtsrb.TEST: test, gtsrb.TRUTH: truth}


def write_zips(target, content):
    target.mkdir()
    for name, members in content.items():
        with zipfile.ZipFile(target / name, "w") as file:
            for member, written in members.items():
                file.writestr(member, written)
    return target


def test_signs_are_read_from_the_zips_in_the_order_of_their_tables(tmp_path, capsys):
    spec = data("gtsrb", write_zips(tmp_path / "gtsrb", signs()))
    pools, faults = load(spec, tmp_path / "cache")
    assert (pools.learn.shape, pools.held_out.shape, len(faults)) == ((3, 32, 32), (3, 32, 32), 0)
    assert pools.learn.labels.tolist() == pools.held_out.labels.tolist() == list(range(43))
    for images in (pools.learn, pools.held_out):
        np.testing.assert_array_equal(images.pixels, np.stack([sign(label) for label in range(43)]))
    assert len(pools.class_names) == 43
    assert not list(tmp_path.rglob("*.ppm"))
    load(spec, tmp_path / "cache")
    assert "images: unchanged, reused" in capsys.readouterr().err


def test_signs_are_found_below_noisec_data_and_sized_as_asked(tmp_path, monkeypatch):
    write_zips(tmp_path / "gtsrb", signs())
    monkeypatch.setenv("NOISEC_DATA", str(tmp_path))
    pools, _ = load(data("gtsrb", size=[24, 20], channels=1), tmp_path / "cache")
    assert pools.learn.shape == (1, 24, 20)


SEVEN = f"{gtsrb.TRAINING_IMAGES}00007/"
ONE = "00000_00000.ppm"


def retable(rows):
    return lambda zips: zips[gtsrb.TRAINING].update({f"{SEVEN}GT-00007.csv": table(rows)})


SIGNS = {
    "another class than its folder": (retable([(ONE, 8)]), "wrong label: ClassId differs from its folder", f"{SEVEN}{ONE}"),
    "class 43": (retable([(ONE, 43)]), "wrong label: ClassId not 0 to 42", f"{SEVEN}{ONE}"),
    "class -1": (retable([(ONE, -1)]), "wrong label: ClassId not 0 to 42", f"{SEVEN}{ONE}"),
    "no class": (retable([(ONE, "")]), "wrong label: ClassId not 0 to 42", f"{SEVEN}{ONE}"),
    "listed twice": (retable([(ONE, 7), (ONE, 7)]), "listed twice", f"{SEVEN}{ONE}"),
    "listed, not there": (retable([(ONE, 7), ("b.ppm", 7)]), "listed, but not in the zip file", f"{SEVEN}b.ppm"),
    "there, not listed": (retable([]), "not listed in a table", f"{SEVEN}{ONE}"),
    "truncated image": (
        lambda zips: zips[gtsrb.TEST].update({f"{gtsrb.TEST_IMAGES}00003.ppm": ppm(REAL.pixels[3, 0])[:900]}),
        "broken or truncated",
        f"{gtsrb.TEST_IMAGES}00003.ppm",
    ),
    "no image": (
        lambda zips: zips[gtsrb.TEST].update({f"{gtsrb.TEST_IMAGES}00003.ppm": b"P9"}),
        "not an image",
        f"{gtsrb.TEST_IMAGES}00003.ppm",
    ),
    "a test class of 99": (
        lambda zips: zips[gtsrb.TRUTH].update({gtsrb.TRUTH_TABLE: table([(f"{index:05}.ppm", index or 99) for index in range(43)])}),
        "wrong label: ClassId not 0 to 42",
        f"{gtsrb.TEST_IMAGES}00000.ppm",
    ),
}


@pytest.mark.parametrize(("change", "reason", "name"), SIGNS.values(), ids=SIGNS)
def test_a_bad_sign_is_named_and_the_others_are_kept(tmp_path, change, reason, name):
    zips = signs()
    change(zips)
    pools, faults = load(data("gtsrb", write_zips(tmp_path / "gtsrb", zips)), tmp_path / "cache")
    assert faults.lines() == [f"data: 1 left out, {reason}: {name}"]
    assert len(pools.learn) + len(pools.held_out) >= 85
    for images in (pools.learn, pools.held_out):
        np.testing.assert_array_equal(images.pixels, np.stack([sign(label) for label in images.labels]))
    with pytest.raises(NoisecError, match=f"1 left out, {reason}"):
        faults.finish(strict=True)


def test_a_sign_whose_checksum_is_wrong_is_named(tmp_path):
    zips = signs()
    target = write_zips(tmp_path / "gtsrb", zips)
    content = (target / gtsrb.TEST).read_bytes()
    image = zips[gtsrb.TEST][f"{gtsrb.TEST_IMAGES}00005.ppm"]
    (target / gtsrb.TEST).write_bytes(content.replace(image, image[:-1] + bytes([image[-1] ^ 255]), 1))
    _, faults = load(data("gtsrb", target), tmp_path / "cache")
    assert faults.lines() == [f"data: 1 left out, broken or truncated: {gtsrb.TEST_IMAGES}00005.ppm"]


ZIPS = {
    "a zip is missing": (lambda target: (target / gtsrb.TRUTH).unlink(), f"gtsrb: {gtsrb.TRUTH} not found in .*; put the official"),
    "truncated zip": (lambda target: os.truncate(target / gtsrb.TEST, 5000), f"{gtsrb.TEST}: not a readable zip file"),
    "no truth in its zip": (lambda target: zipfile.ZipFile(target / gtsrb.TRUTH, "w").close(), "no .*GT-final_test.csv"),
}


@pytest.mark.parametrize(("damage", "message"), ZIPS.values(), ids=ZIPS)
def test_a_bad_zip_is_refused(tmp_path, damage, message):
    target = write_zips(tmp_path / "gtsrb", signs())
    damage(target)
    with pytest.raises(NoisecError, match=message):
        load(data("gtsrb", target), tmp_path / "cache")


def test_a_table_without_its_columns_is_refused(tmp_path):
    zips = signs()
    zips[gtsrb.TRUTH][gtsrb.TRUTH_TABLE] = b"Filename,ClassId\n00000.ppm,0\n"
    with pytest.raises(NoisecError, match="no 'Filename' in GT-final_test.csv"):
        load(data("gtsrb", write_zips(tmp_path / "gtsrb", zips)), tmp_path / "cache")


def test_without_the_zips_the_error_says_which_and_where(tmp_path, monkeypatch):
    monkeypatch.delenv("NOISEC_DATA", raising=False)
    with pytest.raises(NoisecError, match=f"{', '.join(gtsrb.FILES)} into a folder and name it in data.path, or into DIR/gtsrb"):
        load(data("gtsrb"), tmp_path)


# Downloads


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A web server with a tar file in the official layout; what is downloaded lands in a temporary folder."""
    import pooch

    (tmp_path / "www").mkdir()
    with tarfile.open(tmp_path / "www" / "set.tar.gz", "w:gz") as file:
        member = tarfile.TarInfo("set/a.bin")
        member.size = 5
        file.addfile(member, io.BytesIO(b"bytes"))
    monkeypatch.delenv("NOISEC_DATA", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda _: tmp_path / "downloads")
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with HTTPServer(("127.0.0.1", 0), partial(handler, directory=tmp_path / "www")) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/set.tar.gz", hashlib.md5((tmp_path / "www" / "set.tar.gz").read_bytes()).hexdigest()
        server.shutdown()
        thread.join()


def test_an_official_archive_is_downloaded_and_unpacked(mirror):
    url, md5 = mirror
    assert official.official_file("set", "a.bin", url, md5, archive=True).read_bytes() == b"bytes"
    assert official.official_file("set", "set.tar.gz", url, md5).stat().st_size


@pytest.mark.parametrize(("end", "md5"), [("", "0" * 32), ("x", None)], ids=["another digest", "not there"])
def test_a_failed_download_says_where_to_put_the_file(mirror, end, md5):
    with pytest.raises(
        NoisecError, match=r"a\.bin: download of http.* failed .*; put the official file into a folder DIR/set and set NOISEC"
    ):
        official.official_file("set", "a.bin", mirror[0] + end, md5 or mirror[1], archive=True)


def test_a_local_file_comes_before_the_shipped_one_and_a_download(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.bin").touch()
    monkeypatch.setenv("NOISEC_DATA", str(tmp_path))
    assert official.official_file("set", "a.bin", "http://nowhere.invalid/a.bin", "", shipped=folder.__file__) == tmp_path / "set" / "a.bin"
