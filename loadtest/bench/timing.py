"""Timing of short operations on a processor or a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

#: One measurement repeats the operation until it takes at least this long.
LEAST_S = 2e-3
_MOST_REPEATS = 1000


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_s(calls: Sequence[Callable[[], object]], device: torch.device, runs: int) -> float:
    """Median seconds of one call over `runs` measurements.

    `calls` are the same operation on different copies of its operands, called in turn, so that no copy is still in the caches
    when its turn comes again; on a GPU the time is the device's, between events.
    """
    for call in calls:
        call()
    synchronize(device)
    rounds = min(_MOST_REPEATS, max(1, round(LEAST_S / max(_elapsed_s(calls, device, 1), 1e-7))))
    return statistics.median(_elapsed_s(calls, device, rounds) for _ in range(runs)) / (rounds * len(calls))


def _elapsed_s(calls: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(rounds):
            for call in calls:
                call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    started = time.perf_counter()
    for _ in range(rounds):
        for call in calls:
            call()
    return time.perf_counter() - started
