"""What dies comes back, nobody is left hanging, and what ends leaves nothing behind."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from backend.serving.launch_client import RunningServer, running_server
from backend.serving.supervisor import BACKOFF_S
from backend.serving.triton_server import PRODUCT_ROOT
from tests.server.conftest import SMALL, TINY
from tests.server.observe import (
    descendants,
    engine_process,
    engine_processes,
    launch_name,
    runtime_dir,
    stub_process,
)
from tests.server.talk import ASK, STREAMS, ServerError, check_code, generate, get, sampling
from tests.waiting import wait_until

pytestmark = pytest.mark.server

ENDLESS = {"text_input": "for ever", "sampling_parameters": sampling(max_tokens=10**6)}
SHORT = {"text_input": "Hi", "sampling_parameters": sampling(max_tokens=3)}


class Call(threading.Thread):
    """A request in the background: its first response, its end and its error, each with the time."""

    def __init__(self, server: RunningServer, interface: str, inputs: dict) -> None:
        super().__init__(name=interface, daemon=True)
        self._server, self._interface, self._inputs = server, interface, inputs
        self.first = threading.Event()
        self.error: Exception | None = None
        self.ended_s = 0.0
        self.start()

    def run(self) -> None:
        try:
            if self._interface in STREAMS:
                for _ in STREAMS[self._interface](self._server, self._inputs):
                    self.first.set()
            else:
                ASK[self._interface](self._server, self._inputs)
        except (ServerError, OSError, queue.Empty) as error:
            self.error = error
        self.ended_s = time.monotonic()


def wait_for_end(calls: list[Call], timeout_s: float) -> None:
    wait_until(lambda: not any(call.is_alive() for call in calls), timeout_s, f"every one of {calls} ended")


def wait_until_served(server: RunningServer, timeout_s: float) -> None:
    def served() -> bool:
        try:
            return bool(generate(server, SHORT).text)
        except (ServerError, OSError):
            return False

    wait_until(served, timeout_s, "served again")


def test_a_killed_engine_ends_its_requests_with_an_error_and_comes_back(small_server: RunningServer) -> None:
    """Each within 2 s, over every interface; until the engine is back, new requests are UNAVAILABLE."""
    expected = generate(small_server, SHORT).text
    streams = [Call(small_server, interface, ENDLESS) for interface in STREAMS]
    assert all(call.first.wait(20) for call in streams)
    waiting = [Call(small_server, interface, ENDLESS) for interface in ASK if interface not in STREAMS]
    engine = engine_process(small_server)
    killed_s = time.monotonic()
    engine.kill()
    wait_for_end(streams + waiting, 10)
    for call in streams + waiting:
        assert call.ended_s - killed_s <= 2, call
        assert "the engine process ended unexpectedly" in str(call.error) or "being restarted" in str(call.error), call
    for interface, ask in ASK.items():
        with pytest.raises(ServerError, match=r"being restarted; retry in about \d+ s") as refusal:
            ask(small_server, SHORT)
        check_code(refusal.value, interface, "UNAVAILABLE")
    wait_until_served(small_server, 60)
    assert generate(small_server, SHORT).text == expected
    assert engine_process(small_server).pid != engine.pid
    assert small_server.messages() == ""  # the launcher had nothing to do


def test_a_killed_stub_brings_the_whole_server_back(small_server: RunningServer) -> None:
    """Within 30 s on the same ports; streams end rather than hang, and no process of before is left."""
    expected = generate(small_server, SHORT).text
    before = descendants(small_server)
    streams = [Call(small_server, interface, ENDLESS) for interface in STREAMS]
    assert all(call.first.wait(20) for call in streams)
    killed_s = time.monotonic()
    stub_process(small_server, "moe_llm").kill()
    wait_for_end(streams, 10)
    wait_until_served(small_server, 30 - (time.monotonic() - killed_s))
    assert generate(small_server, SHORT).text == expected
    assert not any(process.is_running() for process in before)
    assert "the stub of moe_llm" in small_server.messages()


def test_sigterm_ends_live_streams_and_leaves_nothing(tmp_path: Path) -> None:
    """With the default drain time: all gone within 10 s, every request told, no process, socket or memory left."""
    with running_server(env=SMALL, log=tmp_path / "server.log") as server:
        processes = [psutil.Process(server.pid), *descendants(server)]
        folder, name = runtime_dir(server), launch_name(server)
        calls = [Call(server, interface, ENDLESS) for interface in STREAMS]
        assert all(call.first.wait(20) for call in calls)
        calls += [Call(server, "grpc_infer", ENDLESS)]
        stopped_s = time.monotonic()
        server.process.terminate()
        assert server.process.wait(timeout=20) == 0
        took_s = time.monotonic() - stopped_s
        wait_for_end(calls, 5)
        assert [call for call in calls if call.error is None] == []
        for call in calls[:2]:
            assert "the engine is shutting down" in str(call.error)
        assert not any(process.is_running() for process in processes)
        assert not folder.exists()
        assert list(Path("/dev/shm").glob(f"*{name}*")) == []
    assert took_s <= 10


def test_a_second_start_on_the_same_ports_says_so_and_disturbs_nobody(server: RunningServer) -> None:
    expected = generate(server, SHORT).text
    ports = [address.split(":")[1] for address in (server.http, server.grpc, server.metrics)]
    command = [sys.executable, "-m", "backend.serving.launch", "--http-port", ports[0], "--grpc-port", ports[1]]
    second = subprocess.run(
        [*command, "--metrics-port", ports[2]], cwd=PRODUCT_ROOT, capture_output=True, text=True, timeout=60
    )
    assert (second.returncode, second.stdout) == (1, "")
    assert f"http port {ports[0]} on 127.0.0.1 is taken" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
    assert generate(server, SHORT).text == expected


def test_an_engine_that_dies_again_and_again_is_given_up_and_the_models_unloaded(tmp_path: Path) -> None:
    """Then the server is no longer ready and requests are refused at once, not queued for nothing."""
    log = tmp_path / "server.log"
    with running_server(env=TINY, log=log, drain_timeout_s=1) as server:
        assert generate(server, SHORT).text
        killed = set()

        def ready() -> bool:
            return get(server.http, "/v2/models/moe_llm/ready")[0] == 200

        def kill_every_engine_until_given_up() -> bool:
            for process in engine_processes(server):
                if process.pid not in killed:
                    killed.add(process.pid)
                    process.kill()
            return not ready() and get(server.http, "/v2/models/moe_llm_infer/ready")[0] != 200

        wait_until(kill_every_engine_until_given_up, sum(BACKOFF_S) + 60, "given up")
        assert len(killed) == len(BACKOFF_S) + 1
        for interface in ("generate", "grpc_infer"):
            with pytest.raises(ServerError) as refusal:
                ASK[interface](server, SHORT)
            assert refusal.value.code in ("INVALID_ARGUMENT", "NOT_FOUND", "UNAVAILABLE")
        assert "is unloaded" in log.read_text(errors="replace")
