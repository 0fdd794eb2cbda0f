"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467), alone and with the residual addition before it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., M], weight [M] -> x / sqrt(mean(x^2) + eps) * weight, in x's type with float32 arithmetic."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add x [T, M] to `residual` [T, M] in place and return the RMSNorm of the sum [T, M]."""
    residual.add_(x)
    return F.rms_norm(residual, weight.shape, weight, eps)
