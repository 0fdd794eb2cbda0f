"""Writing new keys and values into the paged KV cache, alone and after what comes before: head norms and rotation."""

from __future__ import annotations

from torch import Tensor

from backend.kernels.reference.rmsnorm import rms_norm
from backend.kernels.reference.rope import apply_rope


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


def rotate_and_store(
    heads: Tensor,  # [T, H + 2 G, D] contiguous, query, key and value heads; query heads are changed in place
    cos: Tensor,  # [T, D / 2], of the heads' type
    sin: Tensor,  # [T, D / 2]
    k_cache: Tensor,  # [N, C, G, D], written
    v_cache: Tensor,  # [N, C, G, D], written
    kv_slots: Tensor,  # [T] int64, block * C + offset, each at most once
    q_norm: Tensor
    | None = None,  # [D] weight of the query heads' RMSNorm; None: neither queries nor keys are normalised
    k_norm: Tensor | None = None,  # [D] weight of the key heads' RMSNorm
    eps: float = 0.0,
) -> None:
    """Normalise and rotate queries and keys, and put keys and values at places `kv_slots`.

    What the key and value heads of `heads` hold afterwards is undefined.
    """
    kv_heads = k_cache.shape[2]
    q, k, v = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        q.copy_(rms_norm(q, q_norm, eps))
        k.copy_(rms_norm(k, k_norm, eps))
    apply_rope(heads[:, : heads.shape[1] - kv_heads], cos, sin)
    store_kv(k, v, k_cache, v_cache, kv_slots)
