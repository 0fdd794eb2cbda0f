"""Paged attention for sequences with one query token each, compiled."""

from __future__ import annotations

import numpy as np
import torch
from numba import get_num_threads, prange, types
from numba.extending import overload
from torch import Tensor

from backend.kernels.cpu import bfloat16
from backend.kernels.cpu.bfloat16 import put
from backend.kernels.cpu.bfloat16_attention import TOKENS, add_values_of_tokens, scores_of_tokens
from backend.kernels.cpu.compiled import FAST_MATH, ONE, ZERO, as_array, exp, kernel, parallel_kernel, widen

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
    """Softmax(scale * q k) v over a sequence's last `sliding_window` tokens (all if None); returns [S, H, D].

    float32 sums whatever the type of the cache. Where the processor multiplies bfloat16 and the cache is of that type, scaled
    queries and softmax shares are rounded to it, too.
    """
    out = torch.empty(q.shape, dtype=torch.float32)
    query = (q.float() * scale).contiguous()
    _decode(
        as_array(query.to(k_cache.dtype) if bfloat16.multiplies(k_cache) else query),
        as_array(k_cache),
        as_array(v_cache),
        block_tables.contiguous().numpy(),
        context_lens.numpy(),
        sliding_window or _UNBOUNDED,
        get_num_threads(),
        out.numpy(),
    )
    return out.to(q.dtype)


# Eight tokens at a time: a head is short, and with fewer sums LLVM unrolls these loops so far that it never enters them.


@kernel
def _float32_scores(q, s, h, k_cache, block, following, first, last, g, scores, row, at, tops):
    """scores[row, at …] = q[s, h] · keys of tokens first … last - 1 of a block and head g; tops[row, 0] = the largest so far."""
    query, keys = q[s, h], k_cache[block]
    top = tops[row, 0]
    t = first
    while t + 8 <= last:
        a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = ZERO
        for d in range(query.shape[0]):
            p = query[d]
            a0 += p * widen(keys[t, g, d])
            a1 += p * widen(keys[t + 1, g, d])
            a2 += p * widen(keys[t + 2, g, d])
            a3 += p * widen(keys[t + 3, g, d])
            a4 += p * widen(keys[t + 4, g, d])
            a5 += p * widen(keys[t + 5, g, d])
            a6 += p * widen(keys[t + 6, g, d])
            a7 += p * widen(keys[t + 7, g, d])
        i = at + t - first
        scores[row, i], scores[row, i + 1], scores[row, i + 2], scores[row, i + 3] = a0, a1, a2, a3
        scores[row, i + 4], scores[row, i + 5], scores[row, i + 6], scores[row, i + 7] = a4, a5, a6, a7
        top = max(top, max(max(max(a0, a1), max(a2, a3)), max(max(a4, a5), max(a6, a7))))
        t += 8
    while t < last:
        a0 = ZERO
        for d in range(query.shape[0]):
            a0 += query[d] * widen(keys[t, g, d])
        scores[row, at + t - first] = a0
        top = max(top, a0)
        t += 1
    tops[row, 0] = top


@kernel
def _add_float32_values(out, s, h, v_cache, block, following, first, last, g, shares, row, at):
    """out[s, h] += shares[row, at …] * values of tokens first … last - 1 of a block and head g."""
    attended, values = out[s, h], v_cache[block]
    t = first
    while t + 8 <= last:
        i = at + t - first
        a0, a1, a2, a3 = shares[row, i], shares[row, i + 1], shares[row, i + 2], shares[row, i + 3]
        a4, a5, a6, a7 = shares[row, i + 4], shares[row, i + 5], shares[row, i + 6], shares[row, i + 7]
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
        a0 = shares[row, at + t - first]
        for d in range(attended.shape[0]):
            attended[d] += a0 * widen(values[t, g, d])
        t += 1


@kernel
def _bfloat16_scores(q, s, h, k_cache, block, following, first, last, g, scores, row, at, tops):
    """As _float32_scores; tops[row] has the largest of every sixteenth token, and 15 scores after the last are overwritten."""
    for t in range(first, last, TOKENS):
        scores_of_tokens(q, s, h, k_cache, block, following, t, last, g, scores, row, at + t - first, tops)


@kernel
def _add_bfloat16_values(out, s, h, v_cache, block, following, first, last, g, shares, row, at):
    """As _add_float32_values."""
    t = first
    while t + TOKENS <= last:
        add_values_of_tokens(out, s, h, v_cache, block, following, t, last, g, shares, row, at + t - first)
        t += TOKENS
    if t < last:
        rest = np.zeros((1, TOKENS), np.uint16)
        for i in range(last - t):
            rest[0, i] = shares[row, at + t - first + i]
        add_values_of_tokens(out, s, h, v_cache, block, following, t, last, g, rest, 0, 0)


