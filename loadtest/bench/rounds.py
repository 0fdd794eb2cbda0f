"""Engines measured in turn, run by run, and the figures that come of it."""

from __future__ import annotations

from dataclasses import asdict

from loadtest.bench.budget import Budget
from loadtest.bench.memory import Memory, peak_bytes
from loadtest.bench.our_engine import AtSettings, OurEngine
from loadtest.bench.peers import Peer, Run, tokens_equal
from loadtest.bench.workload import Rates, Workload

RATES = ("prefill_tokens_per_s", "decode_tokens_per_s", "output_tokens_per_s")
OURS = "ours"


class Rounds:
    """Engines that run one after the other, round by round, and what they measured."""

    def __init__(self, work: Workload, prompts: list[list[int]]) -> None:
        self.work, self.prompts = work, prompts
        self.engines: dict[str, Peer] = {}
        self.rates: dict[str, list[Rates]] = {}
        self.tokens: dict[str, list[list[int]]] = {}
        self.errors: dict[str, str] = {}

    def round(self, budget: Budget, measured: bool = True) -> None:
        """Each engine once; when the budget is spent, ours only."""
        for name in list(self.engines):
            if name != OURS and budget.spent:
                continue
            try:
                first, whole = self._runs(name)
            except Exception as error:
                if name == OURS:
                    raise
                self.fail(name, error)
                continue
            self.tokens[name] = whole.tokens
            if measured:
                self.rates.setdefault(name, []).append(Rates.of(self.work, first.seconds, whole.seconds))

    def warm_up(self, name: str) -> None:
        self._runs(name)

    def fail(self, name: str, error: Exception) -> None:
        self.engines.pop(name, None)
        self.errors[name] = str(error)

    def _runs(self, name: str) -> tuple[Run, Run]:
        engine = self.engines[name]
        return engine.run(self.prompts, 1), engine.run(self.prompts, self.work.new_tokens)


def figures(
    rounds: Rounds, base: AtSettings, ours: OurEngine, memory: Memory | None, peers: list[str], points: list[str]
) -> dict:
    """The result's figures from the rounds so far."""
    median = Rates.median(rounds.rates[OURS])
    result: dict = {name: getattr(median, name) for name in Rates.__struct_fields__}
    result |= {
        "step_ms": rounds.work.requests / median.decode_tokens_per_s * 1e3,
        **_decode_step(base, rounds.work),
        "peak_memory_bytes": memory.peak_bytes if memory else peak_bytes(ours.device),
        "memory": memory,
        "runs": list(rounds.rates[OURS]),
    }
    for key, names in (("points", points), ("peers", peers)):
        if names:
            result[key] = {name: _compared(rounds, name, median) for name in names}
    return result


def _decode_step(point: AtSettings, work: Workload) -> dict:
    """What a decode step at this point takes, reads and serves."""
    context = work.prompt_tokens + work.new_tokens / 2
    step_s = point.decode_step_s
    return {
        # From step to step, while `step_ms` follows from the rate, to which steps that also compute prompts contribute.
        "decode_step_ms": None if step_s is None else step_s * 1e3,
        "decode_step_bytes": point.ours.decode_step_bytes(point.stats.active_slots, work.requests, context),
        "active_slots_per_layer": point.stats.active_slots,
        "active_slots_by_layer": point.stats.active_slots_by_layer,
        "assignments_per_token": point.stats.assignments_per_token,
        "united_share": point.stats.united_share,
    }


def _compared(rounds: Rounds, name: str, ours: Rates) -> dict:
    """Another engine's or point's figures, with ours over theirs (for points: theirs over ours) as `ratio`."""
    if name in rounds.errors:
        return {"error": rounds.errors[name]}
    if name not in rounds.rates:
        return {"skipped": "the budget was spent"}
    engine = rounds.engines[name]
    median = Rates.median(rounds.rates[name])
    if isinstance(engine, AtSettings):
        above, below, extra = median, ours, {"settings": asdict(engine.settings), **_decode_step(engine, rounds.work)}
    else:
        above, below, extra = ours, median, {"tokens_equal": tokens_equal(rounds.tokens[OURS], rounds.tokens[name])}
    ratio = {rate: getattr(above, rate) / getattr(below, rate) for rate in RATES}
    return {"median": median, "ratio": ratio, **extra, "runs": list(rounds.rates[name])}


def not_measured(other: dict) -> str | None:
    """Why a peer or point has no figures; None if it has."""
    return other.get("error") or other.get("skipped")
