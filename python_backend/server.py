"""The embedded server: the real ``tritonserver`` that the nvidia-pytriton wheel carries, with our stand-in backends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from noisec.contract import LABEL_MODEL, stage_model
from noisec.errors import NoisecError
from noisec.manifest import CONFIG, UNFINISHED, guards, verify_repository

try:
    import psutil
    import tritonclient.grpc as triton_grpc
    from google.protobuf import text_format
    from pytriton.server.python_backend_config import PythonBackendConfig
    from pytriton.server.triton_server import TritonServer
    from pytriton.server.triton_server_config import TritonServerConfig
    from pytriton.utils.distribution import get_libs_path, get_root_module_path, get_stub_path
    from tritonclient.grpc import model_config_pb2
except ImportError as error:
    raise NoisecError(f"the embedded server needs {error.name}: pip install 'noisec-triton[serve]'") from error

LOG_CHARACTERS = 200_000
EXIT_SECONDS = 10
"""for requests in flight, once the server is told to stop"""
START_SECONDS, STOP_SECONDS = 10.0, 20.0
"""in which a new process has become the server, and in which one has ended, at the latest"""
FOLDER = "noisec-server-"
RUNTIMES = Path(__file__).parent / "runtimes"
BACKENDS = "NOISEC_BACKENDS"
"""environment variable: a folder with backends of Triton's own, such as a container's ``/opt/tritonserver/backends``"""


class _Config(TritonServerConfig):  # type: ignore[misc]
    """pytriton's server arguments, with True for a flag that takes no value."""

    def to_args_list(self) -> list[str]:
        return [argument.removesuffix("=True") for argument in self.to_cli_string().split()]


class _Server(TritonServer):  # type: ignore[misc]
    """pytriton's server process with the environment that the Python backend's stub needs."""

    def _get_env(self) -> dict[str, str]:
        env: dict[str, str] = super()._get_env()
        # The stub links libpython3.X.so: the running Python's own must be found before the system's, of another patch level.
        env["LD_LIBRARY_PATH"] = f"{sysconfig.get_config_var('LIBDIR')}:{env['LD_LIBRARY_PATH']}"
        env["OMP_NUM_THREADS"] = env["OPENBLAS_NUM_THREADS"] = env["MKL_NUM_THREADS"] = "1"
        return env

    def stop(self) -> None:
        """End the process with SIGTERM, once it is the server: before that it is still a Python, which loses signals. Pytriton's SIGINT is
        ignored until the models are loaded, where this process was started in a shell's background."""
        if self.is_alive():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(self._tritonserver_running_cmd.pid)
                _wait_for(lambda: process.name() == "tritonserver", START_SECONDS)
                process.terminate()
            _wait_for(lambda: not self.is_alive(), STOP_SECONDS)
        super().stop()  # kills one that is still alive

    def drain(self) -> None:
        """Wait until all that the process printed, which has ended, is recorded."""
        self._tritonserver_running_cmd.process.wait()

    def _record_logs(self, line: bytes | str) -> None:
        """Keep the end of the log; pytriton would keep all of it."""
        text = line.decode("utf-8", errors="replace") if isinstance(line, bytes) else line
        if self._verbose:
            print(text, end="", flush=True)
        self._tritonserver_logs: str = (self._tritonserver_logs + text)[-LOG_CHARACTERS:]


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Until it holds, or for so long."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


