"""Attention by the flash-attn package (Dao, arXiv 2307.08691) over the same paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from backend.kernels.transfer import to_device

#: flash-attn reads paged caches whose blocks hold a multiple of this many tokens.
BLOCK_MULTIPLE = 256


def _window(sliding_window: int | None) -> tuple[int, int]:
    """flash-attn counts the tokens before the query's own; -1: all."""
    return (-1, -1) if sliding_window is None else (sliding_window - 1, 0)


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
    from flash_attn import flash_attn_with_kvcache

    return flash_attn_with_kvcache(
        q.unsqueeze(1),
        k_cache,
        v_cache,
        cache_seqlens=context_lens,
        block_table=block_tables.contiguous(),
        softmax_scale=scale,
        causal=True,
        window_size=_window(sliding_window),
    ).squeeze(1)


@lru_cache(maxsize=4)
def _starts(lens: tuple[int, ...], device: torch.device) -> Tensor:
    """[S + 1] int32, first row of each sequence. Every layer of a step asks alike."""
    return to_device([np.array([0, *accumulate(lens)], np.int32)], device)[0]


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
    """Causal attention of each sequence's last `query_lens` positions over its cached tokens; returns [T, H, D]."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q=_starts(tuple(query_lens), q.device),
        cu_seqlens_k=_starts(tuple(context_lens), q.device),
        max_seqlen_q=max(query_lens),
        max_seqlen_k=max(context_lens),
        softmax_scale=scale,
        causal=True,
        window_size=_window(sliding_window),
        block_table=block_tables.contiguous(),
    )