def _scores_of_block(q, s, h, k_cache, block, following, first, last, g, scores, row, at, tops):
    """In compiled code: _float32_scores or _bfloat16_scores, whichever the query's type asks for."""
    raise NotImplementedError("for compiled code only")


@overload(_scores_of_block, jit_options={"fastmath": FAST_MATH})
def _choose_scores(q, s, h, k_cache, block, following, first, last, g, scores, row, at, tops):
    chosen = _bfloat16_scores if q.dtype == types.uint16 else _float32_scores

    def implementation(q, s, h, k_cache, block, following, first, last, g, scores, row, at, tops):
        chosen(q, s, h, k_cache, block, following, first, last, g, scores, row, at, tops)

    return implementation


def _add_values_of_block(out, s, h, v_cache, block, following, first, last, g, shares, row, at):
    """In compiled code: _add_float32_values or _add_bfloat16_values, whichever the shares' type asks for."""
    raise NotImplementedError("for compiled code only")


@overload(_add_values_of_block, jit_options={"fastmath": FAST_MATH})
def _choose_add_values(out, s, h, v_cache, block, following, first, last, g, shares, row, at):
    chosen = _add_bfloat16_values if shares.dtype == types.uint16 else _add_float32_values

    def implementation(out, s, h, v_cache, block, following, first, last, g, shares, row, at):
        chosen(out, s, h, v_cache, block, following, first, last, g, shares, row, at)

    return implementation


@parallel_kernel
def _decode(q, k_cache, v_cache, block_tables, context_lens, window, parts, out):
    """Each of `parts` takes a stretch of the pairs of a sequence and a key head, with the same number of tokens in all."""
    num_seqs, kv_heads = q.shape[0], k_cache.shape[2]
    total = 0
    for s in range(num_seqs):
        total += kv_heads * min(np.int64(context_lens[s]), window)
    for part in prange(parts):
        low, high = total * part // parts, total * (part + 1) // parts
        start = 0
        for s in range(num_seqs):
            end = np.int64(context_lens[s])
            begin = max(np.int64(0), end - window)
            length = end - begin
            if length == 0:
                out[s] = ZERO
                continue
            # Heads that begin within this part.
            first_head = min(max((low - start + length - 1) // length, 0), kv_heads)
            last_head = min(max((high - start + length - 1) // length, 0), kv_heads)
            if first_head < last_head:
                _attend(q, s, k_cache, v_cache, block_tables, begin, end, first_head, last_head, out)
            start += kv_heads * length


@kernel
def _attend(q, s, k_cache, v_cache, block_tables, begin, end, first_head, last_head, out):
    """Sequence s, tokens begin … end - 1, queries of key heads first_head … last_head - 1."""
    block_size = k_cache.shape[1]
    per_group = q.shape[1] // k_cache.shape[2]
    first_query, num_queries = first_head * per_group, (last_head - first_head) * per_group
    first_block, last_block = begin // block_size, (end - 1) // block_size
    # Block by block and in it head by head, as the cache lies in memory.
    scores = np.empty((num_queries, end - begin + TOKENS), np.float32)
    shares = np.empty((num_queries, end - begin), q.dtype)
    tops = np.full((num_queries, TOKENS), -np.inf, np.float32)
    for b in range(first_block, last_block + 1):
        first, last = max(begin - b * block_size, 0), min(end - b * block_size, block_size)
        block, following = np.int64(block_tables[s, b]), np.int64(block_tables[s, min(b + 1, last_block)])
        at = b * block_size + first - begin
        for i in range(num_queries):
            g = first_head + i // per_group
            _scores_of_block(q, s, first_query + i, k_cache, block, following, first, last, g, scores, i, at, tops)
    totals = np.empty(num_queries, np.float32)
    for i in range(num_queries):
        top, total = tops[i, 0], ZERO
        for lane in range(1, TOKENS):
            top = max(top, tops[i, lane])
        for t in range(end - begin):
            share = exp(scores[i, t] - top)
            total += share
            put(shares, i, t, share)
        totals[i] = total
        for d in range(out.shape[2]):
            out[s, first_query + i, d] = ZERO
    for b in range(first_block, last_block + 1):
        first, last = max(begin - b * block_size, 0), min(end - b * block_size, block_size)
        block, following = np.int64(block_tables[s, b]), np.int64(block_tables[s, min(b + 1, last_block)])
        at = b * block_size + first - begin
        for i in range(num_queries):
            g = first_head + i // per_group
            _add_values_of_block(out, s, first_query + i, v_cache, block, following, first, last, g, shares, i, at)
    for i in range(num_queries):
        share = ONE / totals[i]
        for d in range(out.shape[2]):
            out[s, first_query + i, d] *= share
