"""Readings from statuses: differences over the window, per engine and start."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.errors import ConfigError
from controller.laws import Limits
from controller.window import Window
from tests.controller.fake_plane import FakePlane


@pytest.fixture
def plane(tmp_path: Path) -> FakePlane:
    return FakePlane(tmp_path)


def window() -> Window:
    return Window(2.0, Limits(0.5, 0.05))


def at(status: dict, time_s: float, **engine: float) -> dict:
    """A status moved to another time."""
    entry = status["telemetry"][0] | {"time_s": time_s} | engine
    return status | {"time_s": time_s, "telemetry": [entry]}


def test_latencies_are_those_of_the_window(plane: FakePlane) -> None:
    seen = window()
    plane.serve(9.0, 9.0)
    assert seen.add(at(plane.call(), 100.0)) is None  # counters alone say nothing
    reading = seen.add(at(plane.call(), 100.5))
    assert (reading.ttft_p90_s, reading.itl_violation_ratio) == (None, None)
    plane.serve(0.2, 0.1)
    reading = seen.add(at(plane.call(), 101.0))
    assert reading.ttft_p90_s == pytest.approx(0.2, rel=0.05)
    assert reading.itl_p90_s == pytest.approx(0.1, rel=0.05)
    assert (reading.ttft_violation_ratio, reading.itl_violation_ratio) == (0.0, 1.0)
    assert len(reading.engines[0].steps) == 20
    reading = seen.add(at(plane.call(), 102.0))
    assert reading.ttft_p90_s is not None
    assert reading.engines[0].steps == ()
    seen.add(at(plane.call(), 103.0))
    assert seen.add(at(plane.call(), 104.0)).ttft_p90_s is None


def test_arrivals_are_rates(plane: FakePlane) -> None:
    seen = window()
    seen.add(at(plane.call(), 100.0))
    plane.queue(requests=6, prompt_tokens=600)
    engine = seen.add(at(plane.call(), 102.0)).engines[0]
    assert (engine.requests_per_s, engine.prompt_tokens_per_s) == (3.0, 300.0)


def test_a_restarted_engine_starts_a_new_count(plane: FakePlane) -> None:
    seen = window()
    plane.serve(0.2, 0.1, 50)
    seen.add(at(plane.call(), 100.0))
    assert seen.add(at(plane.call(), 101.0)) is not None
    restarted = plane.call()
    for name in ("ttft_counts", "itl_counts", "steps"):
        restarted["telemetry"][0][name] = []
    assert seen.add(at(restarted, 102.0, generation=2, num_steps=0)) is None
    assert seen.add(at(restarted, 103.0, generation=2, num_steps=0)).ttft_p90_s is None


def test_a_clock_that_jumps_makes_no_rates_and_no_latencies_up(plane: FakePlane) -> None:
    """Forward: so much time, so few arrivals. Backward, or counters that are lower: a new count."""
    seen = window()
    plane.serve(0.2, 0.1)
    seen.add(at(plane.call(), 100.0))
    plane.queue(requests=6, prompt_tokens=600)
    reading = seen.add(at(plane.call(), 3700.0))
    assert 0 <= reading.engines[0].requests_per_s < 0.01
    assert reading.ttft_p90_s is None
    assert seen.add(at(plane.call(), 50.0)) is None
    reading = seen.add(at(plane.call(), 51.0))
    assert (reading.engines[0].requests_per_s, reading.ttft_p90_s) == (0.0, None)
    assert seen.add(at(plane.call(), 52.0, num_steps=3)) is None


def test_no_engine_is_no_reading(plane: FakePlane) -> None:
    assert window().add(plane.call() | {"telemetry": []}) is None


def test_buckets_of_another_version_are_refused(plane: FakePlane) -> None:
    with pytest.raises(ConfigError, match="one version"):
        window().add(plane.call() | {"buckets": {"first_s": 1, "ratio": 2, "count": 3}})
