"""The server with the controller beside it, in the foreground: `make serve`, `python -m controller.serve --help`.

    launcher starts ─▶ READY ─▶ controller starts ─▶ (SIGTERM, SIGINT) ─▶ controller hands back ─▶ launcher ends

The server matters more: a controller whose configuration cannot be leaves it running at full quality, one that ends for any
other reason is started again, and when the launcher has ended the controller is ended, too.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from backend.errors import ConfigError
from backend.serving.launch_processes import die_with_parent
from controller.config import ENV_PREFIX, EXIT_CONFIG, add_flags, read_config

#: The objectives where nobody names any: first token after 1 s, a token every 0.1 s.
_DEFAULT_ENV = {f"{ENV_PREFIX}TTFT_SLO_S": "1.0", f"{ENV_PREFIX}ITL_SLO_S": "0.1"}
#: Seconds before each start in a row of a controller that ended; the last one from then on.
_RESTART_S = (1.0, 2.0, 5.0, 10.0, 30.0)
#: One that ran for so long has recovered: its next end is a first one.
_HEALTHY_AFTER_S = 60.0
_HAND_BACK_S = 5.0
_POLL_S = 0.1


class Pair:
    """Launcher and controller."""

    def __init__(self, launch: Sequence[str], control: Sequence[str]) -> None:
        self._launch = [sys.executable, "-m", "backend.serving.launch", "--stop-with-parent", *launch]
        self._control = [sys.executable, "-m", "controller", *control]
        self._launcher: subprocess.Popen[bytes] | None = None
        self._controller: subprocess.Popen[bytes] | None = None
        self._controller_started = 0.0
        self._num_ends = 0  # of controllers, in a row
        self._grpc = ""
        self._stop = 0

    def run(self) -> int:
        """Until told to stop, or until the launcher ends; its exit status."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        # Sessions of their own: a terminal's Ctrl-C reaches this process alone, which ends the rest in the right order.
        self._launcher = subprocess.Popen(
            self._launch, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        )
        threading.Thread(target=self._pass_on_output, daemon=True).start()
        restart_s: float | None = 0.0
        told = 0
        while self._launcher.poll() is None:
            if self._stop > told:
                if not told:
                    self._end_controller()
                told = self._stop
                # A second signal reaches the launcher as one: it then ends everything at once.
                self._launcher.send_signal(signal.SIGTERM)
            elif not told and self._grpc and restart_s is not None and time.monotonic() >= restart_s:
                restart_s = self._look_after_controller()
            time.sleep(_POLL_S)
        self._end_controller()
        return self._launcher.returncode

    def _look_after_controller(self) -> float | None:
        """Start the controller if there is none; when to look again, None for never."""
        if self._controller is None:
            self._controller_started = time.monotonic()
            try:
                self._controller = subprocess.Popen(
                    [*self._control, "--triton", self._grpc],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    preexec_fn=die_with_parent(),
                )
            except OSError as error:
                return self._start_again(f"could not be started: {error}")
        elif (status := self._controller.poll()) is not None:
            self._controller = None
            if status == EXIT_CONFIG:
                _note(f"the controller ended with status {status}; the server goes on at its baseline")
                return None
            return self._start_again(f"died with status {status}")
        return 0.0

    def _start_again(self, what: str) -> float:
        """When to."""
        now = time.monotonic()
        if now - self._controller_started > _HEALTHY_AFTER_S:
            self._num_ends = 0
        pause_s = _RESTART_S[min(self._num_ends, len(_RESTART_S) - 1)]
        self._num_ends += 1
        _note(f"the controller {what}; it is started again in {pause_s:g} s")
        return now + pause_s

    def _end_controller(self) -> None:
        if self._controller is None:
            return
        self._controller.terminate()
        try:
            self._controller.wait(_HAND_BACK_S)
        except subprocess.TimeoutExpired:
            self._controller.kill()
            self._controller.wait()

    def _pass_on_output(self) -> None:
        """The launcher's stdout; its one line says where the server is."""
        for line in self._launcher.stdout:
            text = line.decode()
            print(text, end="", flush=True)
            if text.startswith("READY "):
                self._grpc = dict(part.split("=", 1) for part in text.split()[1:])["grpc"]

    def _on_signal(self, _signal: int, _frame: object) -> None:
        self._stop += 1


def _note(sentence: str) -> None:
    print(f"serve: {sentence}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    launch, control = given[:cut], given[cut + 1 :]
    if {"-h", "--help"} & set(launch):
        print(
            "usage: python -m controller.serve [the server's flags] [-- the controller's flags]\n\n"
            "Run Triton Inference Server with this repository's models, and the SLO controller beside it, in the\n"
            "foreground. SIGTERM or SIGINT ends both.\n\n"
            "The server's flags are those of `python -m backend.serving.launch --help`, the controller's those of\n"
            "`python -m controller --help`; each of the latter can also come from the environment, such as\n"
            f"{ENV_PREFIX}TTFT_SLO_S=0.5. Objectives that nobody names are 1 s to the first token and 0.1 s between\n"
            "tokens; `-- --law off` never dims."
        )
        return 0
    parser = argparse.ArgumentParser(prog="python -m controller.serve", add_help=False, allow_abbrev=False)
    add_flags(parser)
    args = parser.parse_args(control)
    if args.triton is not None:
        parser.error("--triton is not for here: the controller gets the address of the server that is started")
    if args.config is None:
        for name, value in _DEFAULT_ENV.items():
            os.environ.setdefault(name, value)
    try:
        read_config(args)
    except ConfigError as error:
        parser.error(str(error))
    return Pair(launch, control).run()


if __name__ == "__main__":
    sys.exit(main())
