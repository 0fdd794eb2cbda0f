"""Latency buckets: narrow enough, and quantiles that are true to them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.brownout.buckets import EDGES_S, NUM_BUCKETS, RATIO, bucket_of, quantile, share_above


def counts_of(values: list[float]) -> np.ndarray:
    return np.bincount([bucket_of(value) for value in values], minlength=NUM_BUCKETS)


def test_buckets_are_at_most_five_percent_apart() -> None:
    assert np.allclose(EDGES_S[2:] / EDGES_S[1:-1], RATIO)
    assert RATIO <= 1.05


@given(st.floats(0, EDGES_S[-1]))
def test_a_value_lies_in_its_bucket(seconds: float) -> None:
    bucket = bucket_of(seconds)
    assert EDGES_S[bucket] * (1 - 1e-6) <= seconds <= EDGES_S[bucket + 1] * (1 + 1e-6)


@given(st.lists(st.floats(1e-3, 10), min_size=1, max_size=100), st.floats(0.05, 1.0))
def test_quantiles_are_within_a_bucket_of_the_true_ones(values: list[float], q: float) -> None:
    true = float(np.quantile(values, q, method="inverted_cdf"))
    assert quantile(counts_of(values), q) == pytest.approx(true, rel=RATIO - 1 + 1e-6)


def test_the_share_above_a_limit() -> None:
    counts = counts_of([0.01] * 7 + [1.0] * 3)
    assert share_above(counts, 0.1) == pytest.approx(0.3)
    assert bucket_of(1e9) == NUM_BUCKETS - 1


def test_nothing_served_is_unknown_and_not_zero() -> None:
    assert quantile(np.zeros(NUM_BUCKETS), 0.9) is None
    assert share_above(np.zeros(NUM_BUCKETS), 0.1) is None
