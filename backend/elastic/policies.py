"""How the policies beside MoEless serve one layer, and the planning that it shares with the oracle.

All policies have the same two calls per step and layer: `expect` when the layer's load is predicted, `serve` when it is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from backend.elastic.cost_model import CostModel
from backend.elastic.functions import GB
from backend.elastic.placer import Copy, Placement, place
from backend.elastic.scaler import scale, straggler_bound

#: Load that keeps an idle expert in memory where a policy may not scale to zero.
_IDLE = 1e-6


@dataclass(frozen=True)
class ElasticOptions:
    """MoEless' settings; the three switches are the ablations."""

    keep_alive_s: float = 1.0
    #: Least time between two plans of a layer: one planner goes round all layers.
    replan_s: float = 0.02
    #: A replica carries at most this share of a device's fair share of the layer (`straggler_bound`).
    straggler_factor: float = 0.125
    #: Relative imbalance that a plan may leave (`place`), and that of the copies in memory which is worth another plan.
    tolerance: float = 0.03
    unrest: float = 0.2
    #: Share by which a plan must shorten the last large steps.
    gain: float = 0.05
    use_predictor: bool = True
    use_scaler: bool = True
    use_placer: bool = True
    #: Brownout: None is off; else threshold θ, with united experts of `way` always resident.
    threshold: float | None = None
    way: int = 8


class Service:
    """What one layer of one step did on D devices."""

    def __init__(self, devices: int) -> None:
        #: [D] seconds each device was busy with, or waited for, its experts.
        self.busy = [0.0] * devices
        #: [D] assignments each device received.
        self.assignments = [0.0] * devices
        #: Seconds of waiting for weights, of the device that waited longest.
        self.stall_s = 0.0
        #: Assignments served, and those of them by united experts.
        self.served = 0.0
        self.united = 0.0
        #: Copies whose memory the layer used, or for always-on policies held.
        self.billed_copies = 0

    @property
    def seconds(self) -> float:
        """Until the last device has finished, without the exchange of tokens."""
        return max(self.busy)

    def run(self, counts: Sequence[float], devices_of: Sequence[Sequence[int]], cost: CostModel) -> list[Copy]:
        """Serve counts [E] with the copies on `devices_of` [E]; returns the copies used, for every policy alike:

        heaviest expert first, split over its least busy copies, no finer than pays (`CostModel.ridge_tokens`).
        """
        used = []
        busy, assignments = self.busy, self.assignments
        for expert in sorted((e for e, count in enumerate(counts) if count), key=lambda e: (-counts[e], e)):
            count, devices = counts[expert], devices_of[expert]
            if len(devices) > 1:
                parts = min(len(devices), math.ceil(count / cost.ridge_tokens))
                devices = sorted(devices, key=lambda d: (busy[d], d))[:parts]
            share = count / len(devices)
            seconds = cost.replica_s(share)
            self.served += count
            for device in devices:
                busy[device] += seconds
                assignments[device] += share
                used.append((expert, device))
        return used


