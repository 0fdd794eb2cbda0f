"""One line of text makes a schedule: the same for the same seed, split among senders without loss."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.errors import ConfigError
from loadtest.load_spec import build_schedule
from loadtest.schedule import Arrival, Lengths, Schedule


def test_a_specification_sets_rates_lengths_and_classes():
    schedule = build_schedule(
        "step:base=20,duration=30,start=10,end=20", seed=4, input_tokens="10-20", output_tokens="7", never_share=0.3
    )
    assert schedule.duration_s == 30 and schedule.bursts == [(10, 20)]
    assert {a.input_tokens for a in schedule.arrivals} == set(range(10, 21))
    assert {a.output_tokens for a in schedule.arrivals} == {7}
    never = sum(a.brownout == "never" for a in schedule.arrivals) / len(schedule.arrivals)
    assert 0.2 < never < 0.4


def test_equal_loads_have_equal_digests_and_any_change_shows():
    spec = "poisson:rate=5,duration=20"
    base = build_schedule(spec, seed=1)
    assert base.sha256() == build_schedule(spec, seed=1).sha256()
    others = [build_schedule(spec, seed=2), build_schedule(spec, seed=1, never_share=1.0)]
    others += [build_schedule(spec, seed=1, output_tokens="65"), build_schedule(spec + ",cv=2", seed=1)]
    assert len({schedule.sha256() for schedule in [base, *others]}) == 5


def test_the_digest_is_that_of_the_documented_text():
    """It stands in result files, so it must not change with the code."""
    schedule = Schedule([Arrival(0.5, 3, 4), Arrival(1.25, 5, 6, "never")], 2.0)
    assert schedule.sha256() == "e508edd50724cf77194243570a0a86f0e47e49a1729a4000d646cdf5114282c1"


@given(total=st.integers(0, 40), count=st.integers(1, 7))
def test_senders_share_a_schedule_without_loss(total, count):
    schedule = Schedule([Arrival(float(i), 1, 1) for i in range(total)], 1.0)
    parts = [schedule.part(index, count) for index in range(count)]
    assert sorted(request for part in parts for request in part) == schedule.numbered()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["0", "5-2", "x", "", "-3", "3-x"])
def test_unusable_lengths_are_refused(text):
    with pytest.raises(ConfigError, match="LOW-HIGH"):
        Lengths(text)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("stp:base=1", "unknown load 'stp'; allowed are poisson, gamma, step, spike, diurnal, trace"),
        ("step:bas=1", "unknown key 'bas'; allowed are duration, cv, base, burst, start, end"),
        ("step:base=fast", "base must be a number, got 'fast'"),
        ("poisson:rate=nan", "rate must be more than 0, got nan"),
        ("trace:", "cannot be read"),
        ("trace:/nowhere.csv", "/nowhere.csv cannot be read"),
        ("poisson:rate=0.001,duration=1", "no request within 1 s"),
    ],
)
def test_wrong_specifications_say_what_is_wrong(spec, message):
    with pytest.raises(ConfigError) as caught:
        build_schedule(spec)
    assert message in str(caught.value)
