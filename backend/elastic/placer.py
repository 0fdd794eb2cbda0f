"""Placer: from replicas to devices, within memory, balanced, with few moves. Pure functions.

Objective, in this order: every active expert is placed; no device holds more copies than fit; the busiest device is as
light as the heuristic finds, within `tolerance`; among equal plans, the fewest copies are loaded that are not warm already.
*Equal* to a plan are those that have as many copies of each expert and whose busiest device is no heavier.

Two candidates are made: one that keeps warm copies and repairs the balance, and one from scratch by longest processing time
first (LPT). Both are improved by moves and swaps. Then the chosen one gives up moves: its devices are relabelled, and cold
copies go where they are warm, as long as the busiest device gets no heavier. Fewest moves at a given balance is as hard as
packing bins. A small layer (`SMALL`) is therefore searched exactly; in a larger one it is certain that no relabelling,
no relocation and no swap of two copies saves a move.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from backend.elastic.fewest_moves import fewest_moves, number_of_placements
from backend.elastic.matching import cheapest_assignment

#: Moves and swaps tried on a candidate at most; a few suffice, and the bound keeps planning time bounded.
_MAX_IMPROVEMENTS = 16
#: Layers with at most so many placements, feasible or not, get the fewest moves of all equal plans.
SMALL = 1000
#: Relative gain below which a change is rounding.
_EPSILON = 1e-9

Copy = tuple[int, int]  # (expert, device)


@dataclass(frozen=True)
class Placement:
    """Which devices hold each expert of a layer."""

    #: [E] ascending devices of each expert; empty for idle ones.
    devices: tuple[tuple[int, ...], ...]
    #: [D] cost of each device, in the unit of the replica costs.
    device_costs: tuple[float, ...]
    #: Copies that are not warm and have to be loaded.
    moves: int
    #: Replicas beyond an expert's first that found no device; only devices of different size can cause that.
    dropped: int = 0

    @property
    def copies(self) -> frozenset[Copy]:
        return frozenset((expert, device) for expert, held in enumerate(self.devices) for device in held)

    @property
    def imbalance(self) -> float:
        """Busiest device over the mean; 1 is perfect balance, also for an idle layer."""
        total = sum(self.device_costs)
        return max(self.device_costs) * len(self.device_costs) / total if total else 1.0


def place(
    replicas: Sequence[int],
    replica_costs: Sequence[float],
    capacity: Sequence[int],
    warm: Collection[Copy] = (),
    tolerance: float = 0.05,
) -> Placement:
    """Place `replicas` [E] copies, of cost `replica_costs` [E] each, on devices that hold `capacity` [D] copies.

    Copies of one expert go to different devices, so more replicas than devices are dropped. `warm` are the copies (expert,
    device) that need no loading. `tolerance`: how much heavier, relatively, the busiest device may be than in the plan from
    scratch if that saves moves. Deterministic: ties go to the lower index. Raises ValueError if the copies do not fit.
    """
    if sum(replicas) > sum(capacity):
        raise ValueError(f"{sum(replicas)} copies do not fit into memory for {sum(capacity)}")
    usable = sum(room > 0 for room in capacity)
    wanted = [min(count, usable) for count in replicas]
    costs = list(map(float, replica_costs))
    order = sorted((e for e in range(len(wanted)) if wanted[e]), key=lambda e: (-costs[e], e))
    warm_of: list[list[int]] = [[] for _ in wanted]
    for expert, device in sorted(warm):
        warm_of[expert].append(device)

    best = _Plan(capacity, costs, warm_of)
    best.keep_warm(order, wanted)
    best.fill(order, wanted)
    floor = max(sum(best.loads) / len(capacity), max((costs[e] for e in order), default=0.0))
    good = floor * (1 + tolerance)  # no plan is lighter than `floor`
    best.improve(good)
    if max(best.loads) > good:
        fresh = _Plan(capacity, costs, warm_of)
        fresh.fill(order, wanted)
        fresh.improve(good)
        if fresh.dropped < best.dropped or max(best.loads) > max(fresh.loads) * (1 + tolerance):
            best = fresh
    best.save_moves()
    return best.placement(replicas)


class _Plan:
    """A placement in the making."""

    def __init__(self, capacity: Sequence[int], costs: list[float], warm_of: list[list[int]]) -> None:
        self.capacity, self.costs, self.warm_of = capacity, costs, warm_of
        self.held: list[set[int]] = [set() for _ in capacity]
        self.loads = [0.0] * len(capacity)
        self.dropped = 0

    def keep_warm(self, order: list[int], wanted: list[int]) -> None:
        """Use warm copies, heaviest expert first, on the least loaded of its warm devices."""
        for expert in order:
            for _ in range(min(wanted[expert], len(self.warm_of[expert]))):
                free = [d for d in self.warm_of[expert] if self._takes(d, expert)]
                if free:
                    self._add(expert, min(free, key=lambda d: (self.loads[d], d)))

    def fill(self, order: list[int], wanted: list[int]) -> None:
        """Place what is still missing by LPT."""
        for expert in order:
            for _ in range(wanted[expert] - sum(expert in held for held in self.held)):
                free = [d for d in range(len(self.held)) if self._takes(d, expert)]
                if free:
                    self._add(expert, min(free, key=lambda d: (self.loads[d], d not in self.warm_of[expert], d)))
                elif not self._make_room(expert):
                    self.dropped += 1

    def improve(self, target: float) -> None:
        """Move or swap copies of the busiest device until it carries at most `target` or nothing helps."""
        for _ in range(_MAX_IMPROVEMENTS):
            busiest = max(range(len(self.loads)), key=lambda d: (self.loads[d], -d))
            if self.loads[busiest] <= target * (1 + _EPSILON):
                return
            change = self._best_change(busiest)
            if change is None:
                return
            expert, device, other = change
            self._remove(expert, busiest)
            if other is not None:
                self._remove(other, device)
                self._add(other, busiest)
            self._add(expert, device)

    def save_moves(self) -> None:
        """Change to an equal plan with fewer moves, of a small layer with the fewest."""
        limit = max(self.loads, default=0.0) * (1 + _EPSILON)
        self._bring_home(limit)
        while self._may_save() and self._relabel():
            self._bring_home(limit)
        if not self._may_save():
            return
        counts = [sum(expert in held for held in self.held) for expert in range(len(self.costs))]
        if number_of_placements(counts, len(self.held)) <= SMALL:
            self._set(fewest_moves(counts, self.costs, self.capacity, self.warm_of, limit))

    def _homeless(self) -> list[tuple[int, int, int]]:
        """(expert, device, home): a cold copy, and a device where the expert is warm that does not hold it."""
        return [
            (expert, device, home)
            for device, held in enumerate(self.held)
            for expert in sorted(held)
            if device not in self.warm_of[expert]
            for home in self.warm_of[expert]
            if expert not in self.held[home]
        ]

    def _may_save(self) -> bool:
        return bool(self._homeless())

    def _bring_home(self, limit: float) -> None:
        """Move cold copies to where they are warm, alone or in exchange for another, until no such change saves a move."""
        changed = True
        while changed:
            changed = False
            for expert, device, home in self._homeless():
                if expert in self.held[device] and expert not in self.held[home]:
                    changed |= self._exchange(expert, device, home, limit)

    def _exchange(self, expert: int, device: int, home: int, limit: float) -> bool:
        """Move a cold copy home if that saves a move; another may leave for its device, or for a third one with room."""
        cost, held = self.costs[expert], self.held[home]
        load = self.loads[home] + cost
        if load <= limit and len(held) < self.capacity[home]:
            self._remove(expert, device)
            self._add(expert, home)
            return True
        surplus = load - limit
        left = self.loads[device] - cost
        others = [
            d for d in range(len(self.held)) if d != home and d != device and len(self.held[d]) < self.capacity[d]
        ]
        for other in sorted(held):
            given = self.costs[other]
            if given < surplus:
                continue
            # One move is saved by the expert; the other must not lose it again.
            warm = self.warm_of[other]
            stays_warm = home not in warm
            for target in (device, *others):
                new_load = given + (left if target == device else self.loads[target])
                if new_load <= limit and (stays_warm or target in warm) and other not in self.held[target]:
                    self._remove(expert, device)
                    self._remove(other, home)
                    self._add(expert, home)
                    self._add(other, target)
                    return True
        return False

    def _set(self, held: list[set[int]]) -> None:
        self.held = held
        self.loads = [sum(self.costs[e] for e in sorted(found)) for found in held]

    def _relabel(self) -> bool:
        """Give each bundle of copies to the device where most of it is warm; devices too small for it are out."""
        size = len(self.held)
        impossible = sum(map(len, self.held)) + 1
        cost = [
            [
                sum(device not in self.warm_of[e] for e in self.held[bundle])
                if len(self.held[bundle]) <= self.capacity[device]
                else impossible
                for device in range(size)
            ]
            for bundle in range(size)
        ]
        chosen = cheapest_assignment(cost)
        if sum(cost[b][chosen[b]] for b in range(size)) >= self.moves():
            return False
        held, loads = list(self.held), list(self.loads)
        for bundle, device in enumerate(chosen):
            self.held[device], self.loads[device] = held[bundle], loads[bundle]
        return True

    def moves(self) -> int:
        return sum(device not in self.warm_of[e] for device, held in enumerate(self.held) for e in held)

    def placement(self, replicas: Sequence[int]) -> Placement:
        devices = [[] for _ in replicas]
        for device, held in enumerate(self.held):
            for expert in held:
                devices[expert].append(device)
        # The load of a dropped replica falls on those that remain.
        share = [count / len(found) if found else 0.0 for count, found in zip(replicas, devices, strict=True)]
        loads = tuple(sum(self.costs[e] * share[e] for e in sorted(held)) for held in self.held)
        dropped = sum(replicas) - sum(map(len, devices))
        return Placement(tuple(map(tuple, devices)), loads, self.moves(), dropped)

    def _takes(self, device: int, expert: int) -> bool:
        held = self.held[device]
        return len(held) < self.capacity[device] and expert not in held

    def _add(self, expert: int, device: int) -> None:
        self.held[device].add(expert)
        self.loads[device] += self.costs[expert]

    def _remove(self, expert: int, device: int) -> None:
        self.held[device].remove(expert)
        self.loads[device] -= self.costs[expert]

    def _make_room(self, expert: int) -> bool:
        """Place a replica although only devices that hold the expert have room: another copy moves there.

        With devices of one size there always is such a copy: a full device holds more than one with room.
        """
        for full in sorted(range(len(self.held)), key=lambda d: (self.loads[d], d)):
            if expert in self.held[full]:
                continue
            for other in sorted(self.held[full], key=lambda e: (self.costs[e], e)):
                free = [d for d in range(len(self.held)) if self._takes(d, other)]
                if free:
                    self._remove(other, full)
                    self._add(other, min(free, key=lambda d: (self.loads[d], d)))
                    self._add(expert, full)
                    return True
        return False

    def _best_change(self, busiest: int) -> tuple[int, int, int | None] | None:
        """(expert to give away, device, expert taken in return) with the smallest larger load; None if nothing helps."""
        top, best = self.loads[busiest], None
        limit = top * (1 - _EPSILON)
        givers = sorted(self.held[busiest], key=lambda e: (self.costs[e], e))
        for device, load in enumerate(self.loads):
            if load >= limit:
                continue
            held = self.held[device]
            room = len(held) < self.capacity[device]
            takers = [e for e in sorted(held) if e not in self.held[busiest]]
            for expert in givers:
                if expert in held:
                    continue
                cost = self.costs[expert]
                if room and load + cost < limit:
                    limit, best = load + cost, (expert, device, None)
                for other in takers:
                    gain = cost - self.costs[other]
                    if gain > 0:
                        larger = max(top - gain, load + gain)
                        if larger < limit:
                            limit, best = larger, (expert, device, other)
        return best