class StaticPolicy:
    """A table of always-on copies. With `interval_s` it is rebalanced from the last window, as EPLB does."""

    def __init__(
        self,
        devices_of: Sequence[Sequence[int]],
        slots: int,
        cost: CostModel,
        devices: int,
        interval_s: float | None = None,
    ) -> None:
        """`slots`: copies whose memory is paid for, on all devices together."""
        self.devices_of, self.slots, self.cost, self.devices = devices_of, slots, cost, devices
        self.interval_s = interval_s
        self._window = [0.0] * len(devices_of)
        self._next = interval_s or 0.0
        self.moves = 0

    def expect(self, predicted: Sequence[float] | None, now: float) -> None:
        """Static tables do not look ahead."""

    def serve(self, counts: Sequence[float], now: float) -> Service:
        stall = self._rebalance(now) if self.interval_s is not None and now >= self._next else 0.0
        if self.interval_s is not None:
            self._window = [seen + count for seen, count in zip(self._window, counts, strict=True)]
        service = Service(self.devices)
        service.run(counts, self.devices_of, self.cost)
        service.busy = [seconds + stall for seconds in service.busy]
        service.stall_s, service.billed_copies = stall, self.slots
        return service

    def cost_gb_s(self, now: float) -> float:
        return self.slots * self.cost.expert_bytes * now / GB

    def peak_copies(self) -> int:
        return self.slots

    def _rebalance(self, now: float) -> float:
        """New table from the window's loads; returns the seconds for which moving weights blocks the layer."""
        assert self.interval_s is not None
        self._next = now + self.interval_s
        warm = {(e, d) for e, held in enumerate(self.devices_of) for d in held}
        placement = balanced_table(self._window, [self.slots // self.devices] * self.devices, warm)
        self._window = [0.0] * len(self._window)
        self.devices_of = placement.devices
        self.moves += placement.moves
        arriving = [sum(d == device for _, d in placement.copies - warm) for device in range(self.devices)]
        return max(arriving) * self.cost.load_seconds(from_peer=True)


def block_table(num_experts: int, devices: int) -> list[list[int]]:
    """Plain expert parallelism: neighbouring experts share a device."""
    per_device = -(-num_experts // devices)
    return [[expert // per_device] for expert in range(num_experts)]


def balanced_table(
    loads: Sequence[float], capacity: Sequence[int], warm: frozenset[Copy] | set[Copy] = frozenset()
) -> Placement:
    """`capacity` [D] filled: every expert at least once, further replicas for the heaviest (EPLB's greedy), then packed."""
    kept = [load + _IDLE for load in loads]
    replicas = scale(kept, budget=sum(capacity), max_replicas=len(capacity), bound=0.0)
    costs = [load / count for load, count in zip(kept, replicas, strict=True)]
    return place(replicas, costs, capacity, warm)


class OraclePolicy:
    """Knows each step's load and has every copy in place at once and for nothing: a lower bound, not a system."""

    def __init__(self, num_experts: int, capacity: Sequence[int], cost: CostModel, options: ElasticOptions) -> None:
        self.capacity, self.cost, self.options = list(capacity), cost, options
        self.num_experts, self.devices = num_experts, len(capacity)
        self._copies, self._since, self._spent, self._peak = 0, 0.0, 0.0, 0
        self._warm: frozenset[Copy] = frozenset()

    def expect(self, predicted: Sequence[float] | None, now: float) -> None:
        """Nothing to predict."""

    def serve(self, counts: Sequence[float], now: float) -> Service:
        self._spent, self._since = self.cost_gb_s(now), now
        plan = plan_layer(counts, self.capacity, self._warm, self.cost, self.options)
        self._warm, self._copies = plan.copies, len(plan.copies)
        self._peak = max(self._peak, self._copies)
        service = Service(self.devices)
        service.run(counts, plan.devices, self.cost)
        service.billed_copies = self._copies
        return service

    def cost_gb_s(self, now: float) -> float:
        return self._spent + self._copies * self.cost.expert_bytes * (now - self._since) / GB

    def peak_copies(self) -> int:
        return self._peak


def plan_layer(
    loads: Sequence[float],
    capacity: Sequence[int],
    warm: frozenset[Copy],
    cost: CostModel,
    options: ElasticOptions,
    usual: float = 1.0,
) -> Placement:
    """Scale, then place, for expected assignments [E] of a large step, of which a usual one has the share `usual`.

    Placement balances both: a large step is as long as its computation, a usual one as the number of experts that it reads.
    """
    devices, budget = len(capacity), sum(capacity)
    if options.use_scaler:
        bound = straggler_bound(loads, devices, options.straggler_factor, least=cost.ridge_tokens)
        replicas = scale(loads, budget=budget, max_replicas=devices, bound=bound)
    else:
        replicas = [int(load > 0) for load in loads]
    costs = [
        cost.replica_s(load / count) + cost.replica_s(usual * load / count) if count else 0.0
        for load, count in zip(loads, replicas, strict=True)
    ]
    if options.use_placer:
        return place(replicas, costs, capacity, warm, options.tolerance)
    return _place_in_turn(replicas, costs, capacity, warm)


def _place_in_turn(
    replicas: Sequence[int], costs: Sequence[float], capacity: Sequence[int], warm: frozenset[Copy]
) -> Placement:
    """The ablation without a placer: each copy goes to the next device with room, whatever its load and what is warm."""
    held: list[list[int]] = [[] for _ in replicas]
    room, loads, device = list(capacity), [0.0] * len(capacity), 0
    for expert, count in enumerate(replicas):
        for _ in range(count):
            for step in range(len(room)):
                candidate = (device + step) % len(room)
                if room[candidate] and candidate not in held[expert]:
                    held[expert].append(candidate)
                    room[candidate] -= 1
                    loads[candidate] += costs[expert]
                    device = (candidate + 1) % len(room)
                    break
    devices = tuple(tuple(sorted(found)) for found in held)
    moves = sum((e, d) not in warm for e, found in enumerate(devices) for d in found)
    return Placement(devices, tuple(loads), moves, sum(replicas) - sum(map(len, devices)))
