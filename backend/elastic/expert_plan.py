"""Which worker holds copies of which experts. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backend.elastic.placer import place
from backend.elastic.scaler import scale, straggler_bound
from backend.errors import ConfigError

#: Largest load of a replica, as a multiple of a worker's fair share.
_STRAGGLER_FACTOR = 1.0
#: Load that an expert without any is given, as a share of the mean: in the next step it may have some.
_LEAST_LOAD = 0.01

#: [N, L, E] bool: which worker holds a copy of which layer's expert.
Plan = np.ndarray
#: In place of a worker: none holds the expert.
NOBODY = -1


class PlanError(ConfigError):
    """The workers cannot hold what a plan needs; the plan in force stays."""


def check_room(num_experts: int, capacity: Sequence[int]) -> None:
    """Raise PlanError unless workers with room for `capacity[n]` experts of each layer can hold one copy of each."""
    if sum(capacity) < num_experts:
        raise PlanError(
            f"{sum(room > 0 for room in capacity)} workers with room for {max(capacity, default=0)} experts of each layer cannot "
            f"hold {num_experts}: more workers (parameter expert_pool) or a larger share in each (resident_experts) are needed"
        )


def make_plan(loads: np.ndarray, capacity: Sequence[int], former: Plan | None = None) -> Plan:
    """Copies of each layer's experts for loads [L, E]; worker n has room for `capacity[n]` experts of each layer.

    Every expert has at least one copy; the busy ones get more as the scaler says, where there is room, and the placer balances
    the workers. Copies of `former` stay where that keeps the balance. Raises PlanError if there is no room for one copy each.
    """
    num_layers, num_experts = loads.shape
    check_room(num_experts, capacity)
    budget, usable = sum(capacity), sum(room > 0 for room in capacity)
    plan = np.zeros((len(capacity), num_layers, num_experts), bool)
    for layer, row in enumerate(loads):
        wanted = np.maximum(row, _LEAST_LOAD * row.mean() + 1e-6).tolist()
        bound = straggler_bound(wanted, usable, _STRAGGLER_FACTOR)
        replicas = scale(wanted, budget=budget, max_replicas=usable, bound=bound)
        costs = [load / max(1, count) for load, count in zip(wanted, replicas, strict=True)]
        warm = [] if former is None else [(e, n) for n, e in np.argwhere(former[:, layer]).tolist()]
        for expert, worker in place(replicas, costs, capacity, warm).copies:
            plan[worker, layer, expert] = True
    return plan


class Holders:
    """Who serves an assignment: the workers that hold its expert, in turn, so that each has an equal share of its load."""

    def __init__(self, held: Plan) -> None:
        #: [L, E] copies, and [L, E, N] their workers, first those that hold one.
        self.counts = held.sum(0)
        self._workers = np.argsort(~held, axis=0, kind="stable").transpose(1, 2, 0)

    @property
    def share(self) -> float:
        """Share of the experts that some worker holds."""
        return float((self.counts > 0).mean())

    def workers_of(self, layer: int, experts: np.ndarray) -> np.ndarray:
        """[A] a worker, or NOBODY, for each of the assignments to experts [A] of a layer."""
        order = np.argsort(experts, kind="stable")
        sorted_experts = experts[order]
        turn = np.empty(len(experts), np.int64)
        turn[order] = np.arange(len(experts)) - np.searchsorted(sorted_experts, sorted_experts)
        counts = self.counts[layer, experts]
        return np.where(counts > 0, self._workers[layer, experts, turn % np.maximum(counts, 1)], NOBODY)
