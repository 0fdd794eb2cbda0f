"""Expert functions: states, memory, keep-alive and the cost meter, for any sequence of plans."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.elastic.functions import COLD, LOADING, WARM, ExpertFunctions

BYTES = 2_000_000_000  # 2 GB: a copy costs 2 GB·s per second


def test_a_copy_goes_from_cold_to_loading_to_warm_and_back():
    functions = ExpertFunctions(2, [1, 1], BYTES, keep_alive_s=5.0)
    assert functions.state((0, 1)) == COLD
    assert functions.prepare([(0, 1)], now=1.0) == [(0, 1)]
    assert functions.state((0, 1)) == LOADING and list(functions.warm_devices(0)) == [] and functions.version == 0
    assert functions.commit([(0, 1)], now=2.0) == 1
    assert functions.state((0, 1)) == WARM and list(functions.warm_devices(0)) == [1]
    functions.use([(0, 1)], now=4.0)
    functions.expire(8.9)
    assert functions.state((0, 1)) == WARM
    # It was idle from 4 to 9, when its keep-alive ended, however late that is noticed.
    functions.expire(100.0)
    assert functions.state((0, 1)) == COLD
    assert functions.cost_gb_s(200.0) == pytest.approx((9.0 - 1.0) * 2)
    assert functions.always_on_gb_s(200.0) == pytest.approx(200 * 2 * 2)


def test_a_full_device_gives_up_replicas_first_then_the_longest_unused_but_nothing_in_use():
    functions = ExpertFunctions(4, [3, 1], BYTES, keep_alive_s=100.0)
    functions.commit(functions.prepare([(0, 0), (1, 0), (2, 0), (2, 1)], 0.0), 0.0)
    functions.use([(1, 0)], 1.0)
    functions.use([(2, 0)], 2.0)
    # Expert 2 is warm elsewhere, so its copy goes although it was used last.
    assert functions.prepare([(3, 0)], 3.0) == [(3, 0)]
    assert functions.state((2, 0)) == COLD
    functions.commit([(3, 0)], 3.0)
    assert functions.prepare([(2, 0)], 4.0, in_use=[(0, 0)]) == [(2, 0)]
    assert functions.state((0, 0)) == WARM and functions.state((1, 0)) == COLD
    # Everything else is loading, planned or in use: no room for now.
    assert functions.prepare([(3, 0), (1, 0)], 5.0, in_use=[(0, 0)]) == []
    telemetry = functions.telemetry(5.0)
    assert (telemetry.loads, telemetry.evictions, telemetry.refusals, telemetry.expiries) == (6, 2, 1, 0)
    assert (telemetry.warm, telemetry.loading, telemetry.cold) == (3, 1, 1)
    assert telemetry.slot_byte_s == functions.cost_gb_s(5.0) * 1e9 and telemetry.always_on_byte_s == 4 * 5 * BYTES


def test_a_failed_load_leaves_the_copy_cold():
    functions = ExpertFunctions(1, [1], BYTES, keep_alive_s=1.0)
    functions.prepare([(0, 0)], 0.0)
    functions.cancel((0, 0), 2.0)
    assert functions.state((0, 0)) == COLD and functions.in_memory() == [0]
    assert functions.cost_gb_s(9.0) == pytest.approx(4.0)
    assert functions.telemetry(9.0).failures == 1


@pytest.mark.parametrize(
    ("plan", "message"),
    [([(0, 2)], "do not both exist"), ([(2, 0)], "do not both exist"), ([(0, 0), (1, 0)], "whose memory holds 1")],
)
def test_impossible_plans_are_named_and_change_nothing(plan, message):
    functions = ExpertFunctions(2, [1, 1], BYTES, keep_alive_s=1.0)
    with pytest.raises(ValueError, match=message):
        functions.prepare(plan, 0.0)
    assert not functions.copies()


def test_only_loading_copies_can_be_committed_or_cancelled():
    functions = ExpertFunctions(1, [1], BYTES, keep_alive_s=1.0)
    with pytest.raises(ValueError, match="is cold"):
        functions.commit([(0, 0)], 0.0)
    functions.commit(functions.prepare([(0, 0)], 0.0), 0.0)
    with pytest.raises(ValueError, match="is warm"):
        functions.cancel((0, 0), 0.0)


COPIES = st.tuples(st.integers(0, 3), st.integers(0, 2))
ACTIONS = st.tuples(st.integers(0, 3), st.sets(COPIES, max_size=4), st.sets(COPIES, max_size=4), st.booleans())


@given(st.lists(st.integers(0, 3), min_size=3, max_size=3), st.lists(ACTIONS, max_size=12), st.integers(0, 4))
def test_memory_and_the_meter_hold_for_any_sequence_of_plans(capacity, actions, keep_alive):
    # The same twice; of one every second is looked at, so that its memory × time can be added up.
    functions, watched = (ExpertFunctions(4, capacity, BYTES, keep_alive) for _ in range(2))
    now, spent = 0, 0
    for pause, plan, arrived, use in actions:
        plan = sorted(plan)[: min(capacity)]
        for _ in range(pause):
            watched.expire(now)
            spent += 2 * len(watched.copies())
            now += 1
        for held in (functions, watched):
            held.expire(now)
            in_use = [copy for copy in held.copies() if held.state(copy) == WARM][:1]
            started = held.prepare(plan, now, in_use)
            assert all(held.state(copy) == LOADING for copy in started)
            assert all(held.state(copy) == WARM for copy in in_use)
            held.commit([copy for copy in arrived if held.state(copy) == LOADING], now)
            for copy in [copy for copy in started if held.state(copy) == LOADING][1:]:
                held.cancel(copy, now)
            warm = {copy for copy in held.copies() if held.state(copy) == WARM}
            if use:
                held.use(warm, now)
            assert {(e, d) for e in range(4) for d in held.warm_devices(e)} == warm
            for device, room in enumerate(capacity):
                assert held.in_memory()[device] == sum(d == device for _, d in held.copies()) <= room
        found = functions.telemetry(now)
        assert found == watched.telemetry(now) and found.slot_byte_s == pytest.approx(spent * 1e9)
        assert found.warm + found.loading == len(functions.copies())
        # What has been loaded is there or has left.
        assert found.loads == found.warm + found.loading + found.failures + found.evictions + found.expiries


def test_the_only_warm_copy_serves_until_its_successor_is_there():
    functions = ExpertFunctions(2, [1, 1], BYTES, keep_alive_s=100.0)
    functions.commit(functions.prepare([(0, 0)], 0.0), 0.0)
    # Expert 0 moves to device 1 and expert 1 takes its place, but not before the move is done.
    assert functions.prepare([(0, 1), (1, 0)], 1.0) == [(0, 1)]
    assert list(functions.warm_devices(0)) == [0]
    functions.commit([(0, 1)], 2.0)
    assert functions.prepare([(0, 1), (1, 0)], 2.0) == [(1, 0)]
    assert list(functions.warm_devices(0)) == [1]
