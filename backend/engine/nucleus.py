"""Filtered sampling from one row on a CPU, whatever number of tokens the filters keep, without sorting the row.

Every filter keeps the first tokens in the order (weight descending, id ascending). A histogram over the leading bits of
the weights finds the bucket where that prefix ends and the bucket where the sample falls; only these are sorted.
"""

from __future__ import annotations

import numpy as np

#: Sign, exponent and 6 bits of the mantissa: weights in a bucket are at most 1.6 % apart.
_SHIFT = 17
_NUM_BUCKETS = (int(np.float32(1).view(np.int32)) >> _SHIFT) + 1


def sample_filtered(weights: np.ndarray, u: float, top_k: int, top_p: float, min_p: float) -> int:
    """The token at share `u` of the mass that the filters leave, in the order of falling weight.

    Args:
        weights: [V] float32 in [0, 1], the largest is 1.
        u: in [0, 1).
        top_k, top_p, min_p: as in SamplingParams, min_p relative to the largest weight.
    """
    # Bucket numbers fall with the weight; `masses[b]` is the weight of buckets 0 … b.
    buckets = (_NUM_BUCKETS - 1) - (weights.view(np.int32) >> _SHIFT)
    masses = np.bincount(buckets, weights, _NUM_BUCKETS).cumsum()
    last, limit, total = _NUM_BUCKETS - 1, top_k, masses[-1]
    if top_k > 0:
        counts = np.bincount(buckets, minlength=_NUM_BUCKETS).cumsum()
        last = min(last, int(np.searchsorted(counts, top_k)))
        limit = top_k - (int(counts[last - 1]) if last else 0)
        total = _before(masses, last) + weights[_members(weights, buckets, last)[:limit]].sum(dtype=np.float64)
    nucleus = top_p * total
    end = min(
        last,
        int(np.searchsorted(masses, nucleus)),
        _NUM_BUCKETS - 1 - (int(np.float32(min_p).view(np.int32)) >> _SHIFT),
    )
    members = _members(weights, buckets, end)
    if top_k > 0 and end == last:
        members = members[:limit]
    sizes = weights[members].astype(np.float64)
    ends = _before(masses, end) + sizes.cumsum()
    members = members[(ends - sizes < nucleus) & (sizes >= min_p)]
    ends = ends[: len(members)]
    target = u * (ends[-1] if len(members) else _before(masses, end))
    bucket = int(np.searchsorted(masses[:end], target, side="right"))
    if bucket < end:
        members = _members(weights, buckets, bucket)
        ends = _before(masses, bucket) + weights[members].cumsum(dtype=np.float64)
    return int(members[min(int(np.searchsorted(ends, target, side="right")), len(members) - 1)])


def _before(masses: np.ndarray, bucket: int) -> float:
    return float(masses[bucket - 1]) if bucket else 0.0


def _members(weights: np.ndarray, buckets: np.ndarray, bucket: int) -> np.ndarray:
    """Ids of the tokens in a bucket, the heaviest first, the lowest id among equals."""
    ids = np.flatnonzero(buckets == bucket)
    return ids[np.argsort(-weights[ids], kind="stable")]
