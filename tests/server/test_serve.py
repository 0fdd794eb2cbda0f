"""`make serve`: the server and its controller live and end together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from backend.serving.launch_processes import has_ended
from backend.serving.triton_server import PRODUCT_ROOT
from controller.client import BrownoutClient
from tests.server.conftest import TINY
from tests.server.observe import command_of
from tests.serving.launch_echo import make_repository
from tests.waiting import wait_until

pytestmark = pytest.mark.server


@contextlib.contextmanager
def serving(folder: Path, *server_flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the gRPC address of the server that it has started. What it notes is in the folder's file stderr."""
    command = [sys.executable, "-m", "controller.serve", "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    command += [*server_flags, "--", "--owner", "sidecar", "--mechanism", "drop", "--metrics-port", "0"]
    with open(folder / "stderr", "w") as stderr:
        process = subprocess.Popen(
            command, cwd=PRODUCT_ROOT, env=os.environ | TINY, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    try:
        ready = process.stdout.readline()
        assert ready.startswith("READY http="), (folder / "stderr").read_text()
        yield process, dict(part.split("=", 1) for part in ready.split()[1:])["grpc"]
    finally:
        process.kill()
        process.communicate()


def controllers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children() if "controller" in command_of(child)]


def test_server_and_controller_start_and_end_together(tmp_path: Path) -> None:
    """A controller that died is started again; SIGTERM ends everything in order and leaves no process.

    What server, engine and controller log is on stderr.
    """
    with serving(tmp_path) as (process, grpc):
        client = BrownoutClient(grpc)
        wait_until(lambda: client.call()["settings"]["owner"] == "sidecar", 30, "in charge")
        client.close()
        (first,) = controllers(process)
        first.kill()
        wait_until(lambda: [c.pid for c in controllers(process)] not in ([], [first.pid]), 20, "started again")
        everything = psutil.Process(process.pid).children(recursive=True)
        assert len(everything) >= 5  # launcher, server, stubs, engine, controller
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert all(map(has_ended, everything))
        log = (tmp_path / "stderr").read_text()
        assert "serve: the controller died" in log
        assert "Started GRPCInferenceService" in log and "engine 0 is ready" in log and "controller control" in log


def test_a_killed_front_takes_everything_with_it(tmp_path: Path) -> None:
    with serving(tmp_path, "--model-repository", str(make_repository(tmp_path / "models"))) as (process, _):
        wait_until(lambda: controllers(process), 20, "controlled")
        everything = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        wait_until(lambda: all(map(has_ended, everything)), 20, "all ended")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--", "--law", "magic"], "law: Input should be 'salc', 'predictive' or 'off'"),
        (["--", "--triton", "localhost:1"], "--triton is not for here"),
    ],
)
def test_a_controller_that_cannot_be_is_said_before_anything_starts(arguments: list[str], complaint: str) -> None:
    command = [sys.executable, "-m", "controller.serve", *arguments]
    ended = subprocess.run(command, cwd=PRODUCT_ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert complaint in ended.stderr
