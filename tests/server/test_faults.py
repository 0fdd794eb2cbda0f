"""What dies comes back, nobody is left hanging, and what ends leaves nothing behind."""

from __future__ import annotations

import queue
import shutil
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from backend.config import DEMO_CHECKPOINT
from backend.serving.launch_client import RunningServer, running_server
from tests.server.conftest import SMALL
from tests.server.observe import (
    descendants,
    engine_process,
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


@pytest.mark.timed
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


@pytest.mark.timed
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


@pytest.mark.timed
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


def test_an_engine_that_cannot_come_back_is_given_up_and_the_server_with_it(tmp_path: Path) -> None:
    """With status 1 and the reason, for whoever starts servers. One that a user has unloaded a model of goes on."""
    log, checkpoint = tmp_path / "server.log", tmp_path / "checkpoint"
    shutil.copytree(DEMO_CHECKPOINT, checkpoint)
    with running_server(env={"MOE_LLM_CHECKPOINT": str(checkpoint)}, log=log, drain_timeout_s=1) as server:
        everything = descendants(server)
        urllib.request.urlopen(f"http://{server.http}/v2/repository/models/moe_llm_infer/unload", data=b"{}").close()
        wait_until(lambda: get(server.http, "/v2/models/moe_llm_infer/ready")[0] != 200, 30, "unloaded")
        assert generate(server, SHORT).text
        assert server.process.poll() is None
        shutil.rmtree(checkpoint)
        engine_process(server).kill()
        assert server.process.wait(60) == 1
        assert server.messages().startswith(
            f"launch: the server is given up: moe_llm: parameter checkpoint: '{checkpoint}'"
        )
        assert not any(process.is_running() for process in everything)
        assert "moe_llm is unloaded" in log.read_text(errors="replace")
