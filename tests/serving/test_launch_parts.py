"""The launcher's parts that need no server: reasons in the log, the workspace, ports."""

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from backend.errors import ConfigError
from backend.serving import launch_workspace, server_log
from backend.serving.launch_failure import failure_sentence
from backend.serving.launch_options import claim_ports
from backend.serving.launch_processes import StubWatch
from backend.serving.launch_workspace import Workspace
from backend.serving.server_log import ServerLog

FAILED = "E1120 14:22:36.1 5637 model_lifecycle.cc:642] \"failed to load 'moe_llm' version 1: "


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        (
            FAILED
            + r'Internal: TritonModelException: moe_llm: no folder \"a\"\n here.\n\nAt:\n  model.py(7): initialize\n"',
            'moe_llm: no folder "a" here.',
        ),
        (FAILED + r'Internal: ValueError: no such thing\n\nAt:\n  x.py(1): f\n"', "moe_llm: ValueError: no such thing"),
        (FAILED + "Invalid argument: unexpected platform", "moe_llm: unexpected platform"),
        (
            "stub: error while loading shared libraries: libpython3.11.so.1.0: cannot open shared object file\n"
            + FAILED,
            "a shared library is missing: libpython3.11.so.1.0: cannot open shared object file",
        ),
        (
            "E1 main.cc:245] \"failed to start GRPC service: Unavailable - Socket '127.0.0.1:8001' already in use \"",
            "Triton's GRPC service could not start: Socket '127.0.0.1:8001' already in use",
        ),
        (
            "I1 x\nerror: creating server: Invalid argument - bad repository\n",
            "creating server: Invalid argument - bad repository",
        ),
        ("I1120 all is well", None),
    ],
)
def test_the_reason_is_one_sentence(log, sentence):
    assert failure_sentence(log) == sentence


def test_the_first_model_that_failed_counts():
    other = FAILED.replace("moe_llm", "moe_llm_infer")
    assert failure_sentence(f'{FAILED}Internal: first"\n{other}Internal: second"\n') == "moe_llm: first"


def written(log: ServerLog, *parts: bytes) -> str:
    """What the log keeps of a server that writes these parts and ends."""
    reading, writing = os.pipe()
    log.follow(os.fdopen(reading, "rb", buffering=0))
    for part in parts:
        os.write(writing, part)
    os.close(writing)
    return log.last()


def test_a_servers_output_is_passed_on_and_the_last_of_the_present_one_kept(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(server_log, "_KEPT_BYTES", 8)
    for path, read in ((None, lambda: capfd.readouterr().err), (tmp_path / "log", (tmp_path / "log").read_text)):
        log = ServerLog(path)
        assert written(log, b"of the first") == "he first"
        assert written(log, b"other", b"") == "other"
        assert read() == "of the firstother"


def test_a_full_disk_does_not_hold_the_server_up(capfd):
    """More than a pipe holds is read, and the reason of an end is still known."""
    assert written(ServerLog(Path("/dev/full")), *[b"x" * 60000] * 3, b"error: no memory\n").endswith(
        "error: no memory\n"
    )
    assert capfd.readouterr().err == "launch: the log file /dev/full cannot be written: No space left on device\n"


def test_workspaces_of_killed_launchers_are_swept_and_live_ones_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(launch_workspace.tempfile, "gettempdir", lambda: "/tmp")
    shm = tmp_path / "shm"
    shm.mkdir()
    monkeypatch.setattr(launch_workspace, "_SHM", shm)
    old, live = Workspace(), Workspace()
    for workspace in (old, live):
        (shm / f"{workspace.name}-region").touch()
        long_ago = time.time() - 60
        os.utime(workspace.path / "launcher.lock", (long_ago, long_ago))
    old._lock.close()  # as the kernel does when its launcher is killed
    new = Workspace()
    assert not old.path.exists()
    assert live.path.exists()
    assert [region.name for region in shm.iterdir()] == [f"{live.name}-region"]
    live.remove()
    new.remove()
    assert not live.path.exists()
    assert not list(shm.iterdir())


def test_clearing_keeps_only_the_lock():
    workspace = Workspace()
    (workspace.path / "engine-0.json").write_text("{}")
    (workspace.path / "backends" / "python").mkdir(parents=True)
    (workspace.path / "backends" / "python" / "link").symlink_to("/dev/null")
    workspace.clear()
    assert [path.name for path in workspace.path.iterdir()] == ["launcher.lock"]
    workspace.remove()


def test_a_long_temporary_directory_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr(launch_workspace.tempfile, "gettempdir", lambda: str(tmp_path / ("long" * 20)))
    workspace = Workspace()
    assert workspace.path.parent == Path("/tmp")
    workspace.remove()


def test_picked_ports_are_free_and_differ():
    ports = claim_ports("127.0.0.1", 0, 0, 0)
    assert len(set(ports)) == 3
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


@pytest.mark.parametrize("listener", ["127.0.0.1", "0.0.0.0"])
def test_a_listener_on_one_or_all_addresses_takes_the_port(listener):
    with socket.socket() as busy:
        busy.bind((listener, 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(ConfigError, match=f"grpc port {port} on 127.0.0.1 is taken.*--grpc-port"):
            claim_ports("127.0.0.1", 0, port, 0)


def test_a_stub_has_crashed_when_it_is_dead_and_its_mark_is_left(tmp_path):
    watch = StubWatch(tmp_path)
    assert watch.crashed() is None
    with subprocess.Popen(["sleep", "60"]) as process:
        mark = tmp_path / f"stub-{process.pid}.json"
        mark.write_text("{")
        assert watch.crashed() is None
        mark.write_text(f'{{"pid": {process.pid}, "model": "moe_llm"}}')
        assert watch.crashed() is None
        process.kill()
        process.wait()
    crashed = watch.crashed()
    assert crashed is not None
    assert crashed.model == "moe_llm"
    mark.unlink()
    assert watch.crashed() is None
