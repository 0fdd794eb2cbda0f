"""Synthetic arrivals: ordered, repeatable, with the rates and variation that were asked for."""

import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.errors import ConfigError
from loadtest.arrivals import PATTERNS, Diurnal, Gamma, Poisson, Spike, Step


@given(kind=st.sampled_from(list(PATTERNS.values())), seed=st.integers(0, 10**6), duration=st.floats(1, 100))
def test_times_are_ordered_within_the_run_and_the_same_for_a_seed(kind, seed, duration):
    pattern = kind(duration=duration)
    times = pattern.times(seed)
    assert times == sorted(times)
    assert all(0 <= t < duration for t in times)
    assert times == kind(duration=duration).times(seed)


def test_seeds_differ():
    assert Poisson(rate=10).times(1) != Poisson(rate=10).times(2)


def count(times, start, end):
    return sum(1 for t in times if start <= t < end)


@pytest.mark.parametrize(
    ("pattern", "start", "end", "expected"),
    [
        (Poisson(rate=20, duration=200), 0, 200, 4000),
        (Step(base=20, duration=200), 0, 100, 2000),
        (Step(base=20, duration=200), 100, 200, 4000),
        (Step(base=20, burst=100, start=50, end=90, duration=200), 50, 90, 4000),
        (Step(base=20, burst=100, start=50, end=90, duration=200), 90, 200, 2200),
        (Spike(base=10, peak=200, width=10, every=100, duration=200), 50, 60, 2000),
        (Spike(base=10, peak=200, width=10, every=100, duration=200), 60, 150, 900),
        (Diurnal(rate=40, swing=1.0, duration=200), 0, 200, 8000),
        (Diurnal(rate=40, swing=1.0, duration=200), 50, 150, 4000 + 8000 / math.pi),
    ],
)
def test_counts_follow_the_profile(pattern, start, end, expected):
    """Within five standard deviations of a Poisson count."""
    assert count(pattern.times(seed=7), start, end) == pytest.approx(expected, abs=5 * math.sqrt(expected))


@pytest.mark.parametrize("cv", [0.0, 0.3, 1.0, 3.0])
def test_gaps_have_the_asked_variation(cv):
    times = Gamma(rate=50, cv=cv, duration=400).times(seed=3)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.1)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.1, abs=1e-6)


def test_the_default_step_doubles_the_rate_in_mid_run():
    step = Step(base=3, duration=80)
    assert step.profile()[1] == (40, 6) and step.bursts() == [(40, 80)]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Poisson(rate=0), "rate"),
        (lambda: Poisson(duration=-1), "duration"),
        (lambda: Gamma(cv=100), "cv"),
        (lambda: Step(start=70, duration=60), "start"),
        (lambda: Step(start=10, end=5), "end"),
        (lambda: Spike(width=40, every=30), "width"),
        (lambda: Diurnal(swing=2), "swing"),
        (lambda: Poisson(rate=math.inf), "rate"),
    ],
)
def test_unusable_parameters_are_named(make, named):
    with pytest.raises(ConfigError, match=f": {named} must be"):
        make()
