"""The books of a resident pool: counted as one would by hand, and no exchange that is not worth it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.experts.expert_map import MISSING
from backend.experts.ledger import Ledger
from backend.experts.telemetry import ExpertTelemetry

LAYERS, EXPERTS = 3, 7


def filled(num_slots: int, seed: int) -> tuple[Ledger, np.random.Generator]:
    """Some slots have experts, some wait for one, the others are empty."""
    rng, ledger = np.random.default_rng(seed), Ledger(LAYERS, EXPERTS, num_slots)
    ledger.expected[:] = rng.random((LAYERS, EXPERTS))
    for layer in range(LAYERS):
        for slot, expert in enumerate(rng.permutation(EXPERTS)[:num_slots].tolist()):
            if (fate := rng.random()) < 0.6:
                ledger.place(layer, expert, slot)
            elif fate < 0.8:
                ledger.expect(layer, expert, slot)
    return ledger, rng


@settings(max_examples=40, deadline=None)
@given(st.integers(1, EXPERTS), st.integers(0, 2**32), st.integers(0, 9))
def test_exchanges_bring_what_is_missing_into_slots_that_are_free_or_worth_less(
    num_slots: int, seed: int, most: int
) -> None:
    ledger, rng = filled(num_slots, seed)
    ledger.slots_in_use = int(rng.integers(1, num_slots + 1))
    for slot in range(ledger.slots_in_use, num_slots):
        for layer in range(LAYERS):
            ledger.vacate(layer, slot)
    for layer in range(LAYERS):
        expected = rng.random(EXPERTS)
        pairs = ledger.exchanges(layer, expected, most)
        experts, slots = [e for e, _ in pairs], [s for _, s in pairs]
        assert len(pairs) <= most and len(set(experts)) == len(set(slots)) == len(pairs)
        for expert, slot in pairs:
            assert ledger.slot_of[layer, expert] == MISSING and not ledger.moving[layer, expert]
            assert slot < ledger.slots_in_use and not ledger.filling[layer, slot]
            former = ledger.expert_in[layer, slot]
            assert former == MISSING or expected[expert] > expected[former]
        ledger.expected[layer] = expected
        assert not pairs or layer in ledger.worth_filling()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, EXPERTS), st.integers(0, 2**32))
def test_loads_of_all_layers_are_booked_as_those_of_each(num_slots: int, seed: int) -> None:
    (together, rng), (apart, _) = filled(num_slots, seed), filled(num_slots, seed)
    together.fresh[:] = apart.fresh[:] = rng.random((LAYERS, EXPERTS)) < 0.5
    chosen = rng.integers(0, EXPERTS, (LAYERS, 10))
    totals, by_layer = ExpertTelemetry(), ExpertTelemetry()
    together.observe(together.loads(chosen), totals)
    for layer in range(LAYERS):
        apart.observe(np.bincount(chosen[layer], minlength=EXPERTS), by_layer, layer)
    assert totals == by_layer and totals.assignments == LAYERS * 10
    absent = np.take_along_axis(apart.slot_of, chosen, 1) == MISSING
    assert totals.misses == absent.sum()
    np.testing.assert_array_equal(together.fresh, apart.fresh)
    assert together.expected == pytest.approx(apart.expected)
