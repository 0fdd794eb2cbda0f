"""The quality lost follows from thresholds and profile: exact at levels, never less for more dimming, weighted by tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.brownout.profile import Level, Profile, read_profile
from backend.config import DEMO_CHECKPOINT
from backend.errors import ConfigError
from loadtest.quality import LossCurve, quality_of_run
from loadtest.record import RequestRecord
from loadtest.telemetry import Sample


def level(prefill: float, decode: float, loss: float, exact: float, way: int = 8, mechanism: str = "united") -> Level:
    return Level(mechanism, way, prefill, decode, loss, 9.0, 4.0, 0.8, other_losses={"exact_match": exact})


FULL = Level("united", 0, 1.0, 1.0, 0.0, 50.0, 4.0, 1.0)
#: The path turns: its second level keeps prompts at full quality.
LEVELS = (FULL, level(1.0, 0.4, 1.0, 3.0), level(0.4, 0.4, 3.0, 8.0), level(0.0, 0.0, 5.0, 20.0))
PROFILE = Profile("ck", "f" * 32, 32, "letter", (*LEVELS, level(0.5, 0.5, 9.0, 30.0, 0, "reroute")))
thresholds = st.floats(0, 1)


@pytest.mark.parametrize(
    ("prefill", "decode", "letter", "exact"),
    [
        (1.0, 1.0, 0.0, 0.0),
        (1.0, 0.4, 1.0, 3.0),
        (1.0, 0.7, 0.5, 1.5),
        (0.7, 0.4, 2.0, 5.5),
        (0.7, 1.0, 2.0, 5.5),  # on no line: as the next one that is dimmed as far
        (0.2, 0.9, 4.0, 14.0),
        (0.0, 0.0, 5.0, 20.0),
    ],
)
def test_losses_between_levels_are_interpolated(prefill, decode, letter, exact):
    assert LossCurve(PROFILE, mechanism="united").losses(prefill, decode) == pytest.approx(
        {"letter": letter, "exact_match": exact}
    )


@given(one=st.tuples(thresholds, thresholds), other=st.tuples(thresholds, thresholds))
def test_more_dimming_never_costs_less(one, other):
    for curve in (
        LossCurve(PROFILE, mechanism="united"),
        LossCurve(read_profile(DEMO_CHECKPOINT / "brownout-profile.json")),
    ):
        deeper = curve.losses(*map(min, one, other))
        assert all(deeper[name] >= loss - 1e-9 for name, loss in curve.losses(*one).items())


def test_what_the_profile_lacks_is_named():
    with pytest.raises(
        ConfigError, match="no level of united with way 4; it has reroute with way 0, united with way 8"
    ):
        LossCurve(PROFILE, mechanism="united", way=4)


def record(responses: list[tuple[float, int]], brownout: str = "auto") -> RequestRecord:
    return RequestRecord(
        id=0, protocol="http_stream", intended_start_s=0, start_s=0, responses=responses, brownout=brownout
    )


def sample(time_s: float, prefill: float | None, decode: float | None) -> Sample:
    return Sample(time_s=time_s, threshold_prefill=prefill, threshold_decode=decode, mechanism="united", way=8)


def test_every_token_loses_what_the_thresholds_of_its_moment_cost():
    samples = [sample(10, 1, 1), sample(20, 1, 0.4), sample(25, None, None), sample(30, 0, 0)]
    records = [
        record([(5, 1), (12, 2), (20, 3)]),  # 3 at full quality, 3 at 1 %
        record([(29, 4), (90, 5)]),  # 4 at 1 %, 5 at 5 %
        record([(35, 5)], "never"),
    ]
    found = quality_of_run(records, samples, PROFILE)
    assert found.mean_loss_percent == pytest.approx((3 * 1 + 4 * 1 + 5 * 5) / 20)
    assert found.other_mean_losses == {"exact_match": pytest.approx((3 * 3 + 4 * 3 + 5 * 20) / 20)}
    assert (found.max_loss_percent, found.measure, found.is_lower_bound) == (5.0, "letter", False)


def test_dimming_beyond_the_profile_is_a_lower_bound():
    shallow = Profile("ck", "f" * 32, 32, "letter", LEVELS[:2])
    found = quality_of_run([record([(1, 1)])], [sample(0, 0.5, 0.4)], shallow)
    assert (found.mean_loss_percent, found.is_lower_bound) == (1.0, True)


def test_a_run_is_judged_by_the_mechanism_that_it_dimmed_with():
    rerouted = [Sample(time_s=0, threshold_prefill=0.5, threshold_decode=0.5, mechanism="reroute", way=0)]
    assert quality_of_run([record([(1, 1)])], rerouted, PROFILE).mean_loss_percent == 9.0
    unknown = [Sample(time_s=0, threshold_prefill=0.5, threshold_decode=0.5)]
    assert quality_of_run([record([(1, 1)])], unknown, PROFILE).mean_loss_percent == 9.0, "of the deepest level"
    with pytest.raises(ConfigError, match="runs of one mechanism"):
        quality_of_run([record([(1, 1)])], [*rerouted, sample(1, 1, 1)], PROFILE)


def test_unknown_thresholds_and_no_tokens_are_no_quality():
    assert quality_of_run([record([(1, 1)])], [sample(0, None, 1)], PROFILE) is None
    assert quality_of_run([record([])], [sample(0, 1, 1)], PROFILE) is None
