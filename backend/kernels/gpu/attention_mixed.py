"""Paged attention for steps whose makeup only the device knows: a captured graph serves any mixture of decodes and prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from backend.kernels.gpu.attention_decode import LEAST_SPLIT, attend_in_splits
from backend.kernels.gpu.attention_prefill import attend_tiles

#: Programs to start for all places of sequences together: those of places that are empty, or whose context is short, end at once.
_MOST_PROGRAMS = 8192
#: Keys that make one more split worth its programs, and how many splits that may be.
_SPLIT_KEYS = 1024
_MOST_SPLITS = 32


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
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    sequences = len(context_lens)
    # Rows that do not decode get zeros here; those of tiles are written afterwards.
    splits = _num_splits(sequences * k_cache.shape[2], block_tables.shape[1] * k_cache.shape[1], sliding_window)
    args = (q[:sequences], k_cache, v_cache, block_tables, context_lens, scale, sliding_window, splits, LEAST_SPLIT)
    attend_in_splits(*args, out=out[:sequences])
    attend_tiles(q, k_cache, v_cache, block_tables, tiles, out, scale, sliding_window)
    return out


def _num_splits(programs: int, longest: int, sliding_window: int | None) -> int:
    """Parts of the keys of decoding sequences, a power of 2; how many sequences there will be is not known."""
    longest = longest if sliding_window is None else min(longest, sliding_window)
    most = max(1, min(longest // _SPLIT_KEYS, _MOST_PROGRAMS // programs, _MOST_SPLITS))
    return 1 << (most.bit_length() - 1)
