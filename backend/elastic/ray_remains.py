"""Ends what a Ray cluster of the engine's own would leave for a minute when the engine is killed.

Ray has its main processes and workers end with the process that started them, but the agents beside them first wait for the
cluster to come back. `python -m backend.elastic.ray_remains PID…` waits for the end of its input, which the engine holds, and
kills the processes that it was given.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

_ROOT = Path(__file__).resolve().parents[2]
#: Their inputs end with this process.
_watchers: list[subprocess.Popen[bytes]] = []


def end_with_this_process() -> None:
    """To be called when this process has started a cluster: its agents are killed as soon as this process is gone."""
    raylets = [child for child in psutil.Process().children() if child.name() == "raylet"]
    pids = [str(process.pid) for raylet in raylets for process in raylet.children(recursive=True)]
    command = [sys.executable, "-m", "backend.elastic.ray_remains", *pids]
    _watchers.append(subprocess.Popen(command, stdin=subprocess.PIPE, cwd=_ROOT, start_new_session=True))


def main(pids: Sequence[str]) -> None:
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(int(pid)))
    sys.stdin.buffer.read()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    main(sys.argv[1:])
