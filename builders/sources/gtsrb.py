"""GTSRB, German traffic signs: the official zip files, read without unpacking them."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from noisec.builders.images import Pools
from noisec.builders.sources import official
from noisec.builders.sources.decoded import Picture, decode, digest, stamp
from noisec.builders.sources.faults import Faults
from noisec.builders.spec import DataSpec
from noisec.errors import NoisecError

TRAINING, TEST, TRUTH = FILES = ("GTSRB_Final_Training_Images.zip", "GTSRB_Final_Test_Images.zip", "GTSRB_Final_Test_GT.zip")
TRAINING_IMAGES, TEST_IMAGES = "GTSRB/Final_Training/Images/", "GTSRB/Final_Test/Images/"
TRUTH_TABLE = "GT-final_test.csv"
SIZE, CHANNELS = (32, 32), 3
CLASSES = (
    "Speed limit 20",
    "Speed limit 30",
    "Speed limit 50",
    "Speed limit 60",
    "Speed limit 70",
    "Speed limit 80",
    "End of speed limit 80",
    "Speed limit 100",
    "Speed limit 120",
    "No passing",
    "No passing for vehicles over 3.5 t",
    "Right of way at the next intersection",
    "Priority road",
    "Yield",
    "Stop",
    "No vehicles",
    "No vehicles over 3.5 t",
    "No entry",
    "General caution",
    "Dangerous curve to the left",
    "Dangerous curve to the right",
    "Double curve",
    "Bumpy road",
    "Slippery road",
    "Road narrows on the right",
    "Road work",
    "Traffic signals",
    "Pedestrians",
    "Children crossing",
    "Bicycles crossing",
    "Beware of ice or snow",
    "Wild animals crossing",
    "End of all speed and passing limits",
    "Turn right ahead",
    "Turn left ahead",
    "Ahead only",
    "Go straight or right",
    "Go straight or left",
    "Keep right",
    "Keep left",
    "Roundabout",
    "End of no passing",
    "End of no passing for vehicles over 3.5 t",
)

Row = tuple[str, str, int | None]
"""member of the zip, ClassId as it is written, class that its folder states"""


def pools(spec: DataSpec, cache: Path, faults: Faults) -> Pools:
    """Learned from: the final training set, 39,209 images; held out: the final test set, 12,630; resized to ``data.size``.

    Raises:
        NoisecError: a zip file is missing or unreadable, or not one image in them is readable.
    """
    folder = _folder(spec.path)
    with ExitStack() as stack:
        training, test, truth = (stack.enter_context(_zip(folder / name)) for name in FILES)
        listed = [
            _pictures(training, _training_rows(training), stamp(folder / TRAINING), faults),
            _pictures(test, _test_rows(truth), stamp(folder / TEST), faults),
        ]

        def opened(name: str) -> io.BytesIO:
            """All of a member, so that its checksum is compared."""
            return io.BytesIO((test if name.startswith(TEST_IMAGES) else training).read(name))

        learn, held_out = decode(folder, listed, opened, spec.size or SIZE, spec.channels or CHANNELS, cache, faults)
    return Pools(learn, held_out, CLASSES, digest(folder, [*listed[0], *listed[1]]))


def _folder(path: Path | None) -> Path:
    folder = path or official.local("gtsrb")
    missing = [name for name in FILES if folder is None or not (folder / name).is_file()]
    if folder is None or missing:
        raise NoisecError(
            f"gtsrb: {', '.join(missing)} not found{f' in {folder}' if folder else ''}; put the official {', '.join(FILES)} into a folder "
            "and name it in data.path, or into DIR/gtsrb and set NOISEC_DATA=DIR"
        )
    return folder


def _zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise NoisecError(f"{path}: not a readable zip file ({error}); put the official one there") from error


def _training_rows(archive: zipfile.ZipFile) -> Iterator[Row]:
    """Every row of every class folder's table."""
    for member in sorted(archive.namelist()):
        table = re.fullmatch(rf"({TRAINING_IMAGES}(\d{{5}})/)GT-\2\.csv", member)
        if table:
            for name, label in _table(archive, member):
                yield table[1] + name, label, int(table[2])


def _test_rows(archive: zipfile.ZipFile) -> Iterator[Row]:
    for name, label in _table(archive, TRUTH_TABLE):
        yield TEST_IMAGES + name, label, None


def _table(archive: zipfile.ZipFile, member: str) -> list[tuple[str, str]]:
    """Filename and ClassId of each row, as they are written.

    Raises:
        NoisecError: the table is missing, broken or without these columns.
    """
    try:
        text = archive.read(member).decode("utf-8-sig", "replace")
        rows = list(csv.DictReader(io.StringIO(text), delimiter=";"))
        return [(row["Filename"] or "", row["ClassId"] or "") for row in rows]
    except KeyError as error:
        raise NoisecError(f"{archive.filename}: no {error} in {member}; put the official zip file there") from error
    except Exception as error:  # on broken members zipfile raises anything, from BadZipFile to zlib.error
        raise NoisecError(f"{archive.filename}: {member} is broken ({error}); put the official zip file there") from error


def _pictures(archive: zipfile.ZipFile, rows: Iterator[Row], changed: str, faults: Faults) -> list[Picture]:
    """The rows that have an image and a right label; every other row, and every image without a row, is a fault."""
    members = set(archive.namelist())
    seen: set[str] = set()
    found = []
    for name, label, stated in rows:
        reason = "listed twice" if name in seen else _wrong(name, label, stated, members)
        seen.add(name)
        if reason:
            faults.add(name, reason)
        else:
            found.append(Picture(name, int(label), changed))
    for name in sorted(name for name in members - seen if name.endswith(".ppm")):
        faults.add(name, "not listed in a table")
    return found


def _wrong(name: str, label: str, stated: int | None, members: set[str]) -> str | None:
    if name not in members:
        return "listed, but not in the zip file"
    if not re.fullmatch(r"[0-9]{1,5}", label) or int(label) >= len(CLASSES):
        return f"wrong label: ClassId not 0 to {len(CLASSES) - 1}"
    if stated is not None and int(label) != stated:
        return "wrong label: ClassId differs from its folder"
    return None
