"""Control laws: bounds, monotone response, what is unknown changes nothing, and the paper's sequence."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.brownout.step_model import StepModel
from controller.laws import LAWS, Law, Limits, Predictive, Salc
from controller.reading import Reading
from tests.controller.readings import measured_steps, reading

LIMITS = Limits(0.5, 0.05)
FITTED = StepModel()
FITTED.learn(measured_steps())


def predictive(limits: Limits = LIMITS, **options: float) -> Predictive:
    return Predictive(limits, model=StepModel.from_state(FITTED.state()), **options)


def brightness(law: Law) -> float:
    return law.threshold_prefill + law.threshold_decode


latencies = st.none() | st.floats(0, 3)
readings = st.none() | st.builds(
    reading,
    ttft_p90_s=latencies,
    itl_p90_s=latencies,
    running=st.integers(0, 64),
    waiting=st.integers(0, 50),
    waiting_tokens=st.integers(0, 20000),
    oldest_waiting_s=st.floats(0, 10),
    kv_usage_ratio=st.floats(0, 1),
    requests_per_s=st.floats(0, 100),
    prompt_tokens_per_s=st.floats(0, 20000),
    steps=st.sampled_from([(), measured_steps(count=40), measured_steps(0.1, 7)]),
)


@pytest.mark.parametrize("name", LAWS)
@settings(max_examples=25)
@given(series=st.lists(st.tuples(readings, st.floats(0.05, 3)), max_size=12), floor=st.floats(0, 0.9))
def test_thresholds_stay_within_the_limits(name: str, series: list[tuple[Reading | None, float]], floor: float) -> None:
    law = LAWS[name](Limits(0.5, 0.05, floor, floor / 2))
    for given_reading, dt_s in series:
        decision = law.update(given_reading, dt_s)
        assert floor <= decision.threshold_prefill <= 1
        assert floor / 2 <= decision.threshold_decode <= 1


@pytest.mark.parametrize("law", [Salc(LIMITS), predictive()], ids=["salc", "predictive"])
def test_without_a_reading_everything_stays(law: Law) -> None:
    law.resume(0.4, 0.6)
    for _ in range(20):
        decision = law.update(None, 1.0)
        assert (decision.threshold_prefill, decision.threshold_decode) == (0.4, 0.6)


def test_salc_holds_where_nothing_was_served() -> None:
    law = Salc(LIMITS)
    law.resume(0.4, 0.6)
    decision = law.update(reading(), 2.0)
    assert (decision.threshold_prefill, decision.threshold_decode) == (0.4, 0.6)
    assert decision.terms == {"prefill": "nothing served", "decode": "nothing served"}


def test_salc_follows_the_papers_constants() -> None:
    """SLO 0.25 s and 0.15 s, warning factor 0.8: dim beyond the SLO by 0.8, brighten below 0.2 s and 0.12 s by 0.1."""
    law = Salc(Limits(0.25, 0.15))
    assert law.window_s == 2.0
    series = [
        # TTFT P90, inter-token P90 → thresholds of prefill and decode
        (0.30, 0.10, 0.8, 1.0),
        (0.26, 0.16, 0.64, 0.8),
        (0.22, 0.14, 0.64, 0.8),
        (0.25, 0.15, 0.64, 0.8),
        (0.19, 0.20, 0.74, 0.64),
        (None, 0.119, 0.74, 0.74),
        (0.10, 0.05, 0.84, 0.84),
        (0.10, 0.05, 0.94, 0.94),
        (0.10, 0.05, 1.0, 1.0),
    ]
    for ttft, itl, prefill, decode in series:
        for _ in range(3):  # nothing happens within a window
            law.update(reading(ttft_p90_s=9.0, itl_p90_s=9.0), 0.5)
        decision = law.update(reading(ttft_p90_s=ttft, itl_p90_s=itl), 0.5)
        assert decision.threshold_prefill == pytest.approx(prefill)
        assert decision.threshold_decode == pytest.approx(decode)


def test_predictive_waits_until_it_knows_the_engine() -> None:
    law = Predictive(LIMITS)
    decision = law.update(reading(waiting=50, waiting_tokens=20000, oldest_waiting_s=5.0), 0.25)
    assert (decision.threshold_prefill, decision.threshold_decode) == (1.0, 1.0)
    assert decision.terms["action"] == "learning"


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 20000),
    more=st.integers(0, 10000),
    age=st.floats(0, 2),
    older=st.floats(0, 2),
    running=st.integers(0, 64),
)
def test_predictive_never_dims_less_for_a_longer_or_older_queue(
    tokens: int, more: int, age: float, older: float, running: int
) -> None:
    results = []
    for extra in (0, 1):
        law = predictive()
        queue = {"waiting_tokens": tokens + extra * more, "oldest_waiting_s": age + extra * older}
        law.update(reading(running=running, waiting=5, **queue), 0.25)
        results.append(brightness(law))
    assert results[1] <= results[0] + 1e-9


def test_predictive_acts_on_the_age_of_the_queue_before_latencies_show_it() -> None:
    law = predictive()
    good = {"ttft_p90_s": 0.1, "itl_p90_s": 0.01, "waiting": 1, "waiting_tokens": 20}
    assert law.update(reading(oldest_waiting_s=0.1, **good), 0.25).terms["action"] == "hold"
    decision = law.update(reading(oldest_waiting_s=0.47, **good), 0.25)
    assert decision.terms["action"].startswith("dim")
    assert min(decision.threshold_prefill, decision.threshold_decode) < 1


def test_predictive_dims_at_once_only_as_far_as_needed_and_brightens_slowly() -> None:
    law = predictive(brighten_per_s=0.2)
    # 2600 tokens at 256 a step: 0.55 s at full quality, some 0.3 s fully dimmed
    decision = law.update(reading(running=0, waiting=10, waiting_tokens=2000), 0.25)
    assert decision.terms["action"] == "dim"
    dimmed = brightness(law)
    assert 0 < dimmed < 2
    assert 0.35 < decision.terms["ttft_target_s"] <= 0.4  # a fifth is left free
    for _ in range(4):
        before = law.threshold_prefill, law.threshold_decode
        law.update(reading(running=1), 0.5)
        assert law.threshold_prefill - before[0] <= 0.1 + 1e-9
        assert law.threshold_decode - before[1] <= 0.1 + 1e-9
    assert brightness(law) > dimmed


def test_predictive_keeps_the_dimming_that_present_arrivals_need() -> None:
    """The queue is empty, but at full quality these arrivals would fill the engine again."""
    law = predictive()
    law.resume(0.3, 0.3)
    busy = reading(running=30, requests_per_s=30.0, prompt_tokens_per_s=3600.0)
    for _ in range(50):
        law.update(busy, 0.25)
    assert 0.3 <= law.threshold_prefill < 1 or 0.3 <= law.threshold_decode < 1
    for _ in range(50):
        law.update(reading(running=30, requests_per_s=1.0, prompt_tokens_per_s=120.0), 0.25)
    assert brightness(law) == pytest.approx(2.0)


def test_predictive_learns_from_misses_that_it_did_not_foresee() -> None:
    law = predictive()
    steps = tuple(step for step in measured_steps() if step.prefill_tokens == 0)
    for _ in range(20):
        law.update(reading(itl_p90_s=0.2, steps=steps[:16]), 0.25)
    assert law.update(reading(itl_p90_s=0.2), 0.25).terms["trim_itl"] > 1.5
    for _ in range(100):
        last = law.update(reading(itl_p90_s=0.01), 0.25)
    assert last.terms["trim_itl"] < 1.1
