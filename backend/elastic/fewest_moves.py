"""The fewest moves at a given balance, exactly: for layers so small that all placements can be gone through."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb, prod


def number_of_placements(counts: Sequence[int], devices: int) -> int:
    """Ways to choose devices for `counts` [E] copies of each expert, whether they fit or not."""
    return prod(comb(devices, count) for count in counts)


def fewest_moves(
    counts: Sequence[int],
    costs: Sequence[float],
    capacity: Sequence[int],
    warm_of: Sequence[Sequence[int]],
    limit: float,
) -> list[set[int]]:
    """Experts held by each device [D] such that no device exceeds `limit` or its capacity [D], and the fewest are not warm.

    `counts` [E] copies, of cost `costs` [E] each; `warm_of` [E] the devices where an expert is warm. Branch and bound, of
    equals the first in the order of devices. Raises ValueError if nothing fits.
    """
    size = len(capacity)
    active = sorted((e for e, count in enumerate(counts) if count), key=lambda e: (-costs[e], e))
    # The least moves that the experts from each position on need, were there no limits.
    least = [0]
    for expert in reversed(active):
        least.insert(0, least[0] + max(0, counts[expert] - len(warm_of[expert])))
    options = [
        sorted(
            (sum(d not in warm_of[expert] for d in devices), devices)
            for devices in combinations(range(size), counts[expert])
        )
        for expert in active
    ]
    loads, room = [0.0] * size, list(capacity)
    chosen: list[tuple[int, ...]] = []
    best: tuple[float, list[tuple[int, ...]]] = (float("inf"), [])

    def search(position: int, moves: int) -> None:
        nonlocal best
        if position == len(active):
            best = (moves, list(chosen))
            return
        cost = costs[active[position]]
        for more, devices in options[position]:
            if moves + more + least[position + 1] >= best[0]:
                return
            if all(room[d] and loads[d] + cost <= limit for d in devices):
                for d in devices:
                    loads[d] += cost
                    room[d] -= 1
                chosen.append(devices)
                search(position + 1, moves + more)
                chosen.pop()
                for d in devices:
                    loads[d] -= cost
                    room[d] += 1

    search(0, 0)
    if best[0] == float("inf"):
        raise ValueError(f"no placement keeps every device within {limit} and its memory")
    held: list[set[int]] = [set() for _ in capacity]
    for expert, devices in zip(active, best[1], strict=True):
        for device in devices:
            held[device].add(expert)
    return held
