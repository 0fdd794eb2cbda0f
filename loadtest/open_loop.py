"""Open-loop sending: requests start at their scheduled times, whatever the server does with those before them.

A closed loop waits for an answer before it asks again, so a slow server is spared the load that would show how slow it is
(coordinated omission). Here one dispatcher works through a schedule that was fixed before the run, never waits for an
answer, and latency counts from the intended start. How late it was itself is recorded; a run in which it was often late
measured the load generator and is marked invalid.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable

import numpy as np

from loadtest.record import RequestRecord
from loadtest.schedule import Arrival

#: A run whose requests started later than this (99th percentile) is invalid.
MAX_LATENESS_P99_S = 0.05
#: Between the call and the first request: time for connections and for other senders to get ready.
LEAD_S = 0.2

#: Sends one request and returns its record: (number, arrival, intended start on time.monotonic) → record.
Send = Callable[[int, Arrival, float], Awaitable[RequestRecord]]


class Pacer:
    """The dispatcher's clockwork without its loop: what is due now, and how long until the next.

    asyncio and gevent drive it alike: while there is a wait, sleep that long, then start everything that is due.
    """

    def __init__(
        self, arrivals: Iterable[tuple[int, Arrival]], start_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`arrivals`: (number, arrival) by time; `start_s`: the clock's reading at the schedule's zero."""
        self._arrivals = list(arrivals)
        self._start_s = start_s
        self._clock = clock
        self._next = 0

    def wait_s(self) -> float | None:
        """Seconds until the next request is due, 0 if it is already; None if none is left."""
        if self._next == len(self._arrivals):
            return None
        return max(0.0, self._start_s + self._arrivals[self._next][1].at_s - self._clock())

    def due(self) -> list[tuple[int, Arrival, float]]:
        """(number, arrival, intended start) of those whose time has come, each handed out once."""
        now = self._clock()
        first = self._next
        while self._next < len(self._arrivals) and self._start_s + self._arrivals[self._next][1].at_s <= now:
            self._next += 1
        return [(number, a, self._start_s + a.at_s) for number, a in self._arrivals[first : self._next]]


async def send_open_loop(
    arrivals: Iterable[tuple[int, Arrival]], send: Send, start_s: float | None = None
) -> list[RequestRecord]:
    """Start every request at its time and wait for all to end; records by number.

    Args:
        arrivals: (number, arrival), as Schedule.numbered gives them.
        send: must turn the failures of a request into its record; what it raises ends the run.
        start_s: time.monotonic at the schedule's zero; default: LEAD_S from now.
    """
    pacer = Pacer(arrivals, time.monotonic() + LEAD_S if start_s is None else start_s)
    tasks: list[asyncio.Task[RequestRecord]] = []
    async with asyncio.TaskGroup() as group:
        while (wait_s := pacer.wait_s()) is not None:
            await asyncio.sleep(wait_s)
            tasks += [group.create_task(send(*due)) for due in pacer.due()]
    return sorted((task.result() for task in tasks), key=lambda record: record.id)


def lateness_p99_s(records: Iterable[RequestRecord]) -> float:
    """99th percentile of actual minus intended start; 0 without records."""
    late = [record.start_s - record.intended_start_s for record in records]
    return float(np.percentile(late, 99)) if late else 0.0
