"""Paged attention for sequences with any number of query tokens: the last tokens of a cached context."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Causal attention of each sequence's last `query_lens` positions over its cached tokens; returns [T, H, D].

    With a sliding window a query sees the last `sliding_window` tokens, itself included.
    """
    block_size, kv_heads, head_dim = k_cache.shape[1:]
    out = torch.empty_like(q)
    row = 0
    for seq, (n, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        first = context - n  # position of the first query
        # Blocks that no query of this chunk can see are not read.
        first_key = 0 if sliding_window is None else max(0, first - sliding_window + 1) // block_size * block_size
        blocks = block_tables[seq, first_key // block_size : -(-context // block_size)]
        shape = (1, -1, kv_heads, head_dim)
        k = k_cache.index_select(0, blocks).view(shape)[:, : context - first_key].transpose(1, 2).to(q.dtype)
        v = v_cache.index_select(0, blocks).view(shape)[:, : context - first_key].transpose(1, 2).to(q.dtype)
        visible = None
        if first > first_key or (sliding_window is not None and context > sliding_window):
            queries = torch.arange(first, context, device=q.device).unsqueeze(1)
            keys = torch.arange(first_key, context, device=q.device)
            visible = keys <= queries
            if sliding_window is not None:
                visible &= keys > queries - sliding_window
        attended = F.scaled_dot_product_attention(
            q[row : row + n].unsqueeze(0).transpose(1, 2),
            k,
            v,
            attn_mask=visible,
            is_causal=visible is None,
            scale=scale,
            enable_gqa=q.shape[1] != kv_heads,
        )
        out[row : row + n] = attended.squeeze(0).transpose(0, 1)
        row += n
    return out
