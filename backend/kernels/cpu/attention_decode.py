"""Paged attention for sequences with one query token each, compiled."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from backend.kernels.cpu.compiled import ZERO, as_array, exp, kernel, parallel_kernel, widen

_UNBOUNDED = 2**31 - 1


def decode_attention(
    q: Tensor,  # [S, H, D]
    k_cache: Tensor,  # [N, C, G, D]
    v_cache: Tensor,  # [N, C, G, D]
    block_tables: Tensor,  # [S, B] int32
    context_lens: Tensor,  # [S] int32, cached tokens of the sequence, its query's own included
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """Softmax(scale * q k) v over a sequence's last `sliding_window` tokens (all if None); returns [S, H, D]."""
    out = torch.empty(q.shape, dtype=torch.float32)
    _decode(
        (q.float() * scale).contiguous().numpy(),
        as_array(k_cache),
        as_array(v_cache),
        block_tables.contiguous().numpy(),
        context_lens.numpy(),
        sliding_window or _UNBOUNDED,
        out.numpy(),
    )
    return out.to(q.dtype)


# Eight tokens at a time: a head is short, and with fewer sums LLVM unrolls these loops so far that it never enters them.


@kernel
def _scores_of_block(query, keys, first, last, g, scores, at):
    """scores[at …] = query [D] · keys [C, G, D] of tokens first … last - 1 and head g; returns the largest."""
    top = np.float32(-np.inf)
    t = first
    while t + 8 <= last:
        a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = ZERO
        for d in range(query.shape[0]):
            q = query[d]
            a0 += q * widen(keys[t, g, d])
            a1 += q * widen(keys[t + 1, g, d])
            a2 += q * widen(keys[t + 2, g, d])
            a3 += q * widen(keys[t + 3, g, d])
            a4 += q * widen(keys[t + 4, g, d])
            a5 += q * widen(keys[t + 5, g, d])
            a6 += q * widen(keys[t + 6, g, d])
            a7 += q * widen(keys[t + 7, g, d])
        i = at + t - first
        scores[i], scores[i + 1], scores[i + 2], scores[i + 3] = a0, a1, a2, a3
        scores[i + 4], scores[i + 5], scores[i + 6], scores[i + 7] = a4, a5, a6, a7
        top = max(top, max(max(max(a0, a1), max(a2, a3)), max(max(a4, a5), max(a6, a7))))
        t += 8
    while t < last:
        a0 = ZERO
        for d in range(query.shape[0]):
            a0 += query[d] * widen(keys[t, g, d])
        scores[at + t - first] = a0
        top = max(top, a0)
        t += 1
    return top


@kernel
def _add_values_of_block(attended, values, first, last, g, scores, at):
    """attended [D] += scores[at …] * values [C, G, D] of tokens first … last - 1 and head g."""
    t = first
    while t + 8 <= last:
        i = at + t - first
        a0, a1, a2, a3 = scores[i], scores[i + 1], scores[i + 2], scores[i + 3]
        a4, a5, a6, a7 = scores[i + 4], scores[i + 5], scores[i + 6], scores[i + 7]
        for d in range(attended.shape[0]):
            attended[d] += (
                a0 * widen(values[t, g, d])
                + a1 * widen(values[t + 1, g, d])
                + a2 * widen(values[t + 2, g, d])
                + a3 * widen(values[t + 3, g, d])
                + a4 * widen(values[t + 4, g, d])
                + a5 * widen(values[t + 5, g, d])
                + a6 * widen(values[t + 6, g, d])
                + a7 * widen(values[t + 7, g, d])
            )
        t += 8
    while t < last:
        a0 = scores[at + t - first]
        for d in range(attended.shape[0]):
            attended[d] += a0 * widen(values[t, g, d])
        t += 1


@parallel_kernel
def _decode(q, k_cache, v_cache, block_tables, context_lens, window, out):
    num_seqs, heads = q.shape[:2]
    block_size, kv_heads = k_cache.shape[1], k_cache.shape[2]
    per_group = heads // kv_heads
    for s in prange(num_seqs):
        end = np.int64(context_lens[s])
        begin = max(np.int64(0), end - window)
        first_block, last_block = begin // block_size, (end - 1) // block_size
        # Block by block and in it head by head, as the cache lies in memory.
        scores = np.empty((heads, end - begin), np.float32)
        top = np.full(heads, -np.inf, np.float32)
        for b in range(first_block, last_block + 1):
            first, last = max(begin - b * block_size, 0), min(end - b * block_size, block_size)
            at = b * block_size + first - begin
            keys = k_cache[block_tables[s, b]]
            for h in range(heads):
                top[h] = max(top[h], _scores_of_block(q[s, h], keys, first, last, h // per_group, scores[h], at))
        for h in range(heads):
            shares, total = scores[h], ZERO
            for i in range(end - begin):
                shares[i] = exp(shares[i] - top[h])
                total += shares[i]
            for i in range(end - begin):
                shares[i] /= total
        out[s] = ZERO
        for b in range(first_block, last_block + 1):
            first, last = max(begin - b * block_size, 0), min(end - b * block_size, block_size)
            at = b * block_size + first - begin
            values = v_cache[block_tables[s, b]]
            for h in range(heads):
                _add_values_of_block(out[s, h], values, first, last, h // per_group, scores[h], at)
