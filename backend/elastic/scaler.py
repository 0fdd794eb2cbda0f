"""Scaler: from expected loads to the number of replicas of each expert of a layer. Pure functions.

Objective: the fewest replicas with which no replica carries more than a bound; where the memory does not allow that, the
smallest possible largest replica, again with the fewest replicas. Idle experts get none: they scale to zero.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


def straggler_bound(loads: Sequence[float], num_devices: int, factor: float, least: float = 0.0) -> float:
    """Largest load one replica should carry: `factor` times a device's fair share of the layer, at least `least`.

    The layer waits for its busiest device, and no placement can balance a replica that is heavier than a fair share. With
    list scheduling the busiest device carries at most the mean plus one replica, so a factor f bounds the imbalance by
    1 + f. `least` is the load below which splitting saves nothing, because reading the weights takes as long: it turns a
    latency target or the kernel's ridge point into tokens. Raises ValueError for a factor or device count that is not
    positive.
    """
    if num_devices < 1 or not factor > 0:
        raise ValueError(f"straggler_bound needs devices and a positive factor, got {num_devices} and {factor}")
    return max(factor * sum(loads) / num_devices, least)


def scale(loads: Sequence[float], *, budget: int, max_replicas: int, bound: float) -> list[int]:
    """Replicas [E] for loads [E] (expected assignments), a replica of an expert with load n and r replicas carrying n / r.

    `budget` is the number of copies that the devices' memory holds, `max_replicas` the most of one expert (the number of
    devices), `bound` the largest load of a replica (`straggler_bound`). An expert has no replica exactly if its load is 0.

    Guarantees: sum <= budget; if copies and max_replicas allow every replica to stay within the bound, it does, with the
    fewest copies possible; otherwise the largest replica is as small as they allow. Raises ValueError if the budget does not
    hold one copy of each active expert, or for a negative load.
    """
    if any(not load >= 0 for load in loads):
        raise ValueError(f"loads must be 0 or more, got {min(loads)}")
    replicas = [int(load > 0) for load in loads]
    spare = budget - sum(replicas)
    if spare < 0:
        raise ValueError(f"{sum(replicas)} active experts do not fit into memory for {budget} copies")
    if max_replicas < 1:
        raise ValueError(f"max_replicas must be at least 1, got {max_replicas}")
    # Giving each copy to the worst expert is optimal for the largest share: an exchange argument, as for apportionment.
    worst = [(-load, expert) for expert, load in enumerate(loads) if load > bound]
    heapq.heapify(worst)
    while worst and spare and replicas[worst[0][1]] < max_replicas and -worst[0][0] > bound:
        expert = worst[0][1]
        replicas[expert] += 1
        spare -= 1
        heapq.heapreplace(worst, (-loads[expert] / replicas[expert], expert))
    largest = -worst[0][0] if worst else bound
    if largest > bound:
        # The bound is out of reach: copies that do not lower the largest replica are not needed.
        for expert, load in enumerate(loads):
            replicas[expert] = min(replicas[expert], _fewest(load, largest))
    return replicas


def _fewest(load: float, limit: float) -> int:
    """Fewest replicas of which each carries at most `limit`; 0 for no load."""
    if load <= 0:
        return 0
    count = max(1, math.ceil(load / limit))
    # The quotient may be rounded up past a whole number.
    while count > 1 and load / (count - 1) <= limit:
        count -= 1
    return count
