"""The demo's load: rates from capacity, a trace fitted to it, and the controller beside the server."""

import asyncio
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from backend.errors import ConfigError
from loadtest.demo import burst
from loadtest.demo.burst import (
    BURST,
    CALM,
    BurstShape,
    Ground,
    burst_schedule,
    measure_ground,
    peak_rps,
    trace_schedule,
)
from loadtest.prompts import GeneratedPrompts
from loadtest.record import Slo
from loadtest.schedule import Arrival, Schedule

GROUND = Ground(capacity_rps=40.0, tokens_per_s=40.0 * 112, slo=Slo(ttft_s=0.5, itl_s=0.1))


def test_the_burst_doubles_a_rate_below_capacity():
    shape = BurstShape()
    _, schedule = burst_schedule(GROUND, shape, seed=3)
    (begin, end) = schedule.bursts[0]
    inside = sum(begin <= arrival.at_s < end for arrival in schedule.arrivals)
    outside = len(schedule.arrivals) - inside
    assert inside / (end - begin) == pytest.approx(BURST * GROUND.capacity_rps, rel=0.15)
    assert outside / (schedule.duration_s - end + begin) == pytest.approx(CALM * GROUND.capacity_rps, rel=0.15)
    assert schedule == burst_schedule(GROUND, shape, seed=3)[1] != burst_schedule(GROUND, shape, seed=4)[1]


def test_a_trace_is_fitted_to_time_and_capacity(tmp_path):
    trace = tmp_path / "trace.csv"
    rows = [f"{i * 0.5},{200 + i % 7 * 300},{100 + i % 5 * 100}" for i in range(1800)]
    trace.write_text("\n".join(["arrival_s,input_tokens,output_tokens", *rows]))
    shape = BurstShape()
    _, schedule = trace_schedule(trace, GROUND, shape, seed=1)
    assert schedule.duration_s == pytest.approx(shape.before_s + shape.burst_s + shape.after_s, rel=0.01)
    tokens = sum(arrival.input_tokens + arrival.output_tokens for arrival in schedule.arrivals)
    assert tokens / schedule.duration_s == pytest.approx(0.85 * GROUND.tokens_per_s, rel=0.1)
    assert statistics.fmean(a.output_tokens for a in schedule.arrivals) == pytest.approx(48, rel=0.1)
    assert max(a.input_tokens for a in schedule.arrivals) <= 4 * 80


def test_a_short_trace_is_not_stretched(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,100,10\n5,100,10\n10,100,10\n")
    _, schedule = trace_schedule(trace, GROUND, BurstShape(), seed=1)
    assert schedule.duration_s <= 10.1


def test_an_unknown_trace_is_named(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"trace\.csv"):
        trace_schedule(trace, GROUND, BurstShape(), seed=1)


def test_the_peak_is_the_busiest_window():
    times = [0.0, 1.0, 10.0, 10.1, 10.2, 12.0, 30.0]
    schedule = Schedule([Arrival(at_s, 1, 1) for at_s in times], 31.0)
    assert peak_rps(schedule, window_s=1.0) == 3.0
    assert peak_rps(schedule, window_s=5.0) == 4 / 5


def test_a_ground_on_which_nobody_waits_in_the_burst_is_measured_again(monkeypatch):
    """A machine that was slow when its capacity was measured: the probe shows it, with prompts of its own."""
    grounds, probes, prompts, late = [GROUND, replace(GROUND, capacity_rps=50.0)], [], [], 0.0

    async def measure(server, given, shape, seed, console):
        prompts.append(given)
        return grounds[len(prompts) > 1]

    async def run_load(schedule, given, *, info, **kwargs):
        assert info.slo == GROUND.slo
        assert len(schedule.arrivals) / schedule.duration_s == pytest.approx(BURST * GROUND.capacity_rps, rel=0.15)
        probes.append(given)
        return SimpleNamespace(result=SimpleNamespace(ttft_violation_ratio=late)), []

    monkeypatch.setattr(burst, "_measure", measure)
    monkeypatch.setattr(burst, "run_load", run_load)
    server = SimpleNamespace(http="h", grpc="g")
    for share, again in ((0.0, True), (0.04, True), (None, True), (0.06, False)):
        late = share
        prompts.clear()
        found = asyncio.run(measure_ground(server, GeneratedPrompts, BurstShape(), 5, Console(quiet=True)))
        assert found == grounds[again]
        assert len(prompts) == 1 + again
        assert len({given.text(0, 40) for given in (*prompts, probes[-1])}) == len(prompts) + 1
