"""Early refusal: the kept are in time, the important ones are kept, and everyone is told."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backend.brownout.queue_model import first_token_s
from backend.brownout.step_model import StepModel
from backend.config import EngineConfig
from backend.engine.engine import Engine
from backend.engine.request import Request, RequestEnded
from backend.engine.sampling_params import SamplingParams
from backend.engine.shedding import REFUSED_WITHIN_S, Pace, Waiting, late_requests
from tests.controller.readings import load, measured_steps

LIMIT_S = 1.0
MODEL = StepModel()
MODEL.learn(measured_steps())


#: 10 ms a token, 50 ms a request ahead.
PACE = Pace(chunk=1, one_s=0.01, token_s=0.0, full_s=0.01, free=0, finish_s=0.05)


def refused(waiting: list[Waiting], started: int = 0, margin: float = 0.0) -> set[object]:
    refusals = late_requests(PACE, started, waiting, LIMIT_S, margin)
    assert len({refusal.request_id for refusal in refusals}) == len(refusals)
    assert all(refusal.expected_s > LIMIT_S * (1 - margin) for refusal in refusals)
    return {refusal.request_id for refusal in refusals}


def test_a_queue_that_is_in_time_is_left_alone() -> None:
    assert refused([Waiting(i, 0.0, 10) for i in range(10)]) == set()


def test_the_newest_goes_first_among_equals() -> None:
    assert refused([Waiting(i, 0.0, 30) for i in range(5)]) == {3, 4}


def test_work_already_started_counts() -> None:
    assert refused([Waiting(i, 0.0, 30) for i in range(3)], started=45) == {1, 2}


def test_the_hopeless_go_whatever_they_are() -> None:
    assert refused([Waiting("old", 0.95, 10, never=True), Waiting("huge", 0.0, 200), Waiting("ok", 0.5, 20)]) == {
        "old",
        "huge",
    }


def test_auto_goes_before_never_and_then_by_priority() -> None:
    queue = [
        Waiting("auto", 0.0, 40),
        Waiting("urgent", 0.0, 40, priority=-1),
        Waiting("never", 0.0, 40, never=True),
    ]
    assert refused(queue) == {"auto"}
    assert refused([*queue, Waiting("second", 0.0, 40, never=True)]) == {"auto", "urgent"}


def test_what_is_new_keeps_a_margin() -> None:
    queue = [Waiting(i, 0.0, 30) for i in range(3)]
    assert refused(queue) == set()
    assert refused(queue, margin=0.2) == {2}


def test_what_its_stub_let_pass_goes_only_beyond_the_whole_limit() -> None:
    queue = [Waiting(i, 0.0, 30, judged=True) for i in range(3)]
    assert refused(queue, margin=0.2) == set()
    assert refused([*queue, Waiting(3, 0.0, 30, judged=True)], margin=0.2) == {3}


def test_what_was_accepted_is_served_even_late() -> None:
    """A refusal after a wait helps nobody; only what has just come is refused."""
    late = [Waiting(f"accepted {i}", 0.9, 30, accepted=True) for i in range(4)]
    assert refused(late) == set()
    assert refused([*late, Waiting("new", 0.0, 5)]) == {"new"}


def test_what_was_accepted_gives_way_to_the_more_important_only() -> None:
    accepted = [Waiting(f"accepted {i}", 0.0, 30, accepted=True) for i in range(3)]
    assert refused([*accepted, Waiting("equal", 0.0, 30)]) == {"equal"}
    assert refused([*accepted, Waiting("never", 0.0, 30, never=True)]) == {"accepted 2"}


waiting = st.lists(
    st.builds(
        Waiting,
        request_id=st.uuids(),
        age_s=st.floats(0, 1.2),
        tokens=st.integers(1, 60),
        never=st.booleans(),
        priority=st.integers(-2, 2),
        accepted=st.booleans(),
    ),
    max_size=25,
)


@given(waiting, st.integers(0, 50))
def test_the_kept_are_in_time_and_no_lesser_request_is_kept_before_a_refused_one(
    queue: list[Waiting], started: int
) -> None:
    """In time: within the limit or, if accepted before, no later than without what is new."""
    gone = refused(queue, started)
    tokens, kept = started, []
    old_tokens, old_ahead = started, 0
    for request in queue:
        allowed_s = LIMIT_S
        if request.accepted:
            old_tokens += request.tokens
            allowed_s = max(LIMIT_S, request.age_s + PACE.first_token_s(old_tokens, old_ahead))
            old_ahead += 1
        rank = (request.never, -request.priority, request.accepted)
        if request.request_id not in gone:
            tokens += request.tokens
            assert request.age_s + PACE.first_token_s(tokens, len(kept)) <= allowed_s + 1e-9
            kept.append(request)
        elif request.accepted:
            assert any(not new.accepted and (new.never, -new.priority) > rank[:2] for new in queue)
        elif request.age_s + PACE.first_token_s(started + request.tokens, 0) <= LIMIT_S:
            assert all((other.never, -other.priority, other.accepted) >= rank for other in kept)


@given(st.integers(0, 80), st.integers(0, 3000), st.integers(0, 40), st.floats(0, 1))
def test_the_pace_is_that_of_the_queue_model(running: int, tokens: int, ahead: int, theta: float) -> None:
    engine = load(running=running, waiting=ahead + 1, waiting_tokens=tokens)
    expected = float(first_token_s(MODEL, engine, max(tokens, 1), ahead, theta, theta))
    assert (
        abs(Pace.of(MODEL, engine, theta, theta).first_token_s(max(tokens, 1), ahead) - expected)
        <= 0.01 * expected + 1e-6
    )


def test_a_refusal_that_would_take_long_is_not_made_any_more() -> None:
    """What its stub let pass and a long step held up is served; what only the engine can judge it still refuses."""
    now = 100.0
    params = SamplingParams(max_tokens=5)
    for judged, age_s, accepted in ((True, 0.06, False), (True, 0.08, True), (False, 0.08, False)):
        request = Request("one", [1] * 20, params, arrival=now - age_s)
        request.judged = judged
        assert Waiting.of(request, now).accepted == accepted


@given(
    st.lists(st.tuples(st.floats(0, 1.2), st.integers(1, 60), st.booleans(), st.integers(-1, 1)), max_size=25),
    st.integers(0, 100),
)
def test_of_what_was_let_pass_only_the_young_are_refused_or_those_that_give_way(
    queue: list[tuple[float, int, bool, int]], started: int
) -> None:
    now, requests = 100.0, []
    for number, (age_s, tokens, never, priority) in enumerate(queue):
        params = SamplingParams(brownout="never" if never else "auto", priority=priority)
        requests.append(Request(number, [1] * tokens, params, arrival=now - age_s))
        requests[-1].judged = True
    waiting = [Waiting.of(request, now) for request in requests]
    gone = refused(waiting, started)
    young = [request for request in waiting if request.age_s <= REFUSED_WITHIN_S]
    for request in waiting:
        if request.request_id in gone and request not in young:
            assert any((new.never, -new.priority) > (request.never, -request.priority) for new in young)


def test_the_engine_refuses_once_with_a_hint_and_goes_on() -> None:
    """One runs for 1000 tokens on average at 14 ms a step: whoever waits behind it waits for seconds."""
    engine = Engine(EngineConfig(checkpoint="dummy:tiny", kv_cache_blocks=128, max_running=1))
    engine.counters.mean_output_tokens = 1000.0
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    engine.add(Request("first", [1] * 20, params))
    assert engine.shed(MODEL, LIMIT_S) == []
    engine.step()
    engine.add(Request("second", [2] * 20, params))
    (event,) = engine.shed(MODEL, LIMIT_S)
    assert isinstance(event, RequestEnded)
    assert (event.request_id, event.outcome) == ("second", "rejected")
    assert "too late for 1 s (shed_ttft_s); retry in about" in event.message
    assert engine.shed(MODEL, LIMIT_S) == []
    assert engine.counters.requests_shed == 1
    events = []
    while engine.has_work:
        events += engine.step()
    assert {event.request_id for event in events} == {"first"}
    assert engine.blocks.num_in_use == 0
