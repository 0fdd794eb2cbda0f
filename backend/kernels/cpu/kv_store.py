"""Rotation and the KV store in one pass over each token's heads."""

from __future__ import annotations

import torch
from numba import prange
from torch import Tensor

from backend.kernels import reference
from backend.kernels.cpu.bfloat16 import put
from backend.kernels.cpu.compiled import FEW_NUMBERS, as_array, kernel, parallel_kernel
from backend.kernels.cpu.rmsnorm import rms_norm


def rotate_and_store(
    heads: Tensor,  # [T, H + 2 G, D] contiguous, query, key and value heads; query heads are changed in place
    cos: Tensor,  # [T, D / 2]
    sin: Tensor,  # [T, D / 2]
    k_cache: Tensor,  # [N, C, G, D], written
    v_cache: Tensor,  # [N, C, G, D], written
    kv_slots: Tensor,  # [T] int64
    q_norm: Tensor | None = None,  # [D]
    k_norm: Tensor | None = None,  # [D]
    eps: float = 0.0,
) -> None:
    """As the reference, which also serves float16 caches."""
    if k_cache.dtype == torch.float16 or heads.dtype != torch.float32:
        reference.rotate_and_store(heads, cos, sin, k_cache, v_cache, kv_slots, q_norm, k_norm, eps)
        return
    kv_heads = k_cache.shape[2]
    queries = heads.shape[1] - 2 * kv_heads
    if q_norm is not None and k_norm is not None:
        for part, norm in ((heads[:, :queries], q_norm), (heads[:, queries : queries + kv_heads], k_norm)):
            part.copy_(rms_norm(part, norm, eps))
    caches = (as_array(cache.view(-1, cache.shape[3])) for cache in (k_cache, v_cache))
    store = _tokens if heads.numel() <= FEW_NUMBERS else _tokens_in_parallel
    store(heads.numpy(), cos.numpy(), sin.numpy(), *caches, kv_slots.numpy(), kv_heads)


@kernel
def _token(heads, t, cos, sin, keys, values, slots, kv_heads):
    """Token t: heads [T, H + 2 G, D], cos and sin [T, D / 2]; the caches' rows of its place are those of its heads in turn."""
    first_key, half = heads.shape[1] - 2 * kv_heads, cos.shape[1]
    for h in range(first_key):
        for d in range(half):
            low, high = heads[t, h, d], heads[t, h, half + d]
            heads[t, h, d] = low * cos[t, d] - high * sin[t, d]
            heads[t, h, half + d] = high * cos[t, d] + low * sin[t, d]
    for g in range(kv_heads):
        row, h = slots[t] * kv_heads + g, first_key + g
        for d in range(half):
            low, high = heads[t, h, d], heads[t, h, half + d]
            put(keys, row, d, low * cos[t, d] - high * sin[t, d])
            put(keys, row, half + d, high * cos[t, d] + low * sin[t, d])
        for d in range(2 * half):
            put(values, row, d, heads[t, h + kv_heads, d])


@kernel
def _tokens(heads, cos, sin, keys, values, slots, kv_heads):
    for t in range(heads.shape[0]):
        _token(heads, t, cos, sin, keys, values, slots, kv_heads)


@parallel_kernel
def _tokens_in_parallel(heads, cos, sin, keys, values, slots, kv_heads):
    for t in prange(heads.shape[0]):
        _token(heads, t, cos, sin, keys, values, slots, kv_heads)
