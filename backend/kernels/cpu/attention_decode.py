"""Paged attention for sequences with one query token each, compiled."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from backend.kernels.cpu.compiled import ZERO, as_array, parallel_kernel, widen

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


@parallel_kernel
def _decode(q, k_cache, v_cache, block_tables, context_lens, window, out):
    num_seqs, heads, size = q.shape
    block_size, kv_heads = k_cache.shape[1], k_cache.shape[2]
    per_group = heads // kv_heads
    for job in prange(num_seqs * kv_heads):
        s, g = job // kv_heads, job % kv_heads
        end = np.int64(context_lens[s])
        begin = max(np.int64(0), end - window)
        scores = np.empty(end - begin, np.float32)
        for h in range(g * per_group, (g + 1) * per_group):
            query, attended = q[s, h], out[s, h]
            top = np.float32(-np.inf)
            for t in range(begin, end):
                key = k_cache[block_tables[s, t // block_size], t % block_size, g]
                score = ZERO
                for d in range(size):
                    score += query[d] * widen(key[d])
                scores[t - begin] = score
                top = max(top, score)
            total = ZERO
            for i in range(end - begin):
                scores[i] = np.exp(scores[i] - top)
                total += scores[i]
            attended[:] = ZERO
            for t in range(begin, end):
                value = v_cache[block_tables[s, t // block_size], t % block_size, g]
                share = scores[t - begin] / total
                for d in range(size):
                    attended[d] += share * widen(value[d])
