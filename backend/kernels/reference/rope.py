"""Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split form of Hugging Face checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope(
    x: Tensor,  # [T, heads, D], rotated in place; rows may be strided
    cos: Tensor,  # [T, D / 2], of x's type
    sin: Tensor,  # [T, D / 2]
) -> None:
    """Rotate the pair (x[i], x[i + D/2]) of every head by the token's angle i."""
    half = x.shape[-1] // 2
    low, high = x[..., :half], x[..., half:]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated_low = torch.addcmul(low * cos, high, sin, value=-1)
    high.mul_(cos).addcmul_(low, sin)
    low.copy_(rotated_low)
