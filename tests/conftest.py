"""A real tritonserver with the reference guard, and real images."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.grpc as triton_grpc

from noisec.builders.images import Images, cut
from noisec.builders.sources import fashion_mnist
from noisec.builders.spec import GUARDS, GuardSpec, read_spec
from noisec.clients import GuardClient
from noisec.python_backend.server import EmbeddedServer

ROOT = Path(__file__).parent.parent
REPOSITORY = ROOT / "model_repository"
GUARD = "fashion_mnist"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file with the longest test first, so that files that run beside it end with it."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


def images_answered(url: str) -> dict[str, int]:
    """Model -> images that it has answered, once that stands still: Triton counts a request after it has answered it."""

    def read() -> dict[str, int]:
        with triton_grpc.InferenceServerClient(url) as client:
            return {model.name: model.inference_count for model in client.get_inference_statistics().model_stats}

    found = read()
    while True:
        time.sleep(0.2)
        before, found = found, read()
        if found == before:
            return found


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def spec() -> GuardSpec:
    return read_spec(GUARDS / f"{GUARD}.toml")


@pytest.fixture(scope="session")
def report(spec: GuardSpec) -> Images:
    """Clean images that neither trained, fitted nor calibrated the reference guard."""
    return cut(fashion_mnist.load("t10k"), (spec.data.calibrate, spec.data.report), [spec.seed, 1])[1]


@pytest.fixture(scope="session")
def pixels(report: Images) -> npt.NDArray[np.float32]:
    """float32 [200, 1, 28, 28]"""
    return report[:200].floats()


@pytest.fixture(scope="session")
def started() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(REPOSITORY) as running:
        yield running


@pytest.fixture
def server(started: EmbeddedServer) -> EmbeddedServer:
    """One server for all tests of this process; where an earlier test has ended it, its log says why."""
    assert started.is_alive(), f"the server has ended:\n{started.logs()[-4000:]}"
    return started


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[GuardClient]:
    with GuardClient(server.grpc_url, GUARD) as connected:
        yield connected
