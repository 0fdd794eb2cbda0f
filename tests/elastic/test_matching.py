"""The assignment of bundles to devices against all permutations."""

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from backend.elastic.matching import cheapest_assignment


@st.composite
def matrices(draw):
    size = draw(st.integers(1, 5))
    return [[draw(st.integers(0, 9)) for _ in range(size)] for _ in range(size)]


@given(matrices())
def test_no_permutation_is_cheaper(cost):
    rows = range(len(cost))
    chosen = cheapest_assignment(cost)
    assert sorted(chosen) == list(rows)
    cheapest = min(sum(cost[row][columns[row]] for row in rows) for columns in permutations(rows))
    assert sum(cost[row][chosen[row]] for row in rows) == cheapest
