"""Latency histograms with fixed buckets, each 5 % wider than the one before: cumulative counts that readers diff."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Upper edge of the first bucket in seconds, the ratio of neighbouring edges, and how many there are (the last one also
#: holds everything above: some 200 s).
FIRST_S = 1e-4
RATIO = 1.05
NUM_BUCKETS = 300

_LOG_FIRST = math.log(FIRST_S)
_PER_LOG = 1 / math.log(RATIO)
#: [NUM_BUCKETS + 1] seconds: bucket i holds values from EDGES_S[i] to EDGES_S[i + 1].
EDGES_S = np.concatenate([[0.0], FIRST_S * RATIO ** np.arange(NUM_BUCKETS)])


def bucket_of(seconds: float) -> int:
    """The bucket that counts a duration."""
    if seconds <= FIRST_S:
        return 0
    return min(NUM_BUCKETS - 1, math.ceil((math.log(seconds) - _LOG_FIRST) * _PER_LOG - 1e-9))


def quantile(counts: ArrayLike, q: float) -> float | None:
    """The q-quantile in seconds of bucket counts [NUM_BUCKETS], interpolated in its bucket; None without any count."""
    counts = np.asarray(counts)
    total = int(counts.sum())
    if total <= 0:
        return None
    below = np.cumsum(counts)
    bucket = int(np.searchsorted(below, q * total))
    within = (q * total - (below[bucket] - counts[bucket])) / counts[bucket]
    return float(EDGES_S[bucket] + within * (EDGES_S[bucket + 1] - EDGES_S[bucket]))


def share_above(counts: ArrayLike, limit_s: float) -> float | None:
    """The share of values above a limit, with the bucket of the limit split evenly; None without any count."""
    counts = np.asarray(counts)
    total = int(counts.sum())
    if total <= 0:
        return None
    lower, upper = EDGES_S[:-1], EDGES_S[1:]
    above: NDArray[np.float64] = np.clip((upper - limit_s) / (upper - lower), 0.0, 1.0)
    return float(counts @ above / total)