class EmbeddedServer:
    """Serves a model repository on this machine; a context manager.

    Example::

        with EmbeddedServer(Path("model_repository")) as server:
            client = GuardClient(server.grpc_url, "fashion_mnist")

    Args:
        repository: folder with one or more guards
        host: address to listen on
        http_port, grpc_port, metrics_port: 0 takes a free port
        ready_seconds: how long the models may take to load
        verbose: print the server's log as it comes; otherwise it is kept for ``logs()``
        model_control: ``none`` loads everything once; ``explicit`` lets clients load and unload releases
        check: refuse a repository whose files are not those of its manifests, as after an interrupted build or a manipulation

    Raises:
        NoisecError: the repository has no guard, a port is taken, or a model does not load (the message holds Triton's reason).
    """

    def __init__(
        self,
        repository: Path,
        *,
        host: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        ready_seconds: float = 60,
        verbose: bool = False,
        model_control: str = "none",
        check: bool = True,
    ) -> None:
        if not repository.is_dir() or not guards(repository):
            raise NoisecError(f"{repository}: no guard in this folder; build one with 'noisec build GUARD.toml --repository {repository}'")
        problems = verify_repository(repository) if check else []
        if problems:
            raise NoisecError("\n".join([f"{repository}: not as it was built, so it is not served; build the guard again", *problems[:20]]))
        self.repository = repository.resolve()
        self.host = host
        self.http_port, self.grpc_port, self.metrics_port = _ports(host, http_port, grpc_port, metrics_port)
        self._ready_seconds = ready_seconds
        self._verbose = verbose
        self._model_control = model_control
        self._folder: Path | None = None
        self._server: _Server | None = None
        self._region = f"noisec-{os.getpid()}-{self.grpc_port}-"

    @property
    def grpc_url(self) -> str:
        """``host:port``, as tritonclient wants it"""
        return f"{self.host}:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        return f"{self.host}:{self.http_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self.host}:{self.metrics_port}/metrics"

    def start(self) -> EmbeddedServer:
        """Start the process and wait until every model is ready."""
        if re.search(r"\s", tempfile.gettempdir()):  # Triton starts its Python processes through a shell
            raise NoisecError(f"the folder for temporary files is {tempfile.gettempdir()!r}: set TMPDIR to one without spaces in its name")
        _remove_abandoned()
        self._folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-"))
        try:
            _assemble_backends(self._folder / "backends")
            _link(self.repository, self._folder / "models")
            self._server = _Server(
                path=get_root_module_path() / "tritonserver" / "bin" / "tritonserver",
                libs_path=get_libs_path(),
                config=self._config(self._folder),
                verbose=self._verbose,
            )
            with _deferred_signals():  # a process whose launch they interrupt is not known to this one, which could not stop it
                self._server.start()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def refresh(self) -> None:
        """Take up releases that were written since the start; with ``explicit`` model control, clients may then load them."""
        assert self._folder is not None
        _link(self.repository, self._folder / "models")

    def stop(self) -> None:
        """Let requests in flight finish, end the process and remove what it left: Python processes, where it ended by itself, and memory in
        /dev/shm. May be called twice. A second Ctrl-C waits for that."""
        with _deferred_signals():
            if self._server is not None:
                self._server.stop()
            if self._folder is not None:
                _end_processes_of(self._folder)
            for region in Path("/dev/shm").glob(f"{self._region}*"):
                with suppress(FileNotFoundError):
                    region.unlink()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def is_alive(self) -> bool:
        return self._server is not None and bool(self._server.is_alive())

    def logs(self) -> str:
        """The last that the server has printed, at most `LOG_CHARACTERS`."""
        return str(self._server.logs()) if self._server else ""

    def __enter__(self) -> EmbeddedServer:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _config(self, folder: Path) -> Any:
        backends = folder / "backends"
        config = _Config()
        config["model-repository"] = folder / "models"
        config["backend-directory"] = backends
        config["disable-auto-complete-config"] = True
        config["model-control-mode"] = self._model_control
        if self._model_control == "explicit":
            config["load-model"] = [*guards(self.repository), *label_models(self.repository)]
        for protocol, port in (("http", self.http_port), ("grpc", self.grpc_port), ("metrics", self.metrics_port)):
            config[f"{protocol}-address"] = self.host
            config[f"{protocol}-port"] = port
        config["exit-timeout-secs"] = EXIT_SECONDS
        shared_memory = PythonBackendConfig()
        shared_memory["shm-region-prefix-name"] = self._region
        arguments = shared_memory.to_list_args()
        names = ["python", *(path.name for path in backends.iterdir() if path.name != "python")]
        config["backend-config"] = [argument.replace("python,", f"{name},", 1) for name in names for argument in arguments]
        return config

    def _wait_until_ready(self) -> None:
        assert self._server is not None
        deadline = time.monotonic() + self._ready_seconds
        with triton_grpc.InferenceServerClient(self.grpc_url) as client:
            while time.monotonic() < deadline:
                if not self.is_alive():
                    self._server.drain()
                    raise NoisecError(f"{self.repository}: the server stopped while it loaded:\n{self.reasons()}")
                with suppress(triton_grpc.InferenceServerException):
                    if client.is_server_ready():
                        return
                time.sleep(0.05)
        late = f"not ready after {self._ready_seconds:g} s: give it more (ready_seconds, or --ready-seconds)"
        raise NoisecError(f"{self.repository}: {late}; the end of the log:\n{self.reasons()}")

    def reasons(self) -> str:
        """The lines of the log that say what went wrong, or else its end."""
        lines = self.logs().splitlines()
        wrong = [line for line in lines if re.match(r"[EF]\d{4} |error", line)]
        return "\n".join((wrong or lines)[-12:])


