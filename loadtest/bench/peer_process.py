"""A peer in another environment: its interpreter runs one of our drivers and is stopped while others are measured."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from loadtest.bench.peers import Run

_FOLDER = Path(__file__).parent / "drivers"
#: Driver script of each engine that is known.
DRIVERS = {"vllm": _FOLDER / "peer_vllm.py"}
#: Loading may compile code for minutes.
TIMEOUT_S = 1200.0
_ERROR_TAIL_LINES = 20


class PeerError(RuntimeError):
    """A peer failed; the message has the end of what it printed."""


class PeerSpec(NamedTuple):
    """A peer as named on the command line; `python` None is the one in this process."""

    engine: str
    python: str | None = None
    #: Processors that its threads are bound to, as the engine writes them; empty: the driver's choice.
    binding: str = ""

    @property
    def name(self) -> str:
        """Unlike for different bindings of an engine."""
        return f"{self.engine}:{self.binding}" if self.binding else self.engine


def peer_spec(text: str) -> PeerSpec:
    """`transformers`, or NAME[:BINDING]=PYTHON with the interpreter of an environment that has this engine, for argparse."""
    name, given, python = text.partition("=")
    engine, _, binding = name.partition(":")
    if text == "transformers":
        return PeerSpec(text)
    if not given or engine not in DRIVERS:
        names = ", ".join(f"{known}[:BINDING]=PYTHON" for known in DRIVERS)
        raise argparse.ArgumentTypeError(f"must be transformers or one of {names}, got {text!r}")
    if not os.access(python, os.X_OK) or Path(python).is_dir():
        raise argparse.ArgumentTypeError(f"{python!r} is not an interpreter that can be run")
    return PeerSpec(engine, python, binding)


class PeerProcess:
    """A peer's process, stopped (SIGSTOP) between runs with all its children, so that it takes nothing from the others."""

    def __init__(
        self, spec: PeerSpec, *, checkpoint: str, dtype: str, device: str, max_model_len: int, requests: int
    ) -> None:
        """Start the process and load the checkpoint. Raises PeerError."""
        self.name = spec.name
        self._stack = contextlib.ExitStack()
        # A file and no pipe: nobody has to read it while it runs.
        self._errors = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        env = {"OMP_NUM_THREADS": str(torch.get_num_threads()), **os.environ}
        # Python's own settings are for this environment.
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            env.pop(name, None)
        self._process = subprocess.Popen(
            [str(spec.python), str(DRIVERS[spec.engine])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=env,
        )
        self._family: list[psutil.Process] = []
        self._stack.callback(self._end)
        try:
            self._ask(
                command="load",
                checkpoint=checkpoint,
                dtype=dtype,
                device=device,
                max_model_len=max_model_len,
                requests=requests,
                binding=spec.binding,
            )
            self._signal("suspend")
        except BaseException:
            self.close()
            raise

    def run(self, prompts: list[list[int]], new_tokens: int) -> Run:
        """Let it go on for one run. Raises PeerError."""
        self._signal("resume")
        answer = self._ask(command="run", prompts=prompts, new_tokens=new_tokens)
        self._signal("suspend")
        counts = [len(tokens) for tokens in answer["tokens"]]
        if counts != [new_tokens] * len(prompts):
            raise PeerError(f"peer {self.name} made {counts} tokens instead of {new_tokens} for each of {len(prompts)}")
        return Run(answer["seconds"], answer["tokens"])

    def close(self) -> None:
        """End the process and its children; may be called again."""
        self._stack.close()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, **command: object) -> dict:
        assert self._process.stdin is not None and self._process.stdout is not None
        watch = threading.Timer(TIMEOUT_S, self._process.kill)
        watch.start()
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""  # it has ended
        finally:
            watch.cancel()
        if not line:
            status = self._process.wait(timeout=10)
            raise PeerError(f"peer {self.name} ended with status {status} at {command['command']!r}{self._tail()}")
        answer = json.loads(line)
        if not answer["ok"]:
            raise PeerError(f"peer {self.name} failed at {command['command']!r}: {answer['error']}{self._tail()}")
        return answer

    def _tail(self) -> str:
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - 8192))
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()[-_ERROR_TAIL_LINES:]
        return "; its last lines:\n" + "\n".join(lines) if lines else "; it printed nothing"

    def _find(self) -> None:
        """Note the process and its children; children that outlive it are known from before."""
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(self._process.pid)
            self._family = [first, *first.children(recursive=True)]

    def _signal(self, action: str) -> None:
        self._find()
        for process in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, action)()

    def _end(self) -> None:
        self._signal("kill")
        psutil.wait_procs(self._family, timeout=10)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
