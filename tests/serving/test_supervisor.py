"""Which engine that ended is started again, and which is given up; the engine here is a script."""

import itertools
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from backend.brownout.block import QUEUE, Block, block_path
from backend.config import EngineConfig
from backend.serving import supervisor
from backend.serving.protocol import EXIT_CONFIG, EngineRecord
from backend.serving.supervisor import Supervisor

#: What an engine writes once it is ready, whole as a real one does; $4 is the runtime directory.
BECOME_READY = """echo '{"state": "ready", "generation": 2, "pid": '$$'}' > $4/new && mv $4/new $4/engine-0.json"""


def supervised(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, mode: int = 0o700) -> Supervisor:
    """A supervisor that has come to its end with an engine that has been ready before and is now this script."""
    engine = folder / "engine"
    engine.write_text(f"#!/bin/sh\necho start >> {folder}/starts\n{script}\n")
    engine.chmod(mode)
    monkeypatch.setattr(supervisor, "python_executable", lambda: str(engine))
    monkeypatch.setattr(supervisor, "BACKOFF_S", (0.0, 0.01, 0.02))
    monkeypatch.setattr(supervisor, "_POLL_S", 0.01)
    EngineRecord("stopped", generation=1).write(folder, 0)
    watching = Supervisor(EngineConfig(checkpoint="dummy:tiny"), 0, folder, server_pid=1)
    watching.start()
    watching.join(20)
    assert not watching.is_alive()
    return watching


@pytest.mark.parametrize(("status", "starts"), [(1, 4), (EXIT_CONFIG, 1)])
def test_an_engine_that_dies_again_and_again_is_given_up(tmp_path, monkeypatch, status: int, starts: int) -> None:
    """After as many restarts as there are pauses; at once where the configuration is to blame, which stays as it is."""
    watching = supervised(tmp_path, monkeypatch, f"exit {status}")
    assert (tmp_path / "starts").read_text().count("start") == starts
    record = EngineRecord.read(tmp_path, 0)
    assert (record.state, record.generation) == ("failed", 1 + starts)
    assert watching.failure == record.error == f"the engine process ended with status {status}"


@pytest.mark.parametrize(
    ("prepare", "served_s", "starts"),
    [("", 0, 4), (BECOME_READY, 29, 4), (BECOME_READY, 31, 7)],
    ids=["loading", "ready for short", "ready for long"],
)
def test_only_an_engine_that_was_ready_for_long_has_recovered(
    tmp_path, monkeypatch, prepare: str, served_s: int, starts: int
) -> None:
    """One that fails each time while it loads or soon after is given up; one that served for long each time is not."""
    clock = itertools.count(step=served_s)  # asked when an engine is seen to be ready, and when it has ended
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    is_ready = Supervisor._is_ready

    def mark_seen(watching: Supervisor) -> bool:
        ready = is_ready(watching)
        if ready:
            (tmp_path / "seen").touch()
        return ready

    monkeypatch.setattr(Supervisor, "_is_ready", mark_seen)
    last = f"[ $(wc -l < {tmp_path}/starts) = 7 ] && exit {EXIT_CONFIG}"
    until_seen = f"until rm {tmp_path}/seen; do sleep 0.01; done" if prepare else "sleep 0.05"
    supervised(tmp_path, monkeypatch, f"{last}\n{prepare}\n{until_seen}; exit 1")
    assert (tmp_path / "starts").read_text().count("start") == starts


def test_an_engine_that_cannot_be_started_has_failed_like_others(tmp_path, monkeypatch) -> None:
    watching = supervised(tmp_path, monkeypatch, "", mode=0o600)
    record = EngineRecord.read(tmp_path, 0)
    assert (record.state, record.generation) == ("failed", 5)
    assert "the engine process could not be started: [Errno 13] Permission denied" in watching.failure


def test_a_supervisor_that_fails_gives_its_engine_up(tmp_path, monkeypatch) -> None:
    def fail() -> None:
        raise RuntimeError("no python3 on PATH")

    watching = Supervisor(EngineConfig(checkpoint="dummy:tiny"), 0, tmp_path, server_pid=1)
    monkeypatch.setattr(supervisor, "python_executable", fail)
    watching.run()
    assert watching.failure == "the engine cannot be watched: no python3 on PATH"


def test_an_engine_whose_loop_stands_still_is_killed_and_no_other(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(supervisor, "_HUNG_AFTER_S", 0.5)

    def turn() -> None:
        block = Block(block_path(tmp_path), 1)
        for _ in range(60):
            block.write_queue(0, np.zeros(1, QUEUE))
            time.sleep(0.02)

    loop = threading.Thread(target=turn)
    loop.start()
    last = f"[ $(wc -l < {tmp_path}/starts) = 2 ] && exit {EXIT_CONFIG}"
    supervised(tmp_path, monkeypatch, f"{last}\n{BECOME_READY}\nexec sleep 60")
    assert not loop.is_alive(), "it was not killed before the loop had come to its end"
    assert "engine 0 ended (the engine process hung: its step has not ended within 0.5 s)" in caplog.text


def test_an_engine_that_dies_while_the_server_shuts_down_is_not_started_again(tmp_path, monkeypatch) -> None:
    watching = supervised(tmp_path, monkeypatch, f"touch {tmp_path}/{supervisor.SHUTDOWN_MARK}; exit 1")
    assert (tmp_path / "starts").read_text().count("start") == 1 and not watching.failure
