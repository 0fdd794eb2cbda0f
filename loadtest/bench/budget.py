"""How long a benchmark may take: when its budget is spent, nothing new is begun and what there is is written."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable


class Budget:
    """A deadline that is asked for before each measurement; `seconds` None is no limit."""

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._started = clock()

    @property
    def left_s(self) -> float:
        return math.inf if self.seconds is None else self.seconds - (self._clock() - self._started)

    @property
    def spent(self) -> bool:
        return self.left_s <= 0


def budget_seconds(text: str) -> float:
    """Seconds from "90", "90s", "8m" or "1h", for argparse."""
    factor = {"s": 1, "m": 60, "h": 3600}.get(text[-1:].lower())
    try:
        seconds = float(text if factor is None else text[:-1]) * (factor or 1)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise argparse.ArgumentTypeError(f"must be a time such as 90, 90s, 8m or 1h, got {text!r}")
    return seconds