def _link(repository: Path, target: Path) -> None:
    """A model repository made of links to another, as it is now.

    The Python backend starts its processes through a shell, which takes a path with spaces apart, and its interpreter leaves compiled code
    beside a model's code and would run what it finds there. So code is linked file by file into folders of the server's own, without any
    compiled code, and the repository stays as it was built.
    """
    for link in [path for path in target.rglob("*") if path.is_symlink() and not path.exists()]:
        link.unlink()
    for model in sorted(path for path in repository.iterdir() if path.is_dir()):
        for entry in sorted(path for path in model.iterdir() if not path.name.startswith(UNFINISHED)):
            with_code = entry.is_dir() and any(entry.glob("*.py"))
            for source in [path for path in entry.iterdir() if path.name != "__pycache__"] if with_code else [entry]:
                link = target / source.relative_to(repository)
                if link.parent.is_symlink():  # a version folder that held no code before
                    link.parent.unlink()
                if link.is_dir() and not link.is_symlink():  # one that held code
                    shutil.rmtree(link)
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():
                    link.symlink_to(source)


def _end_processes_of(folder: Path) -> None:
    """Triton that was killed, or that has crashed, leaves the processes of its Python backend."""
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [""])[0].startswith(f"{folder}/"):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _remove_abandoned() -> None:
    """Folders and memory regions of servers whose process is gone without having cleaned up."""
    for path in [*Path(tempfile.gettempdir()).glob(f"{FOLDER}*"), *Path("/dev/shm").glob("noisec-*")]:
        pid = next(iter(re.findall(r"noisec-(?:server-)?(\d+)-", path.name)), None)
        if pid and not Path("/proc", pid).exists():
            with suppress(OSError):  # gone by now, or another user's
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _assemble_backends(target: Path) -> None:
    """A backend directory: pytriton's Python backend with the stub of this Python beside it, and our stand-ins, or instead of them those of
    Triton's own that a folder holds.

    Raises:
        NoisecError: there is no Python backend for this Python, or no backend in the folder.
    """
    python = target / "python"
    shutil.copytree(get_root_module_path() / "tritonserver" / "backends" / "python", python)
    stub = get_stub_path(f"{sys.version_info.major}.{sys.version_info.minor}")
    if not stub.is_file():
        raise NoisecError(
            f"nvidia-pytriton has no Python backend for Python {sys.version_info.major}.{sys.version_info.minor}; use 3.10 to 3.12"
        )
    shutil.copy(stub, python)
    own = native_backends()
    for stand_in in RUNTIMES.glob("*/model.py"):
        name = stand_in.parent.name
        if name in own:
            (target / name).symlink_to(own[name])
        else:
            (target / name).mkdir()
            shutil.copy(stand_in, target / name)


