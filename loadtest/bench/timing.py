"""Timing of short operations on a processor or a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

#: One measurement repeats the operation until it takes at least this long.
LEAST_S = 2e-3
_MOST_REPEATS = 1000
#: What a launch of a graph costs is shared by so many calls.
_LEAST_CALLS_IN_GRAPH = 16


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def replayed(function: Callable[..., object]) -> Callable[..., object]:
    """`function` captured in a CUDA graph with the arguments it is called with, and replayed once.

    Its kernels must have been compiled: run it before.
    """

    def call(*args: object) -> object:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            returned = function(*args)
        graph.replay()
        return returned

    return call


def median_s(calls: Sequence[Callable[[], object]], device: torch.device, runs: int, capture: bool = True) -> float:
    """Median seconds of one call over `runs` measurements.

    `calls` are the same operation on different copies of its operands, called in turn, so that no copy is still in the caches
    when its turn comes again. On a GPU the time is the device's, between events, of replays of a CUDA graph: launching small
    kernels one by one takes the host longer than they run. Calls that wait for the device cannot stand in one: `capture` False.
    """
    for call in calls:
        call()
    synchronize(device)
    number = len(calls)
    if capture and device.type == "cuda":
        repeats = max(1, _LEAST_CALLS_IN_GRAPH // number)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                for call in calls:
                    call()
        calls, number = [graph.replay], repeats * number
        graph.replay()
    rounds = min(_MOST_REPEATS, max(1, round(LEAST_S / max(_elapsed_s(calls, device, 1), 1e-7))))
    return statistics.median(_elapsed_s(calls, device, rounds) for _ in range(runs)) / (rounds * number)


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
