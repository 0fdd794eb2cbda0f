"""The controller beside a server that is under load."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from backend.errors import ConfigError
from backend.serving.launch_client import RunningServer
from backend.serving.triton_server import PRODUCT_ROOT
from loadtest.record import Slo


@contextlib.contextmanager
def running_controller(
    server: RunningServer, slo: Slo, law: str, *, events: Path, log: Path, max_loss_percent: float | None = None
) -> Iterator[None]:
    """The sidecar, as a user starts it; ended with SIGTERM. Its event log goes to `events`, what it prints to `log`.

    Raises ConfigError if it ended by itself.
    """
    command = [sys.executable, "-m", "controller", "--triton", server.grpc, "--law", law]
    command += ["--ttft-slo", str(slo.ttft_s), "--itl-slo", str(slo.itl_s)]
    command += ["--log", str(events.absolute()), "--metrics-port", "0"]
    if max_loss_percent is not None:
        command += ["--max-quality-loss", str(max_loss_percent)]
    with open(log, "w") as printed:
        process = subprocess.Popen(command, cwd=PRODUCT_ROOT, stdout=printed, stderr=printed, stdin=subprocess.DEVNULL)
        try:
            yield
            if process.poll() is not None:
                raise ConfigError(f"the controller ended with status {process.returncode}; see {log}")
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
