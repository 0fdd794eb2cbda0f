"""Copying expert weights into slots beside the running step: by a thread on a CPU, on a side stream on a CUDA device."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

import torch

#: A ThreadMover copies up to so much at once: some tens of microseconds.
AT_ONCE_BYTES = 2**19


class Move(Protocol):
    """A copy that has been started."""

    def done(self) -> bool:
        """Whether it has ended; never waits."""

    def wait(self) -> None:
        """Wait for its end; raises what made it fail."""


class Mover(Protocol):
    """Starts copies of weights."""

    def start(self, copy: Callable[[], None], num_bytes: int) -> Move:
        """Run `copy`, which copies so much, beside what the caller does next."""


def mover_for(device: torch.device) -> Mover:
    """The mover of a device."""
    return StreamMover(device) if device.type == "cuda" else ThreadMover()


class _ThreadMove:
    def __init__(self, copy: Callable[[], None]) -> None:
        self._copy, self._ended, self._error = copy, threading.Event(), None

    def run(self) -> None:
        try:
            self._copy()
        except BaseException as error:
            self._error = error
        self._ended.set()

    def done(self) -> bool:
        return self._ended.is_set()

    def wait(self) -> None:
        self._ended.wait()
        if self._error is not None:
            raise self._error


class ThreadMover:
    """One thread, which makes one copy after the other and ends with the mover; numpy lets go of the interpreter meanwhile.

    What is copied sooner than a thread is woken, on cores that all compute, is copied at once.
    """

    def __init__(self) -> None:
        self._moves: queue.SimpleQueue[_ThreadMove | None] = queue.SimpleQueue()
        threading.Thread(target=_run_all, args=(self._moves,), name="expert mover", daemon=True).start()
        weakref.finalize(self, self._moves.put, None)

    def start(self, copy: Callable[[], None], num_bytes: int) -> Move:
        """See Mover."""
        move = _ThreadMove(copy)
        if num_bytes <= AT_ONCE_BYTES:
            move.run()
        else:
            self._moves.put(move)
        return move


def _run_all(moves: queue.SimpleQueue[_ThreadMove | None]) -> None:
    while (move := moves.get()) is not None:
        move.run()


class _StreamMove:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def done(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        self._event.synchronize()


class StreamMover:
    """A side stream; sources lie in pinned memory, so that the copies run beside kernels."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def start(self, copy: Callable[[], None], num_bytes: int) -> Move:
        """See Mover."""
        # What still reads the slot has been launched before.
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        event = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            copy()
            event.record()
        return _StreamMove(event)
