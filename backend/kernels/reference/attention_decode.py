"""Paged attention for sequences with one query token each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    num_seqs, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    length = block_tables.shape[1] * block_size
    blocks = block_tables.reshape(-1)
    k = k_cache.index_select(0, blocks).view(num_seqs, length, kv_heads, head_dim).transpose(1, 2)
    v = v_cache.index_select(0, blocks).view(num_seqs, length, kv_heads, head_dim).transpose(1, 2)
    positions = torch.arange(length, device=q.device)
    visible = positions < context_lens.unsqueeze(1)
    if sliding_window is not None:
        visible &= positions >= context_lens.unsqueeze(1) - sliding_window
    grouped = (q * scale).view(num_seqs, kv_heads, heads // kv_heads, head_dim).to(k.dtype)
    scores = torch.matmul(grouped, k.transpose(2, 3)).float()
    scores.masked_fill_(~visible[:, None, None], float("-inf"))
    return torch.matmul(F.softmax(scores, dim=-1).to(v.dtype), v).view(num_seqs, heads, head_dim).to(q.dtype)
