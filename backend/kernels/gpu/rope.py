"""Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split form of Hugging Face checkpoints."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from backend.kernels.gpu.common import power_of_2


@triton.jit
def rotate(low, high, cos, sin):
    """The pairs (low, high) turned by their angles; float32."""
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _rope_kernel(
    x_ptr,  # [T, heads, D], elements of a head side by side
    cos_ptr,  # [T, D / 2]
    sin_ptr,  # [T, D / 2]
    heads,
    stride_token,
    stride_head,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,  # power of 2, at least heads
    LANES: tl.constexpr,  # power of 2, at least HALF
):
    """Grid (T): one token each."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    cos = tl.load(cos_ptr + token * HALF + lane, mask=lane < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * HALF + lane, mask=lane < HALF, other=0.0).to(tl.float32)
    mask = (head < heads) & (lane < HALF)
    place = x_ptr + token * stride_token + head * stride_head + lane
    low = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(place + HALF, mask=mask, other=0.0).to(tl.float32)
    low, high = rotate(low, high, cos, sin)
    tl.store(place, low.to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(place + HALF, high.to(x_ptr.dtype.element_ty), mask=mask)


def apply_rope(
    x: Tensor,  # [T, heads, D], rotated in place; rows may be strided
    cos: Tensor,  # [T, D / 2], of x's type
    sin: Tensor,  # [T, D / 2]
) -> None:
    """Rotate the pair (x[i], x[i + D/2]) of every head by the token's angle i."""
    num_tokens, heads, head_dim = x.shape
    if num_tokens == 0:
        return
    half = head_dim // 2
    _rope_kernel[(num_tokens,)](
        x,
        cos,
        sin,
        heads,
        x.stride(0),
        x.stride(1),
        HALF=half,
        HEADS=power_of_2(heads),
        LANES=power_of_2(half),
        num_warps=4,
    )
