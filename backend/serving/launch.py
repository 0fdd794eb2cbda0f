"""Run Triton with this repository's models and keep it running: `python -m backend.serving.launch --help`.

    start ─▶ ready ─▶ watch ──(server or a stub died)──▶ kill all its processes ─▶ back off ─▶ start
                        ├──(an engine was given up)──▶ kill all its processes, status 1
                        └──(SIGTERM, SIGINT)──▶ engines drain ─▶ server stops ─▶ kill what is left

Triton cannot end the streams of a stub that died, so a dead stub means a new server.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import psutil

from backend.brownout.block import BLOCK_ENV, BLOCK_NAME
from backend.errors import ConfigError
from backend.serving.launch_failure import failure_sentence
from backend.serving.launch_options import DRAIN_TIMEOUT_ENV, LaunchOptions, parse_options
from backend.serving.launch_processes import (
    StubWatch,
    become_subreaper,
    die_with_parent,
    engine_processes,
    has_ended,
    kill_descendants,
    reap_orphans,
)
from backend.serving.launch_workspace import Workspace
from backend.serving.protocol import RUNTIME_DIR_ENV, given_up
from backend.serving.server_log import ServerLog
from backend.serving.supervisor import SHUTDOWN_MARK
from backend.serving.triton_server import locate_server

#: What lets a client run its own code in the server, look into its memory or write files; and the header that opens them,
#: over gRPC with Triton's prefix `triton-grpc-protocol-`.
_ADMINISTRATION = "model-repository,shared-memory,trace,logging"
_ADMIN_HEADER = "admin-token"
_POLL_S = 0.1
_PROBE_TIMEOUT_S = 1.0
#: Beyond the drain timeout: by the first the engines have aborted what was left, by the second Triton has unloaded its
#: models and ended. What still runs then is killed, so with the default drain timeout all is gone within 10 s.
_ENGINE_GRACE_S = 1.0
_SERVER_GRACE_S = 4.0
#: Seconds before each restart in a row; one failure more and the launcher gives up.
RESTART_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 4.0)
#: A server that was ready for so long has recovered: its next failure is a first one.
_HEALTHY_AFTER_S = 60.0


class _StopRequested(Exception):
    """SIGTERM, SIGINT or SIGHUP came, or the parent is gone."""


class _GivenUp(Exception):
    """An engine has failed for good: its models are gone, and another start of the server would not bring them back."""


class Launcher:
    """One launch: a server at a time, and everything below it."""

    def __init__(self, options: LaunchOptions) -> None:
        self._options = options
        self._parent_pid = os.getppid()
        self._stop_signals = 0
        self._log = ServerLog(options.log)
        self._workspace = Workspace()
        self._server: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Serve until told to stop (0) or until it is hopeless (1)."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        become_subreaper()
        try:
            return self._serve()
        except _StopRequested:
            self._stop_gracefully()
            return 0
        except _GivenUp as reason:
            _note(f"the server is given up: {reason}")
            return 1
        finally:
            kill_descendants()
            self._workspace.remove()
            self._log.finish()

    def _serve(self) -> int:
        num_failures = 0
        announced = False
        while True:
            started = time.monotonic()
            self._start_server()
            failure = self._wait_ready()
            if failure is None:
                ready = time.monotonic()
                if announced:
                    _note(f"the server is ready again after {ready - started:.1f} s")
                else:
                    print(self._ready_line(), flush=True)
                    announced = True
                failure = self._watch()
                if time.monotonic() - ready > _HEALTHY_AFTER_S:
                    num_failures = 0
            elif not announced:
                _note(failure)
                return 1
            if num_failures == len(RESTART_BACKOFF_S):
                _note(f"the server is given up after {num_failures + 1} failures in a row, the last: {failure}")
                return 1
            _note(f"{failure}; the server is restarted")
            kill_descendants()
            self._workspace.clear()
            self._sleep(RESTART_BACKOFF_S[num_failures])
            num_failures += 1

    def _start_server(self) -> None:
        options = self._options
        server = locate_server(self._workspace.path)
        command = [str(server.binary), f"--id={self._workspace.name}"]
        command += [f"--model-repository={options.model_repository}", f"--backend-directory={server.backend_dir}"]
        command += ["--model-control-mode=explicit", *(f"--load-model={name}" for name in options.models)]
        for service, port in options.ports.items():
            command += [f"--{service}-address={options.host}", f"--{service}-port={port}"]
        command += [f"--backend-config=python,shm-region-prefix-name={self._workspace.name}"]
        if options.admin_token is not None:
            restriction = f"{_ADMINISTRATION}:{_ADMIN_HEADER}={options.admin_token}"
            command += [f"--http-restricted-api={restriction}", f"--grpc-restricted-protocol={restriction}"]
        env = {
            **server.env,
            RUNTIME_DIR_ENV: str(self._workspace.path),
            DRAIN_TIMEOUT_ENV: f"{options.drain_timeout_s:g}",
            BLOCK_ENV: os.environ.get(BLOCK_ENV) or str(self._workspace.path / BLOCK_NAME),
        }
        # A session of its own: a terminal's Ctrl-C reaches the launcher alone, which ends the rest in the right order.
        self._server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            env=env,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )
        self._log.follow(self._server.stdout)

    def _wait_ready(self) -> str | None:
        """None once every model is ready, else a sentence that says why the server will not be."""
        timeout_s = self._options.startup_timeout_s
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._server_ended():
                return self._why_it_ended()
            self._check_engines()
            if self._is_ready():
                return None
            self._sleep(_POLL_S)
        return f"the models were not ready within {timeout_s:g} s (--startup-timeout); {self._log.place}"

    def _watch(self) -> str:
        """Watch the ready server until it or a stub dies; says which."""
        stubs = StubWatch(self._workspace.path)
        while True:
            if self._server_ended():
                return self._why_it_ended()
            self._check_engines()
            if (stub := stubs.crashed()) is not None:
                return f"the stub of {stub.model} (pid {stub.pid}) died"
            self._sleep(_POLL_S)

    def _check_engines(self) -> None:
        """A server whose models a user has unloaded is well; one whose stubs have unloaded theirs raises _GivenUp."""
        if reason := given_up(self._workspace.path):
            raise _GivenUp(reason)

    def _server_ended(self) -> bool:
        assert self._server is not None
        reap_orphans(self._server.pid)
        return self._server.poll() is not None

    def _why_it_ended(self) -> str:
        assert self._server is not None
        status = self._server.returncode
        if status < 0:
            return f"the Triton server was killed by {signal.Signals(-status).name}"
        kill_descendants()  # its stubs may have more to say, or nothing and keep the log open
        sentence = failure_sentence(self._log.last())
        return sentence or f"the Triton server ended with status {status}; {self._log.place}"

    def _is_ready(self) -> bool:
        """Whether our own server (another program may sit on the port) has all models ready and all its ports open."""
        connection = http.client.HTTPConnection(
            self._options.reachable_host, self._options.http_port, timeout=_PROBE_TIMEOUT_S
        )
        try:
            connection.request("GET", "/v2/health/ready")
            response = connection.getresponse()
            response.read()
            if response.status != 200:
                return False
            connection.request("GET", "/v2")
            if json.loads(connection.getresponse().read()).get("name") != self._workspace.name:
                return False
            # The metrics service starts after the HTTP service, the gRPC service before it.
            address = (self._options.reachable_host, self._options.metrics_port)
            socket.create_connection(address, timeout=_PROBE_TIMEOUT_S).close()
        except (OSError, http.client.HTTPException, ValueError):
            return False
        finally:
            connection.close()
        return True

    def _ready_line(self) -> str:
        host = self._options.reachable_host
        return "READY " + " ".join(f"{name}={host}:{port}" for name, port in self._options.ports.items())

    def _stop_gracefully(self) -> None:
        """Engines end their requests first, as a live stream keeps Triton from stopping; bounded at every step."""
        if self._server is None:
            return
        drained = time.monotonic() + self._options.drain_timeout_s
        (self._workspace.path / SHUTDOWN_MARK).touch()
        engines = engine_processes(self._workspace.path)
        for engine in engines:
            with contextlib.suppress(psutil.NoSuchProcess):
                engine.terminate()
        self._wait_until(lambda: all(map(has_ended, engines)), drained + _ENGINE_GRACE_S)
        self._server.terminate()
        self._wait_until(self._server_ended, drained + _SERVER_GRACE_S)

    def _wait_until(self, done: Callable[[], bool], deadline: float) -> None:
        """Until `done()`, the deadline, or a second signal."""
        while not done() and time.monotonic() < deadline and self._stop_signals < 2:
            time.sleep(_POLL_S)

    def _sleep(self, seconds: float) -> None:
        """Sleep in pieces; a stop request ends it as _StopRequested."""
        deadline = time.monotonic() + seconds
        while True:
            orphaned = self._options.stop_with_parent and os.getppid() != self._parent_pid
            if self._stop_signals or orphaned:
                raise _StopRequested
            if (left := deadline - time.monotonic()) <= 0:
                return
            time.sleep(min(left, _POLL_S))

    def _on_signal(self, _signal: int, _frame: object) -> None:
        self._stop_signals += 1


def _note(sentence: str) -> None:
    print(f"launch: {sentence}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    try:
        return Launcher(parse_options(argv)).run()
    except ConfigError as error:
        _note(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
