"""Plans hold every expert within memory; its copies share its load."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.elastic.expert_plan import NOBODY, Holders, PlanError, make_plan

LAYERS, EXPERTS = 2, 8


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, EXPERTS), min_size=1, max_size=4))
def test_plans_hold_every_expert_within_each_workers_memory(seed: int, capacity: list[int]) -> None:
    rng = np.random.default_rng(seed)
    loads = rng.exponential(size=(LAYERS, EXPERTS)) ** 2 * (rng.random((LAYERS, EXPERTS)) < 0.7)
    if sum(capacity) < EXPERTS:
        with pytest.raises(PlanError, match=r"cannot hold 8: more workers \(parameter expert_pool\)"):
            make_plan(loads, capacity)
        return
    plan = make_plan(loads, capacity)
    assert plan.any(0).all()
    assert (plan.sum(2) <= np.array(capacity)[:, None]).all()
    again = make_plan(loads, capacity, plan)
    assert (again & ~plan).sum() == 0, "the same loads move nothing"


def test_busy_experts_have_more_copies() -> None:
    loads = np.ones((LAYERS, EXPERTS))
    loads[1, 3] = 50
    copies = make_plan(loads, [5, 5, 5]).sum(0)
    assert copies[1, 3] == 3 and (copies[0] == 1).all()


@given(st.integers(0, 2**32 - 1))
def test_copies_of_an_expert_share_its_assignments_equally_and_nobody_else_has_any(seed: int) -> None:
    rng = np.random.default_rng(seed)
    held = rng.random((3, LAYERS, EXPERTS)) < 0.4
    holders = Holders(held)
    assert holders.share == held.any(0).mean()
    experts = rng.integers(0, EXPERTS, rng.integers(0, 50))
    workers = holders.workers_of(1, experts)
    for expert in range(EXPERTS):
        mine = workers[experts == expert]
        owners = np.flatnonzero(held[:, 1, expert])
        if len(owners):
            counts = [(mine == owner).sum() for owner in owners]
            assert sum(counts) == len(mine) and max(counts) - min(counts) <= 1
        else:
            assert (mine == NOBODY).all()
