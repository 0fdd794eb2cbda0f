"""First-token times of waiting requests against cases worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.brownout.queue_model import first_token_s
from backend.brownout.step_model import StepModel
from tests.controller.readings import load, measured_steps

MODEL = StepModel()
MODEL.learn(measured_steps())


def step_s(prefill: float, decode: int) -> float:
    return float(MODEL.predict_s(prefill, decode, 1.0, 1.0))


def test_prefill_work_is_taken_in_steps_of_the_token_budget() -> None:
    """256 tokens a step of which 56 decode: 500 waiting tokens are two full chunks and a rest of 100."""
    engine = load(running=56, waiting=3, waiting_tokens=500)
    expected = 2 * step_s(200, 56) + step_s(100, 56)
    assert float(first_token_s(MODEL, engine, 500, 2, 1.0, 1.0)) == pytest.approx(expected)


def test_a_full_engine_makes_requests_wait_for_others_to_finish() -> None:
    """64 run, each for 50 tokens: in 50 steps 64 finish. The fourth in the queue waits for 4 of them."""
    engine = load(running=64, waiting=4, waiting_tokens=40)
    expected = 4 * 50 / 64 * step_s(10 * 64 / 50, 64)
    assert float(first_token_s(MODEL, engine, 40, 3, 1.0, 1.0)) == pytest.approx(expected)


def test_a_crowd_before_an_empty_engine_waits_for_those_that_will_run() -> None:
    """None of the 64 slots is taken yet; the 70th waits until 6 of those that take them have finished."""
    engine = load(running=0, waiting=70, waiting_tokens=700)
    expected = 6 * 50 / 64 * step_s(10 * 64 / 50, 64)
    assert float(first_token_s(MODEL, engine, 10, 69, 1.0, 1.0)) == pytest.approx(expected)
    assert float(first_token_s(MODEL, engine, 10, 63, 1.0, 1.0)) == pytest.approx(step_s(10, 0))


def test_a_full_kv_cache_counts_as_a_full_engine() -> None:
    waiting = {"running": 10, "waiting": 1, "waiting_tokens": 20}
    free = first_token_s(MODEL, load(**waiting), 20, 0, 1.0, 1.0)
    full = first_token_s(MODEL, load(kv_usage_ratio=0.99, **waiting), 20, 0, 1.0, 1.0)
    assert float(full) > 2 * float(free)


@given(
    st.integers(0, 100),
    st.integers(0, 5000),
    st.integers(0, 5000),
    st.integers(0, 50),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_more_ahead_and_less_dimming_never_make_it_sooner(
    running: int, tokens: int, more: int, ahead: int, theta: float, brighter: float
) -> None:
    engine = load(running=running, waiting=ahead + 1, waiting_tokens=tokens)
    now = float(first_token_s(MODEL, engine, tokens, ahead, theta, theta))
    assert now >= 0
    assert float(first_token_s(MODEL, engine, tokens + more, ahead, theta, theta)) >= now - 1e-9
    assert float(first_token_s(MODEL, engine, tokens, ahead + 1, theta, theta)) >= now - 1e-9
    low, high = sorted((theta, brighter))
    at_low, at_high = (float(first_token_s(MODEL, engine, tokens, ahead, t, t)) for t in (low, high))
    assert at_low <= at_high + 1e-9
