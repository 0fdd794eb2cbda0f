"""Stub and engine process without Triton: start, share, die, come back, hand over, go."""

import os
import threading
import time

import numpy as np
import psutil
import pytest

from backend.brownout.block import Block, block_path
from backend.config import EngineConfig
from backend.engine.sampling_params import SamplingParams
from backend.errors import ConfigError, UnavailableError
from backend.serving import client, server_watch, supervisor
from backend.serving.client import EngineClient
from backend.serving.protocol import EngineRecord
from tests.waiting import wait_until

CONFIG = EngineConfig(checkpoint="dummy:tiny", kv_cache_blocks=500, max_waiting=4)


class Stub:
    """An EngineClient that keeps what it hears."""

    def __init__(self, runtime_dir, name="stub", config=CONFIG, server_pid=None):
        self.runtime_dir = runtime_dir
        self.tokens, self.ended, self.lost = {}, {}, {}
        self.changed = threading.Condition()
        self.client = EngineClient(name, config, runtime_dir, server_pid or os.getpid(), self._outputs, self._lost)

    def _outputs(self, outputs):
        with self.changed:
            for token in outputs.tokens:
                self.tokens.setdefault(token.request_id, []).append(token)
            for ended in outputs.ended:
                self.ended[ended.request_id] = ended
            self.changed.notify_all()

    def _lost(self, request_ids, reason):
        with self.changed:
            self.lost |= dict.fromkeys(request_ids, reason)
            self.changed.notify_all()

    def submit(self, number, max_tokens=5, **more):
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **more)
        self.client.submit(number, [1, 2, 3], params, time.monotonic())

    def wait(self, condition, timeout=20):
        with self.changed:
            assert self.changed.wait_for(condition, timeout), "it did not happen in time"

    def finished(self, number):
        return self.tokens.get(number) and self.tokens[number][-1].finish_reason


def engine_pid(runtime_dir, index=0):
    return EngineRecord.read(runtime_dir, index).pid


@pytest.fixture
def stub(tmp_path):
    stub = Stub(tmp_path)
    info = stub.client.start()
    assert info.vocab_size == 512 and info.max_model_len == 1024
    yield stub
    stub.client.close()


@pytest.fixture(scope="module")
def started_once(tmp_path_factory):
    stub = Stub(tmp_path_factory.mktemp("runtime"))
    stub.client.start()
    yield stub
    stub.client.close()


@pytest.fixture
def shared_stub(started_once):
    """For tests that leave its engine as it was."""
    for heard in (started_once.tokens, started_once.ended, started_once.lost):
        heard.clear()
    return started_once


def test_tokens_come_back_and_a_full_queue_is_refused(stub):
    """Refused at the door, or by the engine if that did not know yet how full it was."""
    at_the_door = {}
    for number in range(30):
        try:
            stub.submit(number, max_tokens=3)
        except UnavailableError as error:
            at_the_door[number] = str(error)
    stub.wait(lambda: sum(bool(stub.finished(n)) or n in stub.ended or n in at_the_door for n in range(30)) == 30)
    assert all(ended.outcome == "rejected" for ended in stub.ended.values())
    messages = [*at_the_door.values(), *(ended.message for ended in stub.ended.values())]
    assert all("queue is full: 4 requests wait" in message for message in messages)
    assert all(len(tokens) == 3 for tokens in stub.tokens.values())


def test_a_refusal_at_the_door_needs_no_answer_from_the_engine(tmp_path):
    """The engine stands still; what comes is refused all the same, and counted when it goes on."""
    stub = Stub(tmp_path, config=EngineConfig(checkpoint="dummy:tiny", kv_cache_blocks=500, shed_ttft_s=2.0))
    stub.client.start()
    block = Block(block_path(tmp_path), os.getpid())
    engine = psutil.Process(engine_pid(tmp_path))
    try:
        wait_until(lambda: block.read_queue(0)["allowed_s"] < 2.0)  # the engine knows its speed before it was asked
        stub.submit(0, max_tokens=900)
        stub.wait(lambda: stub.tokens)
        engine.suspend()
        queue = np.array([block.read_queue(0)])
        queue["ready_s"] += 100  # in the middle of a long step
        block.write_queue(0, queue)
        for number in range(1, 4):
            with pytest.raises(UnavailableError, match="the server is overloaded: the first token would come after"):
                stub.submit(number)
        with pytest.raises(UnavailableError, match="the server is overloaded"):
            stub.client.check(1, 8, SamplingParams(), time.monotonic())  # not tokenized
        assert not stub.ended
    finally:
        engine.resume()
    try:
        wait_until(lambda: block.read_telemetry(0)["requests_shed"] == 4)
        row = block.read_telemetry(0)
        assert (row["requests"], row["prompt_tokens"]) == (5, 20)
        assert stub.tokens and not stub.ended
    finally:
        stub.client.close()


def test_killed_engine_loses_its_requests_and_comes_back(stub, tmp_path):
    stub.submit(1, max_tokens=900)
    stub.wait(lambda: 1 in stub.tokens)
    first = engine_pid(tmp_path)
    os.kill(first, 9)
    stub.wait(lambda: 1 in stub.lost, timeout=2)
    assert "ended unexpectedly" in stub.lost[1]
    with pytest.raises(UnavailableError, match="being restarted; retry in about"):
        stub.submit(2)

    def accepted():
        try:
            stub.submit(3)
            return True
        except UnavailableError:
            return False

    wait_until(accepted)
    stub.wait(lambda: stub.finished(3))
    assert engine_pid(tmp_path) != first
    assert 1 not in stub.ended and list(stub.lost) == [1]


