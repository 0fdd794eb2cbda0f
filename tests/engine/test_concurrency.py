"""How many may run at once: as many as get their tokens in time, by the step model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.brownout.step_model import Slowed, StepModel
from backend.engine.concurrency import Concurrency, sustainable
from tests.controller.readings import measured_steps

MODEL = StepModel()
MODEL.learn(measured_steps())
MOST, BUDGET = 64, 256


def step_s(running: int, per_output: float, theta: float = 1.0) -> float:
    prefill = min(per_output * running, BUDGET - running)
    return float(MODEL.predict_s(prefill, running, theta, theta))


@given(itl_s=st.floats(0.001, 0.2), per_output=st.floats(0, 8), theta=st.floats(0, 1))
def test_one_more_would_be_too_slow(itl_s: float, per_output: float, theta: float) -> None:
    found = sustainable(MODEL, itl_s, MOST, BUDGET, per_output, theta, theta)
    assert 1 <= found <= MOST
    assert found == 1 or step_s(found, per_output, theta) <= itl_s
    assert found == MOST or step_s(found + 1, per_output, theta) > itl_s


def test_dimming_makes_room_and_a_slower_machine_takes_it() -> None:
    bright = sustainable(MODEL, 0.03, MOST, BUDGET, 1.0, 1.0, 1.0)
    assert 1 < bright < sustainable(MODEL, 0.03, MOST, BUDGET, 1.0, 0.3, 0.3)
    assert bright > sustainable(Slowed(MODEL, 1.5), 0.03, MOST, BUDGET, 1.0, 1.0, 1.0)


def test_it_begins_with_the_first_lengths_known_and_follows_smoothly() -> None:
    concurrency = Concurrency(0.03, MOST, BUDGET)
    assert concurrency.update(MODEL, 0.0, 0.0, 1.0, 1.0) == sustainable(MODEL, 0.9 * 0.03, MOST, BUDGET, 0.0, 1.0, 1.0)
    assert concurrency.update(MODEL, 100.0, 1.0, 1.0, 1.0) == MOST, "answers of one token have no time between tokens"
    first = concurrency.update(MODEL, 100.0, 100.0, 1.0, 1.0)
    assert first == sustainable(MODEL, 0.9 * 0.03, MOST, BUDGET, 1.0, 1.0, 1.0)
    limits = [concurrency.update(MODEL, 100.0, 100.0, 0.3, 0.3) for _ in range(40)]
    aim = sustainable(MODEL, 0.9 * 0.03, MOST, BUDGET, 1.0, 0.3, 0.3)
    assert first < limits[0] < (first + aim) / 2
    assert limits == sorted(limits)
    assert limits[-1] == pytest.approx(aim, abs=1)
