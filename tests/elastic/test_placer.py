"""The placer keeps its promises: memory, every expert, warm copies, few moves; brute force on small layers."""

import random
from itertools import combinations, permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.elastic.placer import place
from backend.elastic.scaler import scale, straggler_bound


@st.composite
def layers(draw, max_experts=10, max_devices=4, one_size=False):
    """replicas, costs, capacity, warm: any layer whose copies fit."""
    devices = draw(st.integers(1, max_devices))
    experts = draw(st.integers(1, max_experts))
    replicas = draw(st.lists(st.integers(0, devices), min_size=experts, max_size=experts))
    costs = draw(st.lists(st.integers(1, 30), min_size=experts, max_size=experts))
    if one_size:
        capacity = [-(-sum(replicas) // devices) + draw(st.integers(0, 2))] * devices
    else:
        capacity = draw(st.lists(st.integers(0, experts), min_size=devices, max_size=devices))
        capacity[-1] += max(0, sum(replicas) - sum(capacity))
    pairs = [(expert, device) for expert in range(experts) for device in range(devices)]
    return replicas, costs, capacity, draw(st.sets(st.sampled_from(pairs)))


def loads_of(devices, costs, size) -> list[float]:
    return [sum(cost for held, cost in zip(devices, costs, strict=True) if d in held) for d in range(size)]


@given(layers())
def test_memory_holds_and_every_active_expert_is_placed(layer):
    replicas, costs, capacity, warm = layer
    plan = place(replicas, costs, capacity, warm)
    for device, room in enumerate(capacity):
        assert sum(device in held for held in plan.devices) <= room
    for wanted, held in zip(replicas, plan.devices, strict=True):
        assert (len(held) > 0) == (wanted > 0) and len(held) <= wanted and list(held) == sorted(set(held))
    assert plan.dropped == sum(replicas) - len(plan.copies)
    assert plan.moves == len(plan.copies - warm)
    # What is dropped falls on the remaining replicas: nothing of the layer's cost is lost.
    assert sum(plan.device_costs) == pytest.approx(sum(n * cost for n, cost in zip(replicas, costs, strict=True)))
    assert plan == place(replicas, costs, capacity, sorted(warm, reverse=True))


@given(layers(one_size=True))
def test_devices_of_one_size_place_every_replica(layer):
    replicas, costs, capacity, warm = layer
    plan = place(replicas, costs, capacity, warm)
    assert [len(held) for held in plan.devices] == replicas


@given(layers())
def test_no_relabelling_of_the_devices_saves_a_move(layer):
    replicas, costs, capacity, warm = layer
    plan = place(replicas, costs, capacity, warm)
    for labels in permutations(range(len(capacity))):
        copies = {(expert, labels[device]) for expert, device in plan.copies}
        fits = all(sum(d == device for _, d in copies) <= room for device, room in enumerate(capacity))
        assert not fits or len(copies - warm) >= plan.moves


@given(layers(one_size=True))
def test_a_plan_that_is_warm_is_kept(layer):
    replicas, costs, capacity, warm = layer
    plan = place(replicas, costs, capacity, warm)
    again = place(replicas, costs, capacity, plan.copies)
    assert max(again.device_costs) <= max(plan.device_costs) * 1.05 + 1e-9
    if max(again.device_costs) >= max(plan.device_costs):
        assert again.moves == 0


def placements(replicas, costs, capacity, warm):
    """(busiest device's load, moves, devices of each expert) of all placements that fit."""
    size = len(capacity)
    for devices in product(*(combinations(range(size), count) for count in replicas)):
        if all(sum(d in held for held in devices) <= room for d, room in enumerate(capacity)):
            moves = sum((e, d) not in warm for e, held in enumerate(devices) for d in held)
            yield max(loads_of(devices, costs, size)), moves


def fewest(replicas, costs, capacity, warm, busiest) -> int:
    """Moves that placements need whose busiest device is no heavier."""
    return min(m for load, m in placements(replicas, costs, capacity, warm) if load <= busiest * (1 + 1e-9))


@given(layers(max_experts=5, max_devices=3, one_size=True))
def test_the_busiest_device_is_near_the_exact_optimum(layer):
    replicas, costs, capacity, warm = layer
    plan = place(replicas, costs, capacity, warm)
    assert max(plan.device_costs) <= 4 / 3 * min(placements(replicas, costs, capacity, warm))[0] * 1.05 + 1e-9


@given(layers(max_experts=5, max_devices=3))
def test_no_equal_plan_of_a_small_layer_moves_less(layer):
    replicas, costs, capacity, warm = layer
    plan = place(replicas, costs, capacity, warm)
    placed = [len(held) for held in plan.devices]
    busiest = max(loads_of(plan.devices, costs, len(capacity)))
    assert plan.moves == fewest(placed, costs, capacity, warm, busiest)


@given(layers(max_experts=12, max_devices=6))
def test_no_relocation_or_swap_of_two_copies_makes_an_equal_plan_that_moves_less(layer):
    replicas, costs, capacity, warm = layer
    plan = place(replicas, costs, capacity, warm)
    loads = loads_of(plan.devices, costs, len(capacity))
    held = [[e for e, devices in enumerate(plan.devices) if d in devices] for d in range(len(capacity))]
    for (expert, source), target in product(sorted(plan.copies - warm), range(len(capacity))):
        if expert in held[target] or (expert, target) not in warm:
            continue
        for other in (None, *held[target]):
            back = 0 if other is None else costs[other]
            fits = len(held[target]) < capacity[target] if other is None else other not in held[source]
            equal = max(loads[target] + costs[expert] - back, loads[source] - costs[expert] + back) <= max(loads)
            loses = other is not None and (other, target) in warm and (other, source) not in warm
            assert loses or not (fits and equal), (expert, source, target, other)


def test_plans_of_random_layers_are_nearly_always_exact_and_never_move_more_than_equal_ones():
    rng = random.Random(1)
    excess = []
    for _ in range(100):
        loads = [rng.randint(1, 60) for _ in range(5)]
        replicas = scale(loads, budget=9, max_replicas=3, bound=straggler_bound(loads, 3, 0.5))
        costs = [load / count for load, count in zip(loads, replicas, strict=True)]
        warm = {(rng.randrange(5), rng.randrange(3)) for _ in range(6)}
        layer = replicas, costs, [3] * 3, warm
        plan = place(*layer)
        excess.append(max(plan.device_costs) / min(placements(*layer))[0] - 1)
        assert plan.moves == fewest(*layer, max(plan.device_costs))
    assert sum(more < 1e-9 for more in excess) >= 95 and max(excess) < 0.05, "the busiest device is as light as can be"


def test_copies_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 copies do not fit into memory for 2"):
        place([2, 1], [1.0, 1.0], [1, 1])


def test_an_idle_layer_is_balanced():
    assert place([0, 0], [0.0, 0.0], [1, 1]).imbalance == 1.0