def test_two_stubs_share_one_engine_and_one_takes_over_from_the_other(stub, tmp_path):
    other = Stub(tmp_path, "other")
    other.client.start()
    pid = engine_pid(tmp_path)
    try:
        stub.submit(1)
        other.submit(1)
        stub.wait(lambda: stub.finished(1))
        other.wait(lambda: other.finished(1))
        stub.client.close()  # it started the engine
        other.submit(2)
        other.wait(lambda: other.finished(2))
        assert engine_pid(tmp_path) == pid, "the engine went on"
        os.kill(pid, 9)
        wait_until(lambda: engine_pid(tmp_path) != pid and EngineRecord.read(tmp_path, 0).state == "ready")
    finally:
        other.client.close()


def test_another_configuration_is_refused(shared_stub):
    other = EngineConfig(checkpoint="dummy:tiny", kv_cache_blocks=500, max_waiting=9)
    with pytest.raises(ConfigError, match="another value of parameter max_waiting"):
        Stub(shared_stub.runtime_dir, "other", other).client.start()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EngineConfig(checkpoint="dummy:tiny", kv_cache_blocks=2), "kv_cache_blocks gives 2 KV blocks"),
        (EngineConfig(checkpoint="/does/not/exist"), "parameter checkpoint"),
    ],
)
def test_start_up_failure_is_one_sentence_and_not_retried(tmp_path, config, message):
    with pytest.raises(ConfigError, match=message):
        Stub(tmp_path, config=config).client.start()
    assert EngineRecord.read(tmp_path, 0).generation == 1


def test_a_start_without_a_supervisor_fails_and_does_not_wait(tmp_path, monkeypatch):
    def fail(self):
        raise OSError("too many open files")

    monkeypatch.setattr(supervisor.Supervisor, "_lead", fail)
    with pytest.raises(ConfigError, match="the engine cannot be watched: too many open files"):
        Stub(tmp_path).client.start()


def test_abort_ends_a_request_silently(shared_stub):
    shared_stub.submit(1, max_tokens=900)
    shared_stub.wait(lambda: 1 in shared_stub.tokens)
    shared_stub.client.abort(1)
    wait_until(lambda: shared_stub.client.stats() and shared_stub.client.stats()[0].load == 0)
    assert not shared_stub.finished(1) and 1 not in shared_stub.ended


def test_a_message_that_cannot_be_taken_in_loses_requests_and_not_the_connection(shared_stub, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shared_stub.client, "_on_outputs", None)
        shared_stub.submit(1, max_tokens=900)
        shared_stub.wait(lambda: 1 in shared_stub.lost)
    assert "could not be taken in" in shared_stub.lost[1]
    shared_stub.client.forget(1)
    shared_stub.submit(2)
    shared_stub.wait(lambda: shared_stub.finished(2))
    wait_until(lambda: [stats.load for stats in shared_stub.client.stats()] == [0])


@pytest.mark.parametrize(("num_failures", "exits"), [(2, []), (3, [1])])
def test_a_stub_that_fails_to_look_after_its_engines_again_and_again_ends(tmp_path, monkeypatch, num_failures, exits):
    monkeypatch.setattr(client, "_MAX_FAILURES", 3)
    monkeypatch.setattr(client, "_WATCH_PERIOD_S", 0.001)
    ended = []
    monkeypatch.setattr(server_watch.os, "_exit", ended.append)
    lonely = EngineClient("stub", CONFIG, tmp_path, os.getpid(), None, None)
    passes = iter([OSError("too many open files")] * num_failures)

    def watch(index, poller):
        for error in passes:
            raise error
        lonely._closed.set()

    monkeypatch.setattr(lonely, "_watch", watch)
    lonely._run()
    assert ended == exits


def test_an_engines_loop_can_be_seen_to_turn_while_it_is_idle(shared_stub):
    """By this its supervisor knows that it does not hang."""
    block = Block(block_path(shared_stub.runtime_dir), os.getpid())
    for _ in range(2):
        turn = block.queue_sequence(0)
        wait_until(lambda turn=turn: block.queue_sequence(0) != turn, 5)
    block.close()


def test_sigterm_drains_and_the_engine_is_not_restarted_while_shutting_down(stub, tmp_path):
    stub.submit(1, max_tokens=50)
    stub.wait(lambda: 1 in stub.tokens)
    pid = engine_pid(tmp_path)
    (tmp_path / "shutting-down").touch()
    os.kill(pid, 15)
    stub.wait(lambda: stub.finished(1) or 1 in stub.ended)
    wait_until(lambda: EngineRecord.read(tmp_path, 0).state == "stopped")
    time.sleep(0.5)
    assert engine_pid(tmp_path) == pid


def test_engine_ends_with_its_server(tmp_path):
    server = psutil.Popen(["sleep", "60"])
    stub = Stub(tmp_path, server_pid=server.pid)
    stub.client.start()
    engine = psutil.Process(engine_pid(tmp_path))
    (tmp_path / "shutting-down").touch()
    server.kill()
    server.wait()
    wait_until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, timeout_s=5)
    stub.client.close()


def test_each_device_has_an_engine_and_load_is_spread(tmp_path):
    stub = Stub(tmp_path, config=EngineConfig(checkpoint="dummy:tiny", kv_cache_blocks=100, device="cpu,cpu:0"))
    stub.client.start()
    try:
        for number in range(4):
            stub.submit(number, max_tokens=300)
        wait_until(lambda: [s.load for s in stub.client.stats()] == [2, 2])
    finally:
        stub.client.close()
