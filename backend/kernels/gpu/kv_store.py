"""Writing new keys and values into the paged KV cache, alone and fused with what comes before: head norms and rotation."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from backend.kernels.gpu.common import power_of_2
from backend.kernels.gpu.rope import rotate


@triton.jit
def _store_kernel(
    k_ptr,  # [T, G, D], elements of a head side by side
    v_ptr,  # [T, G, D], strides as k
    k_cache_ptr,  # [N * C, G, D]
    v_cache_ptr,
    kv_slots_ptr,  # [T] int64
    kv_heads,
    stride_token,
    stride_head,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid (T): one token each."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    mask = (head < kv_heads) & (lane < DIM)
    source = token * stride_token + head * stride_head + lane
    place = (tl.load(kv_slots_ptr + token) * kv_heads + head) * DIM + lane
    k = tl.load(k_ptr + source, mask=mask)
    v = tl.load(v_ptr + source, mask=mask)
    tl.store(k_cache_ptr + place, k.to(k_cache_ptr.dtype.element_ty), mask=mask)
    tl.store(v_cache_ptr + place, v.to(v_cache_ptr.dtype.element_ty), mask=mask)


def store_kv(
    k: Tensor,  # [T, G, D]
    v: Tensor,  # [T, G, D]
    k_cache: Tensor,  # [N, C, G, D], written
    v_cache: Tensor,  # [N, C, G, D], written
    kv_slots: Tensor,  # [T] int64, block * C + offset, each at most once
) -> None:
    """Put row t at place `kv_slots[t]`, converting to the cache's type."""
    num_tokens, kv_heads, head_dim = k.shape
    if num_tokens == 0:
        return
    if k.stride() != v.stride() or k.stride(2) != 1:
        k, v = k.contiguous(), v.contiguous()
    _store_kernel[(num_tokens,)](
        k,
        v,
        k_cache,
        v_cache,
        kv_slots,
        kv_heads,
        k.stride(0),
        k.stride(1),
        DIM=head_dim,
        HEADS=power_of_2(kv_heads),
        LANES=power_of_2(head_dim),
        num_warps=4,
    )


@triton.jit
def _rotate_and_store_kernel(
    heads_ptr,  # [T, H + 2 G, D] contiguous
    cos_ptr,  # [T, D / 2]
    sin_ptr,  # [T, D / 2]
    k_cache_ptr,  # [N * C, G, D]
    v_cache_ptr,
    kv_slots_ptr,  # [T] int64
    q_norm_ptr,  # [D], read with NORM
    k_norm_ptr,
    eps,
    q_heads,
    kv_heads,
    NORM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,  # heads of a program, power of 2
    LANES: tl.constexpr,  # power of 2, at least HALF
):
    """Grid (T, blocks of HEADS heads)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    inside = lane < HALF
    mask = (head < q_heads + 2 * kv_heads) & inside
    place = heads_ptr + (token * (q_heads + 2 * kv_heads) + head) * 2 * HALF + lane
    stored_low = tl.load(place, mask=mask, other=0.0)
    stored_high = tl.load(place + HALF, mask=mask, other=0.0)
    low = stored_low.to(tl.float32)
    high = stored_high.to(tl.float32)
    is_q = head < q_heads
    is_k = (head >= q_heads) & (head < q_heads + kv_heads)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(low * low + high * high, 1) / (2 * HALF) + eps)[:, None]
        q_low = tl.load(q_norm_ptr + lane, mask=inside, other=0.0).to(tl.float32)
        q_high = tl.load(q_norm_ptr + HALF + lane, mask=inside, other=0.0).to(tl.float32)
        k_low = tl.load(k_norm_ptr + lane, mask=inside, other=0.0).to(tl.float32)
        k_high = tl.load(k_norm_ptr + HALF + lane, mask=inside, other=0.0).to(tl.float32)
        low *= scale * tl.where(is_q, q_low, k_low)
        high *= scale * tl.where(is_q, q_high, k_high)
    cos = tl.load(cos_ptr + token * HALF + lane, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * HALF + lane, mask=inside, other=0.0).to(tl.float32)
    low, high = rotate(low, high, cos, sin)
    tl.store(place, low.to(heads_ptr.dtype.element_ty), mask=mask & is_q)
    tl.store(place + HALF, high.to(heads_ptr.dtype.element_ty), mask=mask & is_q)
    row = tl.load(kv_slots_ptr + token) * kv_heads
    k_place = k_cache_ptr + (row + head - q_heads) * 2 * HALF + lane
    tl.store(k_place, low.to(k_cache_ptr.dtype.element_ty), mask=mask & is_k)
    tl.store(k_place + HALF, high.to(k_cache_ptr.dtype.element_ty), mask=mask & is_k)
    is_v = head >= q_heads + kv_heads
    v_place = v_cache_ptr + (row + head - q_heads - kv_heads) * 2 * HALF + lane
    tl.store(v_place, stored_low.to(v_cache_ptr.dtype.element_ty), mask=mask & is_v)
    tl.store(v_place + HALF, stored_high.to(v_cache_ptr.dtype.element_ty), mask=mask & is_v)


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
    """Normalise and rotate queries and keys, and put keys and values at places `kv_slots`. Key and value heads are left alone."""
    num_tokens, all_heads, head_dim = heads.shape
    if num_tokens == 0:
        return
    kv_heads = k_cache.shape[2]
    lanes = power_of_2(head_dim // 2)
    block = min(power_of_2(all_heads), max(1, 1024 // lanes))
    _rotate_and_store_kernel[(num_tokens, triton.cdiv(all_heads, block))](
        heads,
        cos,
        sin,
        k_cache,
        v_cache,
        kv_slots,
        heads if q_norm is None else q_norm,
        heads if k_norm is None else k_norm,
        eps,
        all_heads - 2 * kv_heads,
        kv_heads,
        NORM=q_norm is not None,
        HALF=head_dim // 2,
        HEADS=block,
        LANES=lanes,
        num_warps=4,
    )
