"""Writing new keys and values into the paged KV cache."""

from __future__ import annotations

from torch import Tensor


def store_kv(
    k: Tensor,  # [T, G, D]
    v: Tensor,  # [T, G, D]
    k_cache: Tensor,  # [N, C, G, D], written
    v_cache: Tensor,  # [N, C, G, D], written
    kv_slots: Tensor,  # [T] int64, block * C + offset, each at most once
) -> None:
    """Put row t at place `kv_slots[t]`, converting to the cache's type."""
    k_cache.view(-1, *k.shape[1:]).index_copy_(0, kv_slots, k.to(k_cache.dtype))
    v_cache.view(-1, *v.shape[1:]).index_copy_(0, kv_slots, v.to(v_cache.dtype))
