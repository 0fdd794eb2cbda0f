"""Decides when a request's next response goes out: at once, or as soon as the response rate allows.

Handing one response to Triton costs about 250 µs of processor time, and as much again in the server and a client beside it,
so a response per token would take the processors from the engine. The outbox bounds responses per second; a request that waits
for its turn collects tokens meanwhile. Turns come in bunches: of several responses back to back each costs less, since stub,
server and client wake up once for all of them, and they push the engine off its cores once. First tokens and final responses
never wait.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Responses that may go out back to back after a pause, in seconds of the allowed rate.
_BURST_S = 0.05
#: Once the allowance is used up, it grows for so long before the next responses go, together.
_BUNCH_S = 0.03


class Outbox(Generic[T]):
    """Calls `deliver(item)` from its own thread: urgent items at once, the others in turn at `max_per_s` at most.

    Turns go to the item whose `last_served(item)`, in seconds, is the longest ago. Items are hashable. An item waits at most
    once: marking it again while it waits changes nothing but its urgency.
    """

    def __init__(
        self,
        deliver: Callable[[T], None],
        max_per_s: float,
        last_served: Callable[[T], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deliver = deliver
        self._last_served = last_served
        self._rate = max_per_s
        self._burst = max(1.0, max_per_s * _BURST_S)
        self._clock = clock
        self._allowance = self._burst
        self._refilled_s = clock()
        #: Until then nothing goes but what is urgent.
        self._resume_s = self._refilled_s
        self._urgent: deque[T] = deque()
        self._waiting: dict[T, None] = {}
        self._condition = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def mark(self, item: T, urgent: bool) -> None:
        """The item has something to send."""
        with self._condition:
            if urgent:
                self._waiting.pop(item, None)
                self._urgent.append(item)
            else:
                self._waiting.setdefault(item)
                if len(self._waiting) > 1:
                    return  # the thread is at work, or knows how long it rests
            self._condition.notify()

    def close(self) -> None:
        """Send what is urgent, then stop."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def next_item(self) -> tuple[T | None, float | None]:
        """The item to deliver now, or None with the seconds until one may go (None: until something is marked)."""
        now = self._clock()
        self._allowance = min(self._burst, self._allowance + (now - self._refilled_s) * self._rate)
        self._refilled_s = now
        if self._urgent:
            # Urgent items are never held back, but they use up the allowance of the others (down to one second's worth).
            self._allowance = max(self._allowance - 1.0, -self._rate)
            return self._urgent.popleft(), 0.0
        if not self._waiting:
            return None, None
        if now < self._resume_s:
            return None, self._resume_s - now
        if self._allowance < 1.0:
            pause_s = max(_BUNCH_S, (1.0 - self._allowance) / self._rate)
            self._resume_s = now + pause_s
            return None, pause_s
        self._allowance -= 1.0
        # Not by when they were marked: those of one step are marked together, always in the same order.
        item = min(self._waiting, key=self._last_served)
        del self._waiting[item]
        return item, 0.0

    def _run(self) -> None:
        while True:
            with self._condition:
                item, wait_s = self.next_item()
                while item is None and not self._closed:
                    self._condition.wait(wait_s)
                    item, wait_s = self.next_item()
                if item is None:
                    return
            try:
                self._deliver(item)
            except Exception:
                log.exception("a response could not be sent")
