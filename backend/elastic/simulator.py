"""A discrete simulation of expert parallelism: requests, continuous batching, layers, one policy per layer.

Each step takes what the engine's scheduler would: one token of every running sequence, then prompt chunks, under one token
budget. Every layer of the pool stands for `repeat` real layers with the same routing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from backend.elastic.arrivals import Arrivals
from backend.elastic.cost_model import CostModel
from backend.elastic.functions import GB
from backend.elastic.policies import Service
from backend.elastic.routing import RoutingPool


class Policy(Protocol):
    """One layer's policy; see `backend.elastic.policies`."""

    def expect(self, predicted: Sequence[float] | None, now: float) -> None: ...

    def serve(self, counts: Sequence[float], now: float) -> Service: ...

    def cost_gb_s(self, now: float) -> float: ...

    def peak_copies(self) -> int: ...


@dataclass(frozen=True)
class Workload:
    """What all policies serve alike."""

    arrivals: Arrivals
    pool: RoutingPool
    #: [R] sequence of the pool that each request follows.
    sequences: NDArray[np.int64]
    devices: int = 8
    #: Real layers per layer of the pool.
    repeat: float = 1.0
    #: Layers ahead of which a prediction is known.
    distance: int = 1
    max_batch_tokens: int = 2048
    max_running: int = 256


@dataclass
class Outcome:
    """What one policy did with a workload."""

    layer_s: list[float] = field(default_factory=list)
    e2e_s: list[float] = field(default_factory=list)
    #: Memory × time of experts, always-on or as functions with keep-alive, loading included.
    cost_gb_s: float = 0.0
    #: Memory × time of the copies a layer uses (always-on: holds), only while that layer runs.
    execution_gb_s: float = 0.0
    makespan_s: float = 0.0
    steps: int = 0
    tokens: int = 0
    assignments: float = 0.0
    served: float = 0.0
    united: float = 0.0
    stalled_layers: int = 0
    peak_copies: int = 0

    @property
    def united_share(self) -> float:
        return self.united / self.served if self.served else 0.0


@dataclass
class _Request:
    number: int
    first_row: int
    length: int
    prompt: int
    total: int
    done: int = 0

    def rows(self, count: int) -> NDArray[np.int64]:
        """Tokens of the pool that the next `count` tokens follow."""
        return self.first_row + np.arange(self.done, self.done + count) % self.length


def simulate(
    work: Workload,
    policies: Sequence[Policy],
    cost: CostModel,
    advance: Callable[[float], object] = lambda seconds: None,
) -> Outcome:
    """Serve the whole workload with one policy per layer of the pool. `advance` is told the simulated time.

    Deterministic: everything random is in the workload.
    """
    arrivals, outcome = work.arrivals, Outcome()
    waiting: deque[_Request] = deque(_requests(work))
    running: list[_Request] = []
    now = 0.0
    while waiting or running:
        if not running:
            now = max(now, float(arrivals.arrival_s[waiting[0].number]))
        while waiting and len(running) < work.max_running and arrivals.arrival_s[waiting[0].number] <= now:
            running.append(waiting.popleft())
        batch = _batch(running, work.max_batch_tokens)
        rows = np.concatenate([request.rows(count) for request, count in batch])
        context = sum(request.done + count for request, count in batch)
        now = _step(work, policies, cost, outcome, rows, context, now)
        for request, count in batch:
            request.done += count
            if request.done >= request.total:
                outcome.e2e_s.append(now - float(arrivals.arrival_s[request.number]))
        running = [request for request in running if request.done < request.total]
        outcome.steps += 1
        outcome.tokens += len(rows)
        advance(now)
    outcome.makespan_s = now
    outcome.cost_gb_s = work.repeat * sum(policy.cost_gb_s(now) for policy in policies)
    outcome.peak_copies = max(policy.peak_copies() for policy in policies)
    return outcome


def _requests(work: Workload) -> list[_Request]:
    starts, arrivals = work.pool.starts, work.arrivals
    # The last token that is generated is not computed.
    return [
        _Request(
            number,
            int(starts[sequence]),
            int(starts[sequence + 1] - starts[sequence]),
            int(arrivals.input_tokens[number]),
            int(arrivals.input_tokens[number] + arrivals.output_tokens[number]) - 1,
        )
        for number, sequence in enumerate(work.sequences)
    ]


def _batch(running: list[_Request], budget: int) -> list[tuple[_Request, int]]:
    """Decode tokens first, then prompt chunks in the order of arrival, under the token budget."""
    batch = [(request, 1) for request in running if request.done >= request.prompt][:budget]
    budget -= len(batch)
    for request in running:
        if budget and request.done < request.prompt:
            count = min(budget, request.prompt - request.done)
            batch.append((request, count))
            budget -= count
    return batch


def _step(
    work: Workload,
    policies: Sequence[Policy],
    cost: CostModel,
    outcome: Outcome,
    rows: NDArray[np.int64],
    context: int,
    now: float,
) -> float:
    """One forward pass; returns the time at its end."""
    counts, predicted = work.pool.counts(rows), work.pool.predicted_counts(rows)
    dense = cost.dense_seconds(len(rows), context, work.devices)
    start, last = now, 0.0
    for layer, policy in enumerate(policies):
        known = predicted[layer, 0] >= 0
        ahead = work.distance * last if known else now - start
        policy.expect(predicted[layer].tolist() if known else None, max(start, now - ahead))
        begin = now + dense
        actual = counts[layer].tolist()
        service = policy.serve(actual, begin)
        seconds = cost.experts_s + service.seconds + cost.exchange_seconds(service.assignments)
        last = dense + seconds
        now += work.repeat * last
        outcome.layer_s.append(seconds)
        outcome.assignments += sum(actual)
        outcome.served += service.served
        outcome.united += service.united
        outcome.stalled_layers += service.stall_s > 0
        outcome.execution_gb_s += work.repeat * service.billed_copies * cost.expert_bytes * seconds / GB
    return now
