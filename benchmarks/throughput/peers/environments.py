"""Each peer in an environment of its own: their requirements exclude each other's, and ours."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from noisec.benchmarks.throughput.peers.registry import Peer
from noisec.builders.progress import console
from noisec.errors import NoisecError

STAMP = "noisec-requirements.txt"
"""in a finished environment: what was installed"""
LAST_LINES = 12


def prepare(peer: Peer, work: Path) -> Path:
    """The peer's environment below ``work``: made once, and again when its requirements change.

    Raises:
        NoisecError: pip fails; the message holds its last lines.
    """
    folder = (work / peer.package).resolve()
    stamp, wanted = folder / STAMP, "\n".join(peer.requirements) + "\n"
    if stamp.is_file() and stamp.read_text() == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    with console.status(f"{peer.name} {peer.version}: installing {len(peer.requirements)} packages into {folder}"):
        _run(peer, [sys.executable, "-m", "venv", str(folder)])
        requirements = folder / "wanted.txt"
        requirements.write_text(wanted)
        pip = [f"{folder}/bin/python", "-m", "pip", "install", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
        _run(peer, [*pip, "--requirement", str(requirements)])
    stamp.write_text(wanted)
    return folder


def _run(peer: Peer, command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        end = "\n".join(done.stdout.splitlines()[-LAST_LINES:])
        raise NoisecError(f"{peer.name} {peer.version} cannot be installed for Python {sys.version.split()[0]}:\n{end}")
