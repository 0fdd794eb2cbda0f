"""The scaler keeps its promises: memory, bound, fewest copies, best effort; brute force on small layers."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.elastic.scaler import scale, straggler_bound

LOADS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


def largest(loads, replicas) -> float:
    return max((load / count for load, count in zip(loads, replicas, strict=True) if count), default=0.0)


@given(LOADS, st.integers(0, 20), st.integers(1, 8), st.floats(0.5, 40))
def test_memory_holds_and_exactly_the_idle_experts_scale_to_zero(loads, spare, devices, bound):
    budget = sum(load > 0 for load in loads) + spare
    replicas = scale(loads, budget=budget, max_replicas=devices, bound=bound)
    assert sum(replicas) <= budget and max(replicas) <= devices
    assert [count > 0 for count in replicas] == [load > 0 for load in loads]
    assert replicas == scale(loads, budget=budget, max_replicas=devices, bound=bound)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(0, 4), st.integers(1, 3), st.integers(1, 12))
def test_no_plan_has_a_smaller_straggler_over_the_bound_or_fewer_copies(loads, spare, devices, bound):
    budget = sum(load > 0 for load in loads) + spare
    replicas = scale(loads, budget=budget, max_replicas=devices, bound=bound)
    choices = product(*(range(1, devices + 1) if load else (0,) for load in loads))
    plans = [plan for plan in choices if sum(plan) <= budget]
    # A straggler counts by how far it exceeds the bound; below the bound all plans are equally good.
    best = min((max(largest(loads, plan), bound), sum(plan)) for plan in plans)
    assert (max(largest(loads, replicas), bound), sum(replicas)) == best


def test_the_bound_is_a_share_of_a_device_but_not_less_than_worth_splitting():
    assert straggler_bound([60, 20, 0, 0], 4, 0.5) == 10
    assert straggler_bound([60, 20, 0, 0], 4, 0.5, least=25) == 25
    assert scale([60, 20, 0, 0], budget=20, max_replicas=4, bound=25) == [3, 1, 0, 0]


@pytest.mark.parametrize(
    ("loads", "options", "message"),
    [
        ([1, 1], {"budget": 1}, "2 active experts do not fit into memory for 1 copies"),
        ([-1], {}, "0 or more"),
        ([float("nan")], {}, "0 or more"),
        ([1], {"max_replicas": 0}, "max_replicas"),
    ],
)
def test_impossible_input_is_named(loads, options, message):
    with pytest.raises(ValueError, match=message):
        scale(loads, **{"budget": 9, "max_replicas": 2, "bound": 1.0, **options})


def test_a_bound_needs_devices_and_a_factor():
    with pytest.raises(ValueError, match="positive factor"):
        straggler_bound([1], 0, 1.0)
