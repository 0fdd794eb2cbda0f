"""Expert functions: the copies of one layer's experts as serverless functions, and what their memory costs.

A copy (expert, device) is cold, loading or warm. A change of plan goes through four steps, of which only the last touches
what a running step reads:

    check    the plan is possible at all (known experts and devices, within each device's memory)
    prepare  memory is reserved for missing copies, idle ones give way; the copies are now loading
    load     the caller transfers the weights, in any order and at its own pace
    commit   copies that have arrived become warm: between steps, all at once, under a new version

Time is passed in, in seconds on any monotonic clock, so that the simulator and an engine use the same code.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from backend.elastic.placer import Copy
from backend.experts.telemetry import FunctionTelemetry

STATES = COLD, LOADING, WARM = "cold", "loading", "warm"
GB = 1e9


@dataclass
class _Function:
    state: str
    reserved_at: float
    last_used: float


class ExpertFunctions:
    """The copies of one layer's experts. Not thread-safe: the planner's thread calls everything."""

    def __init__(
        self, num_experts: int, capacity: Sequence[int], bytes_per_expert: int, keep_alive_s: float, now: float = 0.0
    ) -> None:
        """`capacity` [D]: copies that each device's memory holds; `keep_alive_s`: how long an unused copy stays warm."""
        if keep_alive_s < 0 or bytes_per_expert < 0 or any(room < 0 for room in capacity):
            raise ValueError("keep_alive_s, bytes_per_expert and capacity must be 0 or more")
        self.num_experts, self.capacity = num_experts, list(capacity)
        self.bytes_per_expert, self.keep_alive_s = bytes_per_expert, keep_alive_s
        #: Counts commits that changed something; a step reads the tables of one version.
        self.version = 0
        self._functions: dict[Copy, _Function] = {}
        self._warm: list[list[int]] = [[] for _ in range(num_experts)]
        self._in_memory = [0] * len(self.capacity)
        self._spent_gb_s = 0.0
        self._next_expiry = float("inf")
        self._started_at = now
        self._totals = FunctionTelemetry()

    def state(self, copy: Copy) -> str:
        function = self._functions.get(copy)
        return function.state if function else COLD

    def warm_devices(self, expert: int) -> Sequence[int]:
        """Ascending devices where the expert can run now."""
        return self._warm[expert]

    def copies(self) -> Collection[Copy]:
        """Every copy in memory, loading or warm."""
        return self._functions.keys()

    def in_memory(self) -> Sequence[int]:
        """[D] copies in each device's memory."""
        return self._in_memory

    def check(self, plan: Collection[Copy]) -> None:
        """Raise ValueError, naming the reason, if the copies of a plan could not all be in memory together."""
        needed = [0] * len(self.capacity)
        for expert, device in plan:
            if not (0 <= expert < self.num_experts and 0 <= device < len(needed)):
                raise ValueError(f"the plan has expert {expert} on device {device}, which do not both exist")
            needed[device] += 1
        for device, (count, room) in enumerate(zip(needed, self.capacity, strict=True)):
            if count > room:
                raise ValueError(f"the plan has {count} copies on device {device}, whose memory holds {room}")

    def prepare(self, plan: Collection[Copy], now: float, in_use: Collection[Copy] = ()) -> list[Copy]:
        """Reserve memory for the plan's cold copies; returns those to load now, in the order of the plan.

        Warm copies outside the plan give way, those of experts that are warm elsewhere first, then longest unused first, but
        never those that a running step uses (`in_use`), nor the only warm copy of an expert that the plan has elsewhere: it
        serves until its successor is there. A copy for which there is no room stays cold; a later `prepare` tries again.
        Raises ValueError as `check` does.
        """
        self.check(plan)
        self.expire(now)
        missing = [copy for copy in plan if copy not in self._functions]
        if not missing:
            return []
        started = []
        wanted = frozenset(plan)
        experts = {expert for expert, _ in wanted}
        kept = wanted.union(in_use)
        for copy in missing:
            device = copy[1]
            if self._in_memory[device] >= self.capacity[device] and not self._evict(device, kept, experts, now):
                self._totals.refusals += 1
                continue
            self._functions[copy] = _Function(LOADING, now, now)
            self._in_memory[device] += 1
            started.append(copy)
        self._totals.loads += len(started)
        return started

    def commit(self, arrived: Iterable[Copy], now: float) -> int:
        """Make loaded copies warm, between steps; returns the version. Raises ValueError for one that was not loading."""
        changed = False
        for copy in arrived:
            function = self._functions.get(copy)
            if function is None or function.state != LOADING:
                raise ValueError(f"copy {copy} is {self.state(copy)}, only loading copies can be committed")
            function.state, function.last_used = WARM, now
            self._warm[copy[0]] = sorted([*self._warm[copy[0]], copy[1]])
            self._next_expiry = min(self._next_expiry, now + self.keep_alive_s)
            changed = True
        self.version += changed
        return self.version

    def cancel(self, copy: Copy, now: float) -> None:
        """A load failed: the copy is cold again. Raises ValueError if it was not loading."""
        if self.state(copy) != LOADING:
            raise ValueError(f"copy {copy} is {self.state(copy)}, only loading copies can be cancelled")
        self._release(copy, now)
        self._totals.failures += 1

    def use(self, copies: Iterable[Copy], now: float) -> None:
        """Warm copies served a step that ended `now`: their keep-alive starts again."""
        for copy in copies:
            self._functions[copy].last_used = now

    def expire(self, now: float) -> None:
        """Release warm copies that have been idle for the keep-alive time, dated to the moment when it ended."""
        if now < self._next_expiry:
            return
        limit = now - self.keep_alive_s
        warm = [(copy, f) for copy, f in self._functions.items() if f.state == WARM]
        for copy, function in warm:
            if function.last_used <= limit:
                self._release(copy, function.last_used + self.keep_alive_s)
                self._totals.expiries += 1
        left = [f.last_used for _, f in warm if f.last_used > limit]
        self._next_expiry = min(left, default=float("inf")) + self.keep_alive_s

    def cost_gb_s(self, now: float) -> float:
        """Memory × time of all copies since the start, loading and keep-alive included."""
        live = sum(now - function.reserved_at for function in self._functions.values())
        return self._spent_gb_s + live * self.bytes_per_expert / GB

    def always_on_gb_s(self, now: float) -> float:
        """What one copy of each expert would have cost, had it been in memory all the time."""
        return self.num_experts * (now - self._started_at) * self.bytes_per_expert / GB

    def telemetry(self, now: float) -> FunctionTelemetry:
        """The totals, and the states as of now."""
        self.expire(now)
        warm = sum(map(len, self._warm))
        return replace(
            self._totals,
            warm=warm,
            loading=len(self._functions) - warm,
            cold=self.num_experts - len({expert for expert, _ in self._functions}),
            slot_byte_s=self.cost_gb_s(now) * GB,
            always_on_byte_s=self.always_on_gb_s(now) * GB,
        )

    def _evict(self, device: int, kept: Collection[Copy], experts: Collection[int], now: float) -> bool:
        idle = [
            (len(self._warm[copy[0]]) == 1, function.last_used, copy)
            for copy, function in self._functions.items()
            if copy[1] == device
            and function.state == WARM
            and copy not in kept
            and not (copy[0] in experts and len(self._warm[copy[0]]) == 1)
        ]
        if not idle:
            return False
        self._release(min(idle)[2], now)
        self._totals.evictions += 1
        return True

    def _release(self, copy: Copy, now: float) -> None:
        function = self._functions.pop(copy)
        if function.state == WARM:
            self._warm[copy[0]] = [device for device in self._warm[copy[0]] if device != copy[1]]
        self._in_memory[copy[1]] -= 1
        self._spent_gb_s += (now - function.reserved_at) * self.bytes_per_expert / GB
