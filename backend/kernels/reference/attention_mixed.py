"""Paged attention for steps whose makeup is in tensors: any mixture of decodes and prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from backend.kernels.reference.attention_decode import decode_attention
from backend.kernels.reference.attention_prefill import prefill_attention


def mixed_attention(
    q: Tensor,  # [T, H, D], first one query of each decoding sequence, then the others' and padding
    k_cache: Tensor,  # [N, C, G, D], already holds the queries' own keys
    v_cache: Tensor,  # [N, C, G, D]
    block_tables: Tensor,  # [S, B] int32, S at most T
    context_lens: Tensor,  # [S] int32, cached tokens of decoding sequences; 0 for others
    tiles: Tensor,  # [W, 4] int32, see `query_tiles`; one without queries is left out
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """`decode_attention` of the first rows and `prefill_attention` of the tiles' rows; returns [T, H, D], other rows are 0."""
    out = torch.zeros_like(q)
    n = int((context_lens > 0).sum())
    cache = (k_cache, v_cache)
    out[:n] = decode_attention(q[:n], *cache, block_tables[:n], context_lens[:n], scale, sliding_window)
    for sequence, row, first, count in tiles.tolist():
        rows, table = slice(row, row + count), block_tables[sequence : sequence + 1]
        if count:
            out[rows] = prefill_attention(q[rows], *cache, table, [count], [first + count], scale, sliding_window)
    return out
