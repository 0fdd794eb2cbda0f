"""Start the launcher from Python, for tests, the demo and benchmarks: `with running_server() as server: …`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from backend.errors import ConfigError
from backend.serving.triton_server import PRODUCT_ROOT

#: The launcher bounds its own end (10 s with the default drain timeout); beyond the drain timeout it gets so long.
_STOP_GRACE_S = 10.0


@dataclass(frozen=True)
class RunningServer:
    """A launcher whose server is ready. Addresses are HOST:PORT."""

    http: str
    grpc: str
    metrics: str
    #: Server output; the launcher's own messages are in `messages()`.
    log_path: Path
    process: subprocess.Popen[str]
    _stderr: IO[str]

    @property
    def pid(self) -> int:
        """The launcher's; the server and its stubs are below it."""
        return self.process.pid

    def messages(self) -> str:
        """What the launcher has written to stderr so far, such as restarts."""
        return _read(self._stderr)


@contextlib.contextmanager
def running_server(
    *,
    env: Mapping[str, str] | None = None,
    host: str = "127.0.0.1",
    http_port: int = 0,
    grpc_port: int = 0,
    metrics_port: int = 0,
    log: Path | str | None = None,
    model_repository: Path | str | None = None,
    models: Sequence[str] = (),
    startup_timeout_s: float = 120.0,
    drain_timeout_s: float = 5.0,
) -> Iterator[RunningServer]:
    """Start the server, wait until it is ready, end it and all its processes on the way out.

    `env` is added to this process's environment. Port 0 is a free one. Without `log` the server's output goes to a
    temporary file that is removed in the end. A server that does not start is a ConfigError with the launcher's reason.
    """
    with contextlib.ExitStack() as stack:
        if log is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="brownoutserve-log-"))
            log = Path(folder) / "server.log"
        log_path = Path(log).absolute()
        command = [sys.executable, "-m", "backend.serving.launch", "--stop-with-parent", "--host", host]
        command += ["--http-port", str(http_port), "--grpc-port", str(grpc_port), "--metrics-port", str(metrics_port)]
        command += ["--log", str(log_path), "--startup-timeout", str(startup_timeout_s)]
        command += ["--drain-timeout", str(drain_timeout_s)]
        if model_repository is not None:
            command += ["--model-repository", str(Path(model_repository).absolute())]
        if models:
            command += ["--models", *models]
        stderr = stack.enter_context(tempfile.TemporaryFile("w+"))
        process = stack.enter_context(
            subprocess.Popen(
                command,
                cwd=PRODUCT_ROOT,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        )
        stack.callback(_end, process, drain_timeout_s + _STOP_GRACE_S)
        assert process.stdout is not None
        line = process.stdout.readline()  # the launcher bounds the wait by its start-up timeout
        if not line.startswith("READY "):
            _end(process, drain_timeout_s + _STOP_GRACE_S)
            message = _read(stderr).strip().removeprefix("launch: ")
            raise ConfigError(message or f"the launcher ended with status {process.returncode}")
        addresses = dict(part.split("=", 1) for part in line.split()[1:])
        yield RunningServer(**addresses, log_path=log_path, process=process, _stderr=stderr)


def _end(process: subprocess.Popen[str], timeout_s: float) -> None:
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _read(file: IO[str]) -> str:
    """All of a file that another process appends to, through the shared descriptor without moving its end."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")
