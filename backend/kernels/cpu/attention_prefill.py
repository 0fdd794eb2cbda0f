"""Paged attention for chunks of prompts in bfloat16, sixteen queries of a head at a time.

Scores stand with queries in lanes, [keys, 16], so that softmax needs nothing across lanes; both products are those of `panels`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import get_num_threads, prange
from torch import Tensor

from backend.kernels import reference
from backend.kernels.cpu import bfloat16
from backend.kernels.cpu.bfloat16 import LANES, narrow
from backend.kernels.cpu.compiled import ONE, as_array, exp, kernel, parallel_kernel
from backend.kernels.cpu.panels import ROWS, TOKENS, cached_rows_times_panel, panel_to_rows

_UNBOUNDED = 2**31 - 1


def prefill_attention(
    q: Tensor,  # [T, H, D], sequences end to end
    k_cache: Tensor,  # [N, C, G, D], already holds the queries' own keys
    v_cache: Tensor,  # [N, C, G, D]
    block_tables: Tensor,  # [S, B] int32
    query_lens: Sequence[int],  # [S], query tokens; their sum is T
    context_lens: Sequence[int],  # [S], cached tokens after this step, queries included
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """As the reference, which also serves what the processor does not multiply.

    Elsewhere scaled queries and softmax shares are rounded to bfloat16; sums are float32.
    """
    if not bfloat16.multiplies(k_cache) or k_cache.shape[1] % ROWS:
        return reference.prefill_attention(
            q, k_cache, v_cache, block_tables, query_lens, context_lens, scale, sliding_window
        )
    out = torch.empty(q.shape)
    _prefill(
        q.float().contiguous().numpy(),
        as_array(k_cache),
        as_array(v_cache),
        block_tables.contiguous().numpy(),
        np.asarray(query_lens, np.int64),
        np.asarray(context_lens, np.int64),
        np.float32(scale),
        sliding_window or _UNBOUNDED,
        get_num_threads(),
        out.numpy(),
    )
    return out.to(q.dtype)


@parallel_kernel
def _prefill(q, k_cache, v_cache, block_tables, query_lens, context_lens, scale, window, parts, out):
    num_seqs, kv_heads = query_lens.shape[0], k_cache.shape[2]
    rows = np.zeros(num_seqs + 1, np.int64)
    rows[1:] = np.cumsum(query_lens)
    for part in prange(parts):
        # Heads in turn: a sequence costs the same for each.
        for job in range(part, num_seqs * kv_heads, parts):
            s, g = job // kv_heads, job % kv_heads
            if query_lens[s]:
                _attend(
                    q, rows[s], query_lens[s], k_cache, v_cache, block_tables, s, context_lens[s], g, scale, window, out
                )


@kernel
def _attend(q, row, num_queries, k_cache, v_cache, block_tables, s, context, g, scale, window, out):
    """Queries q[row …] [H, D] at the last positions of sequence s, those of key head g, into out.

    By index and not by slices: those count references, in memory that all threads would write to.
    """
    head_dim = q.shape[2]
    block_size, per_group = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    position = context - num_queries
    # Keys are counted from the first block that any query sees.
    origin = max(0, position - window + 1) // block_size * block_size
    room = (context - origin + LANES - 1) // LANES * LANES
    values = np.zeros((head_dim, room), np.uint16)
    for key in range(context - origin):
        token = origin + key
        block = np.int64(block_tables[s, token // block_size])
        for d in range(head_dim):
            values[d, key] = v_cache[block, token % block_size, g, d]
    query = np.empty((1, head_dim // 2, TOKENS), np.uint32)
    scores = np.empty((room, TOKENS), np.float32)
    shares = np.empty((1, room // 2, TOKENS), np.uint32)
    totals = np.empty(TOKENS, np.float32)
    tile = np.empty((TOKENS, head_dim), np.float32)
    for first in range(0, num_queries, TOKENS):
        count = min(TOKENS, num_queries - first)
        # In whole lanes of the instruction; what no query sees is masked.
        begin = max(0, position + first - window + 1 - origin) // LANES * LANES
        end = position + first + count - origin
        padded = (end + LANES - 1) // LANES * LANES
        seen_values, seen_shares = values[:, begin:padded], shares[:, begin // 2 : padded // 2]
        for h in range(g * per_group, (g + 1) * per_group):
            _fill_query(query, q, row + first, count, h, scale)
            for key in range(begin, end, ROWS):
                token = origin + key
                block = np.int64(block_tables[s, token // block_size])
                cached_rows_times_panel(k_cache, block, token % block_size, g, query, scores, key)
            _softmax(scores, shares, begin, end, padded, position + first - origin, window, totals)
            for d in range(0, head_dim, ROWS):
                panel_to_rows(seen_values, d, seen_shares, 0, tile)
            for lane in range(count):
                share = ONE / totals[lane]
                for d in range(head_dim):
                    out[row + first + lane, h, d] = tile[lane, d] * share


@kernel
def _fill_query(panel, q, row, count, h, scale):
    """panel[0] [D / 2, 16] = scale * queries row … of head h, those from the count-th on as copies of the one before it."""
    for lane in range(TOKENS):
        t = row + min(lane, count - 1)
        for k in range(panel.shape[1]):
            low, high = narrow(q[t, h, 2 * k] * scale), narrow(q[t, h, 2 * k + 1] * scale)
            panel[0, k, lane] = np.uint32(low) | np.uint32(np.uint32(high) << np.uint32(16))


@kernel
def _softmax(scores, shares, begin, end, padded, position, window, totals):
    """Unnormalised shares of keys begin … padded - 1 in pairs, for queries at `position` …, and their totals [16].

    A query sees the last `window` keys up to its own; all other shares are zero.
    """
    infinity = np.float32(np.inf)
    for key in range(begin, padded):
        if key >= end:
            for lane in range(TOKENS):
                scores[key, lane] = -infinity
        elif key > position or key <= position + TOKENS - 1 - window:
            for lane in range(TOKENS):
                if key > position + lane or key <= position + lane - window:
                    scores[key, lane] = -infinity
    tops = np.full(TOKENS, -infinity, np.float32)
    totals[:] = np.float32(0.0)
    for key in range(begin, end):
        for lane in range(TOKENS):
            tops[lane] = max(tops[lane], scores[key, lane])
    for key in range(begin, padded, 2):
        for lane in range(TOKENS):
            low, high = exp(scores[key, lane] - tops[lane]), exp(scores[key + 1, lane] - tops[lane])
            totals[lane] += low + high
            shares[0, key // 2, lane] = np.uint32(narrow(low)) | np.uint32(np.uint32(narrow(high)) << np.uint32(16))
