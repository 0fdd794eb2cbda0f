"""Starts an engine process and keeps it alive, from inside whichever stub holds the engine's lock.

Every stub runs a Supervisor per engine. The one that gets the lock file starts the engine, waits for its end and restarts
it with backoff; when that stub leaves, another takes over and adopts the running engine.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from backend.brownout.block import Block, block_path
from backend.config import EngineConfig
from backend.serving.protocol import EXIT_CONFIG, EngineRecord, ProcessWatch

log = logging.getLogger(__name__)

#: Written by the launcher before it ends the engines: they must not come back.
SHUTDOWN_MARK = "shutting-down"
BACKOFF_S = (0.2, 1.0, 2.0, 5.0)
#: An engine that was ready for this long is healthy again: the count of failures starts anew.
_HEALTHY_AFTER_S = 30.0
_POLL_S = 0.1
#: An engine whose loop has not turned for so long hangs, in its GPU say. The longest steps take about half of it: those that
#: compile kernels, wait for an expert worker to be started, or take a large prompt through a large model on few cores.
_HUNG_AFTER_S = 300.0


class Supervisor(threading.Thread):
    """Watches engine `index`; its state is in EngineRecord, for every stub to read."""

    def __init__(self, config: EngineConfig, index: int, runtime_dir: Path, server_pid: int) -> None:
        super().__init__(name=f"engine-{index}-supervisor", daemon=True)
        self._config = config
        self._index = index
        self._runtime_dir = runtime_dir
        self._server_pid = server_pid
        self._stop_event = threading.Event()
        record = EngineRecord.read(runtime_dir, index)
        #: The last generation that had ended for good before this stub came: its failure is not this stub's.
        self.ended_generation = record.generation if record and record.state in ("failed", "stopped") else 0
        #: Why this supervisor gave its engine up, or an empty string; stays, whatever becomes of the record.
        self.failure = ""

    def stop(self) -> None:
        """Stop watching. The engine goes on for the other stubs, or ends by itself when none is left."""
        self._stop_event.set()

    def run(self) -> None:
        try:
            self._wait_to_lead()
        except Exception as error:
            log.exception("engine %d is no longer watched", self._index)
            self.failure = f"the engine cannot be watched: {error}"

    def _wait_to_lead(self) -> None:
        with open(self._runtime_dir / f"engine-{self._index}.lock", "w") as lock:
            while not self._stop_event.is_set():
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._stop_event.wait(_POLL_S)
                else:
                    self._lead()
                    return

    def _lead(self) -> None:
        """Start or adopt the engine and restart it after each unwanted end, until this stub leaves or it is hopeless."""
        num_failures = 0
        generation = 0
        if record := EngineRecord.read(self._runtime_dir, self._index):
            generation = record.generation
            if record.state == "failed" and generation > self.ended_generation:
                return  # the stub that led before has found it hopeless
            if record.state in ("starting", "ready") and (watch := ProcessWatch(record.pid)).alive():
                self._follow(record.pid, watch.alive)
        while not self._stop_event.is_set() and not self._shutting_down():
            generation += 1
            ended = self._run_once(generation)
            if ended is None or self._shutting_down():
                return
            status, ready_s = ended
            record = EngineRecord.read(self._runtime_dir, self._index) or EngineRecord("failed")
            record.generation = generation
            record.error = record.error or f"the engine process ended with status {status}"
            num_failures = 1 if ready_s > _HEALTHY_AFTER_S else num_failures + 1
            never_ready = generation == 1 and record.state == "starting"
            if status == EXIT_CONFIG or never_ready or num_failures > len(BACKOFF_S):
                record.state = "failed"
                record.write(self._runtime_dir, self._index)
                self.failure = record.error
                log.error("engine %d is given up: %s", self._index, record.error)
                return
            backoff_s = BACKOFF_S[num_failures - 1]
            log.error("engine %d ended (%s); it is restarted in %g s", self._index, record.error, backoff_s)
            record.state, record.error = "restarting", ""
            record.write(self._runtime_dir, self._index)
            self._stop_event.wait(backoff_s)

    def _run_once(self, generation: int) -> tuple[int, float] | None:
        """Start the engine and wait; its exit status and for how long it was ready, or None if this stub leaves first."""
        record = EngineRecord("starting", generation, config=self._config.to_dict())
        record.write(self._runtime_dir, self._index)
        command = [python_executable(), "-m", "backend.serving.engine_process"]
        command += ["--runtime-dir", str(self._runtime_dir), "--index", str(self._index)]
        command += ["--generation", str(generation), "--server-pid", str(self._server_pid)]
        root = str(Path(__file__).resolve().parents[2])
        path = os.environ.get("PYTHONPATH", "")
        # The engine shares its cores with Triton and the stubs. OpenMP threads that spin for ever while they wait for each
        # other hold up the very thread they wait for: steps took up to 18 times as long on two busy cores. Threads that sleep
        # at once wait for their waking between any two parallel regions. A spin of about a millisecond (GNU OpenMP counts its
        # turns) lasts from one region to the next and gives way to whatever lasts longer (docs/results/cpu.md). Several
        # engines hold each other up, and spin for a fifth of that.
        spins = 100_000 if len(self._config.devices) == 1 else 20_000
        env = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(spins), **os.environ}
        env["PYTHONPATH"] = f"{root}{os.pathsep}{path}" if path else root
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, env=env)
        except OSError as error:
            record.error = f"the engine process could not be started: {error}"
            record.write(self._runtime_dir, self._index)
            return 1, 0.0
        assert process.stdin is not None
        try:
            process.stdin.write(msgspec.json.encode(self._config.to_dict()))
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once; its status says so
        ready_s = self._follow(process.pid, lambda: process.poll() is None)
        return None if ready_s is None else (process.returncode, ready_s)

    def _follow(self, pid: int, alive: Callable[[], bool]) -> float | None:
        """Until the engine process ends, killed if it hangs: for how long it was ready. None if this stub leaves first."""
        block = Block(block_path(self._runtime_dir), self._server_pid)
        ready: float | None = None  # since when it has been
        seen: object = None
        silent_s = 0.0
        try:
            while alive():
                if ready is None:
                    ready = time.monotonic() if self._is_ready() else None
                else:
                    turn = self._turn(block)
                    # Counted, not measured: while this process itself was suspended, the engine was, too.
                    silent_s = silent_s + _POLL_S if turn == seen else 0.0
                    seen = turn
                    if silent_s > _HUNG_AFTER_S:
                        self._kill(pid)
                        silent_s = 0.0
                if self._stop_event.wait(_POLL_S):
                    return None
        finally:
            block.close()
        return 0.0 if ready is None else time.monotonic() - ready

    def _turn(self, block: Block) -> object:
        """Another one with each turn of the engine's loop: it says at least ten times a second how its queue stands."""
        try:
            return block.queue_sequence(self._index)
        except OSError:
            return time.monotonic()  # unknown

    def _kill(self, pid: int) -> None:
        error = f"the engine process hung: its step has not ended within {_HUNG_AFTER_S:g} s"
        log.error("engine %d is killed: %s", self._index, error)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if record := EngineRecord.read(self._runtime_dir, self._index):
            record.error = error
            record.write(self._runtime_dir, self._index)

    def _is_ready(self) -> bool:
        record = EngineRecord.read(self._runtime_dir, self._index)
        return record is not None and record.state == "ready"

    def _shutting_down(self) -> bool:
        return (self._runtime_dir / SHUTDOWN_MARK).exists()


def python_executable() -> str:
    """The interpreter with the project's packages. Inside a Triton stub sys.executable may name the stub itself."""
    if "python" in Path(sys.executable or "").name:
        return sys.executable
    found = shutil.which("python3")
    if found is None:
        raise RuntimeError("no python3 on PATH to start the engine process with")
    return found