def native_backends() -> dict[str, Path]:
    """Triton's own backends that take the stand-ins' place: name -> folder.

    Raises:
        NoisecError: the folder that is named holds none.
    """
    if not (place := os.environ.get(BACKENDS)):
        return {}
    names = sorted(path.parent.name for path in RUNTIMES.glob("*/model.py"))
    libraries = {name: Path(place).resolve() / name / f"libtriton_{name}.so" for name in names}
    found = {name: path.parent for name, path in libraries.items() if path.is_file()}
    if not found:
        wanted = " and no ".join(f"{name}/{path.name}" for name, path in libraries.items())
        raise NoisecError(f"{BACKENDS}={place}: no {wanted} in this folder")
    return found


def _ports(host: str, *wanted: int) -> list[int]:
    """The ports asked for, with a free one in the place of each 0.

    Raises:
        NoisecError: a port is taken or may not be used.
    """
    given = [port for port in wanted if port]
    if len(given) > len(set(given)):
        raise NoisecError(f"HTTP, gRPC and metrics ports are {', '.join(map(str, wanted))}: each needs one of its own, or 0 for a free one")
    if ":" in host:
        raise NoisecError(f"--host {host}: IPv6 addresses are not supported; give an IPv4 address or a name")
    sockets: list[socket.socket] = []
    try:
        for port in wanted:
            probe = socket.socket(socket.AF_INET)
            sockets.append(probe)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except (OSError, OverflowError) as error:
                raise NoisecError(f"cannot listen on {host}:{port}: {error}; choose another port, or 0 for a free one") from error
        return [int(probe.getsockname()[1]) for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM as they come; the former handlers come back at the end.

    No ``threading.Event``: a handler that sets one while the same thread is about to wait for it waits for its lock for ever.
    """
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """SIGINT and SIGTERM act at the end of the block; threads other than the main one get none."""
    in_main = threading.current_thread() is threading.main_thread()
    deferred: AbstractContextManager[list[int]] = stop_signals() if in_main else nullcontext([])
    caught: list[int] = []
    try:
        with deferred as caught:
            yield
    finally:
        for number in caught:
            signal.raise_signal(number)


def label_models(repository: Path) -> list[str]:
    """The models that answer labels alone of guards that do not do so themselves; with an ensemble Triton loads its own stages only."""
    configs = [text_format.Parse((repository / guard / CONFIG).read_text(), model_config_pb2.ModelConfig()) for guard in guards(repository)]
    return [config.parameters[LABEL_MODEL].string_value for config in configs if LABEL_MODEL in config.parameters]


def ended_by_the_impatient(repository: Path) -> list[str]:
    """Guards with two classifier passes side by side: Triton before 26.05 may end when a client gives up a request of theirs."""
    configs = {guard: (repository / guard / "config.pbtxt").read_text() for guard in guards(repository)}
    return [guard for guard, config in configs.items() if config.count(f'model_name: "{stage_model(guard, "classifier")}"') > 2]


def serve(server: EmbeddedServer) -> None:
    """Start a server and let it serve until SIGINT or SIGTERM.

    Raises:
        NoisecError: it cannot start, or has stopped by itself.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # while the models load; what has been started is then stopped
    try:
        server.start()
    except KeyboardInterrupt:
        print("stopped before the models were loaded", flush=True)
        return
    with stop_signals() as caught, ExitStack() as stack:
        stack.callback(server.stop)
        print(f"ready: gRPC {server.grpc_url}, HTTP http://{server.http_url}, metrics {server.metrics_url}", flush=True)
        print(f"guards: {', '.join(guards(server.repository))}; stop with Ctrl-C", flush=True)
        if endangered := ", ".join(ended_by_the_impatient(server.repository)):
            print(f"clients that give up can end this server: noisec arrange copies {endangered} fused (docs/known-issues.md)", flush=True)
        while not caught:
            if not server.is_alive():
                raise NoisecError(f"the server stopped by itself; the end of its log:\n{server.reasons()}")
            time.sleep(0.2)
        print("stopping", flush=True)
