"""MoEless' policy for one layer: expert functions that are planned ahead, loaded, kept alive and scaled to zero."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from backend.elastic.cost_model import CostModel
from backend.elastic.functions import GB, WARM, ExpertFunctions
from backend.elastic.placer import Copy, Placement
from backend.elastic.policies import ElasticOptions, Service, balanced_table, plan_layer
from backend.elastic.united import split

#: Assignments after which half of what is known of an expert's share has been replaced by newer steps.
_MEMORY = 100_000.0
#: Seconds in which what is known of the largest step fades to 1 / e.
_PEAK_MEMORY_S = 1.0
#: Share of a large step's assignments that a usual one is taken to have before anything was served.
_USUAL = 0.1
#: Large steps on which a plan is tried, and how large they are, as a share of the largest recent one.
_RECENT, _LARGE = 8, 0.5
#: Expected assignments in a step below which an expert counts as idle; with united experts to fall back on, rarer ones do.
_IDLE, _IDLE_WITH_UNITED = 0.01, 0.5


class Links:
    """The incoming link of each device: transfers of weights wait for each other."""

    def __init__(self, devices: int, cost: CostModel, repeat: float) -> None:
        """`repeat`: real layers that one simulated layer stands for; each transfer occupies the link as often."""
        self.cost, self.repeat = cost, repeat
        self._free_at = [0.0] * devices

    def free_at(self) -> float:
        """When the last transfer that has been started ends."""
        return max(self._free_at)

    def transfer(self, device: int, from_peer: bool, now: float) -> float:
        """Start a transfer; returns when it has arrived."""
        seconds = self.cost.load_seconds(from_peer)
        start = max(now, self._free_at[device])
        self._free_at[device] = start + seconds * self.repeat
        return start + seconds


class ElasticPolicy:
    """Predict, scale, place, load ahead; serve from what is warm.

    The predicted load of a step decides which cold experts are fetched for it. Scaling and placement act on loads smoothed
    over recent predictions, since a copy outlives a step: following every step's noise would only move weights around.
    """

    def __init__(
        self, num_experts: int, capacity: Sequence[int], cost: CostModel, options: ElasticOptions, links: Links
    ) -> None:
        """`capacity` [D]: copies that fit into each device's memory, united experts included."""
        self.cost, self.options, self.links = cost, options, links
        self.num_experts, self.devices = num_experts, len(capacity)
        self.united = -(-num_experts // options.way) if options.threshold is not None else 0
        self.united_devices = [[group % self.devices] for group in range(self.united)]
        resident = [sum(device in held for held in self.united_devices) for device in range(self.devices)]
        self.functions = ExpertFunctions(
            num_experts,
            [max(0, room - taken) for room, taken in zip(capacity, resident, strict=True)],
            int(cost.expert_bytes),
            options.keep_alive_s,
        )
        self._arrives: dict[Copy, float] = {}
        self._shares = [0.0] * num_experts
        self._seen: Sequence[float] | None = None
        #: Assignments of the largest recent step, and when that was known.
        self._largest, self._largest_at = 0.0, 0.0
        #: Loads [E] of the last large steps, which a plan has to shorten to be worth its moves.
        self._recent: deque[Sequence[float]] = deque(maxlen=_RECENT)
        #: Experts that the last plan has; with united experts to fall back on, others are not used and expire.
        self._planned: frozenset[int] = frozenset()
        self._next_plan_at = 0.0
        self._peak = 0
        #: Plans made, and active experts without a warm copy.
        self.plans, self.misses = 0, 0

    def warm_up(self, loads: Sequence[float], assignments: float) -> None:
        """Start warm at time 0, as deployed for earlier `loads` [E], with copies for a step of so many assignments.

        Where memory is for all experts, and no ablation forbids it, they are the copies that periodic rebalancing starts with.
        """
        total = sum(loads)
        self._shares = [load / total for load in loads]
        self._largest = assignments
        roomy = sum(self.functions.capacity) >= self.num_experts
        if roomy and self.options.use_scaler and self.options.use_placer and not self.united:
            plan = balanced_table(loads, self.functions.capacity)
        else:
            plan = self._make_plan(self._worth_keeping(assignments), _USUAL)
        self.functions.commit(self.functions.prepare(sorted(plan.copies), 0.0), 0.0)

    def expect(self, predicted: Sequence[float] | None, now: float) -> None:
        """Fetch what is predicted and cold; plan anew if the copies no longer suit the load.

        Without a prediction for this layer the last step's load stands in for it.
        """
        loads = predicted if predicted is not None and self.options.use_predictor else self._seen
        if loads is None:
            return
        if self.options.threshold is not None:
            loads, _ = split(loads, self.options.threshold, self.options.way)
        total = sum(loads)
        if not total:
            return
        self._commit(now)
        if not self.united:
            self._fetch(loads, now)
        weight = total / (total + _MEMORY)
        self._shares = [old + weight * (load / total - old) for old, load in zip(self._shares, loads, strict=True)]
        fading = math.exp((self._largest_at - now) / _PEAK_MEMORY_S)
        self._largest, self._largest_at = max(total, self._largest * fading), now
        if now >= self._next_plan_at:
            # Which experts to keep is a matter of this step, how many copies and where of the steps that last longest.
            usual = total / self._largest
            self._plan([load / usual for load in self._worth_keeping(total)], now, usual)

    def serve(self, counts: Sequence[float], now: float) -> Service:
        """Run on what is warm; wait for what is not, or (brownout) let united experts serve it."""
        self._seen = counts
        functions = self.functions
        functions.expire(now)
        self._commit(now)
        united = [0.0] * self.united
        if self.options.threshold is not None:
            counts, united = split(counts, self.options.threshold, self.options.way)
        table = [
            functions.warm_devices(expert) if not self.united or expert in self._planned else ()
            for expert in range(self.num_experts)
        ]
        if sum(counts) >= _LARGE * self._largest:
            self._recent.append(counts)
        missing = [expert for expert, count in enumerate(counts) if count and not table[expert]]
        service = Service(self.devices)
        used = service.run([count if table[expert] else 0 for expert, count in enumerate(counts)], table, self.cost)
        self.misses += len(missing)
        if self.united:
            for expert in missing:
                united[expert // self.options.way] += counts[expert]
            service.run(united, self.united_devices, self.cost)
            service.united = sum(united)
        elif missing:
            copies = {expert: self._first_copy(expert, now, used, service) for expert in missing}
            self._wait(service, counts, copies, now)
            used += [copy for copy in copies.values() if functions.state(copy) == WARM]
        functions.use(used, now + service.seconds)
        self._peak = max(self._peak, len(functions.copies()) + self.united)
        service.billed_copies = len(used) + sum(count > 0 for count in united)
        return service

    def cost_gb_s(self, now: float) -> float:
        """Functions, and the united experts that are always resident."""
        self.functions.expire(now)
        return self.functions.cost_gb_s(now) + self.united * self.cost.expert_bytes * now / GB

    def peak_copies(self) -> int:
        return self._peak

    def _worth_keeping(self, assignments: float) -> list[float]:
        """Smoothed loads [E] of a step with so many assignments, 0 for experts that are not worth their memory."""
        loads = [share * assignments for share in self._shares]
        if not self.united:
            # One that is rare, but was used within the keep-alive, must not be waited for when another's replica took its place.
            alive = {expert for expert, _ in self.functions.copies()}
            return [max(load, _IDLE) if load >= _IDLE or e in alive else 0.0 for e, load in enumerate(loads)]
        # United experts serve what is rare: enough experts are kept to carry θ of what original experts are asked for.
        kept, carried, needed = [0.0] * len(loads), 0.0, self.options.threshold * sum(loads)
        for expert in sorted(range(len(loads)), key=lambda e: (-loads[e], e)):
            if carried >= needed or loads[expert] < _IDLE_WITH_UNITED:
                break
            kept[expert] = loads[expert]
            carried += loads[expert]
        return kept

    def _plan(self, loads: Sequence[float], now: float, usual: float) -> None:
        """Scale and place for smoothed loads unless the copies in memory serve them well enough; start the loads.

        `loads` are those of a large step, of which a usual one has the share `usual`.
        """
        self._planned = frozenset(expert for expert, load in enumerate(loads) if load)
        if self._suffices(loads, frozenset(self.functions.copies())):
            return
        plan = self._make_plan(loads, usual)
        if not self._shortens(plan.copies):
            return
        self.plans += 1
        begin = now + self.cost.planning_s
        self._load(sorted(plan.copies), begin)
        # Transfers take at most about half of the links' time: the rest is for experts that a step waits for.
        self._next_plan_at = now + max(self.options.replan_s, 2 * (self.links.free_at() - begin))

    def _make_plan(self, loads: Sequence[float], usual: float) -> Placement:
        room = sum(self.functions.capacity)
        if sum(load > 0 for load in loads) > room:
            # More active experts than fit: the heaviest are planned for, the others load when they are needed.
            kept = set(sorted(range(len(loads)), key=lambda e: (-loads[e], e))[:room])
            loads = [load if expert in kept else 0.0 for expert, load in enumerate(loads)]
        self._planned = frozenset(expert for expert, load in enumerate(loads) if load)
        copies = frozenset(self.functions.copies())
        return plan_layer(loads, self.functions.capacity, copies, self.cost, self.options, usual)

    def _suffices(self, loads: Sequence[float], copies: frozenset[Copy]) -> bool:
        """Whether the copies in memory, warm or loading, serve these loads in balance."""
        table: list[list[int]] = [[] for _ in loads]
        for expert, device in copies:
            table[expert].append(device)
        if any(load and not held for load, held in zip(loads, table, strict=True)):
            return False
        service = Service(self.devices)
        service.run(loads, table, self.cost)
        return service.seconds <= sum(service.busy) / self.devices * (1 + self.options.unrest)

    def _shortens(self, copies: frozenset[Copy]) -> bool:
        """Whether the last large steps would have been shorter with these copies; so if an active expert has none yet."""
        present = frozenset(self.functions.copies())
        if not {expert for expert, _ in copies} <= {expert for expert, _ in present}:
            return True
        return self._seconds(copies) < self._seconds(present) * (1 - self.options.gain)

    def _seconds(self, copies: frozenset[Copy]) -> float:
        """Of the last large steps, served by these copies as far as they have any."""
        table: list[list[int]] = [[] for _ in range(self.num_experts)]
        for expert, device in copies:
            table[expert].append(device)
        total = 0.0
        for loads in self._recent:
            service = Service(self.devices)
            service.run([load if held else 0.0 for load, held in zip(loads, table, strict=True)], table, self.cost)
            total += service.seconds
        return total

    def _fetch(self, loads: Sequence[float], now: float) -> None:
        """Load one copy of each expected expert that has none, heaviest first, where there is most room."""
        present = {expert for expert, _ in self.functions.copies()}
        cold = [expert for expert, load in enumerate(loads) if load and expert not in present]
        for expert in sorted(cold, key=lambda e: (-loads[e], e)):
            self._load([(expert, self._roomiest())], now)

    def _roomiest(self, busy: Sequence[float] | None = None) -> int:
        held, size = self.functions.in_memory(), self.functions.capacity
        return max(range(self.devices), key=lambda d: (size[d] - held[d], -busy[d] if busy else 0.0, -d))

    def _load(self, copies: Sequence[Copy], now: float, in_use: Sequence[Copy] = ()) -> None:
        for copy in self.functions.prepare(copies, now, in_use):
            self._arrives[copy] = self.links.transfer(copy[1], bool(self.functions.warm_devices(copy[0])), now)

    def _first_copy(self, expert: int, now: float, in_use: Sequence[Copy], service: Service) -> Copy:
        """The copy of an expert without a warm one that arrives first; loaded on demand if there is none."""
        loading = [(at, copy) for copy, at in self._arrives.items() if copy[0] == expert]
        if loading:
            return min(loading)[1]
        copy = (expert, self._roomiest(service.busy))
        self._load([copy], now, in_use)
        return copy

    def _commit(self, now: float) -> None:
        arrived = [copy for copy, at in self._arrives.items() if at <= now]
        for copy in arrived:
            del self._arrives[copy]
        if arrived:
            self.functions.commit(arrived, now)

    def _wait(self, service: Service, counts: Sequence[float], copies: dict[int, Copy], now: float) -> None:
        """Late experts start when their weights are there; their devices have done the rest by then."""
        # A copy for which no memory could be had is read from host memory, for this step alone.
        streamed = now + self.cost.load_seconds(from_peer=False)
        order = sorted((self._arrives.get(copy, streamed), expert) for expert, copy in copies.items())
        for arrives, expert in order:
            device = copies[expert][1]
            service.busy[device] = max(service.busy[device], arrives - now) + self.cost.replica_s(counts[expert])
            service.assignments[device] += counts[expert]
            service.served += counts[expert]
        service.stall_s = order[-1][0] - now
        self._commit(order[-1][0])
