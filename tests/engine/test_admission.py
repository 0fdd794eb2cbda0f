"""Refusal at the door: it refuses what the engine would refuse, and leaves to the engine what it cannot tell."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.brownout.queue_model import first_token_s
from backend.brownout.step_model import StepModel
from backend.engine.admission import Gate, QueueState, TooLate
from backend.engine.sampling_params import SamplingParams
from backend.engine.shedding import Pace, Waiting, late_requests
from backend.errors import UnavailableError
from tests.controller.readings import load, measured_steps

LIMIT_S = 1.0
NOW = 1000.0
#: 10 ms a token, 50 ms a request ahead.
PACE = Pace(chunk=1, one_s=0.01, token_s=0.0, full_s=0.01, free=0, finish_s=0.05)
AUTO = SamplingParams()


def state(**changes) -> QueueState:
    idle = QueueState(1, NOW - 1, NOW, 0, 0, -(2**62), False, LIMIT_S, math.nan, PACE)
    return idle._replace(**changes)


def gate(max_waiting: int = 1000) -> Gate:
    return Gate(max_waiting, LIMIT_S)


def judged(gate: Gate, state: QueueState, tokens: int, params: SamplingParams = AUTO, age_s: float = 0.0) -> bool:
    return gate.admit(state, tokens, params, NOW - age_s, NOW)


def test_what_would_come_too_late_is_refused_with_a_hint() -> None:
    assert judged(gate(), state(), 100)
    with pytest.raises(TooLate, match=r"after about 1 s, too late for 1 s \(shed_ttft_s\); retry in about 1 s"):
        judged(gate(), state(), 101)


def test_the_running_step_the_queue_and_the_way_here_count() -> None:
    assert judged(gate(), state(), 95)
    for late in (state(ready_s=NOW + 0.06), state(tokens=6), state(waiting=20), state(allowed_s=0.94)):
        with pytest.raises(TooLate):
            judged(gate(), late, 95)
    with pytest.raises(TooLate):
        judged(gate(), state(), 95, age_s=0.06)


def test_what_was_sent_since_counts_until_the_engine_has_seen_it() -> None:
    door = gate()
    assert judged(door, state(), 60)
    with pytest.raises(TooLate):
        judged(door, state(), 60)
    assert judged(door, state(seen_s=NOW), 60)


def test_who_may_take_another_ones_place_is_left_to_the_engine() -> None:
    full = state(tokens=200, waiting=4, max_priority=0, any_auto=True)
    for params in (SamplingParams(priority=-1), SamplingParams(brownout="never")):
        assert not judged(gate(), full, 10, params)
    for params in (AUTO, SamplingParams(priority=1)):
        with pytest.raises(TooLate):
            judged(gate(), full, 10, params)
    with pytest.raises(TooLate):
        judged(gate(), full._replace(any_auto=False), 10, SamplingParams(brownout="never"))


def test_an_engine_that_does_not_know_its_speed_decides_itself() -> None:
    assert not judged(gate(), state(tokens=10**6, allowed_s=math.inf), 10)
    assert not Gate(1000, None).admit(state(tokens=10**6), 10, AUTO, NOW, NOW)


def test_a_full_queue_is_refused_unless_some_of_it_may_start() -> None:
    with pytest.raises(
        UnavailableError, match=r"the queue is full: 3 requests wait \(max_waiting\); retry in about 7 s"
    ):
        judged(gate(3), state(waiting=3, request_s=2.4), 1)
    door, room = gate(3), state(waiting=3, pace=PACE._replace(free=2))
    assert judged(door, room, 1)
    assert judged(door, room, 1)
    with pytest.raises(UnavailableError, match=r"\(max_waiting\)$"):
        judged(door, room, 1)


queues = st.lists(
    st.builds(
        Waiting,
        request_id=st.uuids(),
        age_s=st.floats(0, 0.5),
        tokens=st.integers(1, 40),
        never=st.booleans(),
        priority=st.integers(-1, 1),
        accepted=st.just(True),
    ),
    max_size=25,
)


@given(queues, st.integers(1, 60), st.booleans(), st.integers(-1, 1), st.floats(0, 0.3))
def test_the_door_and_the_engine_agree(
    queue: list[Waiting], tokens: int, never: bool, priority: int, margin: float
) -> None:
    """Between two steps, with the same knowledge, both refuse the same new requests."""
    standing = state(
        tokens=sum(request.tokens for request in queue),
        waiting=len(queue),
        max_priority=max((request.priority for request in queue), default=-5),
        any_auto=not all(request.never for request in queue),
        allowed_s=LIMIT_S * (1 - margin),
    )
    new = Waiting("new", 0.0, tokens, never, priority)
    gone = {refusal.request_id for refusal in late_requests(PACE, 0, [*queue, new], LIMIT_S, margin)}
    params = SamplingParams(priority=priority, brownout="never" if never else "auto")
    try:
        if judged(gate(), standing, tokens, params):
            assert not gone
    except TooLate:
        assert gone == {"new"}


MODEL = StepModel()
MODEL.learn(measured_steps())


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.integers(0, 8),
    st.sampled_from([0.0, 20.0, 80.0]),
    st.integers(0, 5),
)
def test_of_a_crowd_at_once_those_pass_that_the_queue_model_finds_in_time(
    crowd: list[int], running: int, output_tokens: float, waiting: int
) -> None:
    """Whatever the engine does meanwhile, and also if none of the slots that they will take is taken yet."""
    engine = load(
        running=running, max_running=8, waiting=waiting, waiting_tokens=30 * waiting, mean_output_tokens=output_tokens
    )
    standing = state(tokens=30 * waiting, waiting=waiting, pace=Pace.of(MODEL, engine, 1.0, 1.0))
    door, tokens, ahead = gate(), 30 * waiting, waiting
    for own in crowd:
        expected_s = float(first_token_s(MODEL, engine, tokens + own, ahead, 1.0, 1.0))
        try:
            assert judged(door, standing, own)
        except TooLate:
            assert expected_s > 0.99 * LIMIT_S
            continue
        assert expected_s < 1.01 * LIMIT_S
        tokens, ahead = tokens + own, ahead + 1


def test_judging_counts_nothing() -> None:
    door = gate()
    for _ in range(3):
        assert door.judge(state(), 60, AUTO, NOW, NOW)
    assert judged(door, state(), 60)
    with pytest.raises(TooLate):
        door.judge(state(), 60, AUTO, NOW, NOW)
