"""The launcher's processes: nothing it started, and nothing that these started, outlives it unnoticed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil

from backend.serving.protocol import EngineRecord, ProcessWatch

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def become_subreaper() -> None:
    """Have orphaned descendants re-parented to this process, so that it can find and end them."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def die_with_parent() -> Callable[[], None]:
    """A preexec_fn that has the child killed when its parent dies.

    The kernel ties this to the parent's thread: start the child from a thread that lives as long as the process.
    """
    parent = os.getpid()

    def set_death_signal() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # the parent died before the signal was set

    return set_death_signal


def reap_orphans(server_pid: int) -> None:
    """Collect re-parented children that have ended; the server itself is left to its Popen object."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid == server_pid:
                return
            os.waitpid(ended.si_pid, os.WNOHANG)
        except ChildProcessError:
            return


def has_ended(process: psutil.Process) -> bool:
    """Whether a process is gone, or a zombie that only waits to be collected."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill_descendants(timeout_s: float = 3.0) -> None:
    """SIGKILL everything below this process and collect it, repeatedly: a dying parent may still start something."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        _reap_all()
        processes = psutil.Process().children(recursive=True)
        if not processes:
            return
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.02)


def _reap_all() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def engine_processes(runtime_dir: Path) -> list[psutil.Process]:
    """The engine processes, of this launch and alive, that the records in the runtime directory name."""
    pids = set()
    for path in runtime_dir.glob("engine-*.json"):
        try:
            record = EngineRecord.read(runtime_dir, int(path.stem.removeprefix("engine-")))
        except (ValueError, msgspec.MsgspecError):
            continue  # not an engine's record
        if record is not None:
            pids.add(record.pid)
    descendants = psutil.Process().children(recursive=True)
    return [process for process in descendants if process.pid in pids and not has_ended(process)]


class StubMark(msgspec.Struct):
    """Contents of stub-<pid>.json."""

    pid: int
    model: str


class StubWatch:
    """Finds stubs that died with their model loaded: those whose mark is still there."""

    def __init__(self, runtime_dir: Path) -> None:
        self._runtime_dir = runtime_dir
        self._stubs: dict[Path, tuple[StubMark, ProcessWatch]] = {}

    def crashed(self) -> StubMark | None:
        """A stub that ended without removing its mark."""
        for path in self._runtime_dir.glob("stub-*.json"):
            if path not in self._stubs:
                try:
                    mark = msgspec.json.decode(path.read_bytes(), type=StubMark)
                except (FileNotFoundError, msgspec.MsgspecError):
                    continue  # removed, or half written: the next look tells
                self._stubs[path] = (mark, ProcessWatch(mark.pid))
            mark, watch = self._stubs[path]
            # A stub that ends as it should removes the mark before it dies, perhaps since the listing above.
            if not watch.alive() and path.exists():
                return mark
        return None
