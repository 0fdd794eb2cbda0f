"""Filtered sampling from rows of weights, whatever number of tokens the filters keep, without sorting a row; compiled.

Every filter keeps the first tokens in the order (weight descending, id ascending). A histogram over the leading bits of
the weights finds the bucket where that prefix ends and the bucket where the sample falls; only these are sorted.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from backend.kernels.cpu import compiled  # noqa: F401 - sets numba up before it compiles anything

#: Sign, exponent and 6 bits of the mantissa: weights in a bucket are at most 1.6 % apart.
_SHIFT = 17
_NUM_BUCKETS = (int(np.float32(1).view(np.int32)) >> _SHIFT) + 1


@njit(cache=True, parallel=True, nogil=True)
def sample_rows(weights, rows, u, top_k, top_p, min_p):
    """Tokens [n] int64 of the given rows.

    Args:
        weights: [G, V] float32 in [0, 1], the largest of each row is 1.
        rows: [n] int64, which rows to sample from.
        u … min_p: [G] float64, as in `sample_row`.
    """
    tokens = np.empty(len(rows), np.int64)
    for i in prange(len(rows)):
        g = rows[i]
        tokens[i] = sample_row(weights[g], u[g], np.int64(top_k[g]), top_p[g], min_p[g])
    return tokens


# No fast mathematics here: a token must not depend on how a loop was compiled.


@njit(cache=True)
def sample_row(weights, u, top_k, top_p, min_p):
    """The token at share `u` of the mass that the filters leave, in the order of falling weight.

    Args:
        weights: [V] float32 in [0, 1], the largest is 1.
        u: in [0, 1).
        top_k, top_p, min_p: as in SamplingParams, min_p relative to the largest weight.
    """
    # Bucket numbers fall with the weight; `masses[b]` is the weight of buckets 0 … b.
    bits = weights.view(np.int32)
    masses = np.zeros(_NUM_BUCKETS)
    for i in range(len(weights)):
        masses[(_NUM_BUCKETS - 1) - (bits[i] >> _SHIFT)] += weights[i]
    masses = masses.cumsum()
    last, limit, total = _NUM_BUCKETS - 1, top_k, masses[-1]
    if top_k > 0:
        counts = np.zeros(_NUM_BUCKETS, np.int64)
        for i in range(len(weights)):
            counts[(_NUM_BUCKETS - 1) - (bits[i] >> _SHIFT)] += 1
        counts = counts.cumsum()
        last = min(last, np.searchsorted(counts, top_k))
        limit = top_k - (counts[last - 1] if last else 0)
        total = _before(masses, last) + weights[_members(weights, last)[:limit]].astype(np.float64).sum()
    nucleus = top_p * total
    smallest = np.array([min_p], np.float32).view(np.int32)[0] >> _SHIFT
    end = min(last, np.searchsorted(masses, nucleus), (_NUM_BUCKETS - 1) - smallest)
    members = _members(weights, end)
    if top_k > 0 and end == last:
        members = members[:limit]
    sizes = weights[members].astype(np.float64)
    ends = _before(masses, end) + sizes.cumsum()
    members = members[(ends - sizes < nucleus) & (sizes >= min_p)]
    ends = ends[: len(members)]
    target = u * (ends[-1] if len(members) else _before(masses, end))
    bucket = np.searchsorted(masses[:end], target, side="right")
    if bucket < end:
        members = _members(weights, bucket)
        ends = _before(masses, bucket) + weights[members].astype(np.float64).cumsum()
    return members[min(np.searchsorted(ends, target, side="right"), len(members) - 1)]


@njit(cache=True)
def _before(masses, bucket):
    return masses[bucket - 1] if bucket else 0.0


@njit(cache=True)
def _members(weights, bucket):
    """Ids of the tokens in a bucket, the heaviest first, the lowest id among equals."""
    bits = weights.view(np.int32)
    leading = np.int32((_NUM_BUCKETS - 1) - bucket)
    count = 0
    for i in range(len(bits)):
        count += (bits[i] >> _SHIFT) == leading
    ids = np.empty(count, np.int64)
    count = 0
    for i in range(len(bits)):
        if (bits[i] >> _SHIFT) == leading:
            ids[count] = i
            count += 1
    return ids[np.argsort(-weights[ids], kind="mergesort")]
