"""Grouped expert MLPs with what follows them in a layer: the residual and the norm."""

from __future__ import annotations

from torch import Tensor

from backend.kernels.reference.grouped_experts import grouped_experts_forward
from backend.kernels.reference.rmsnorm import add_rms_norm


def experts_add_rms_norm(
    hidden: Tensor,  # [T, M]
    w13: Tensor,  # [P, 2 * I, M] of any floating type, gate rows above up rows
    w2: Tensor,  # [P, M, I]
    slots: Tensor,  # [T, K] int64, -1: skip
    weights: Tensor,  # [T, K] float32
    residual: Tensor,  # [T, M] contiguous, added to in place
    norm_weight: Tensor,  # [M]
    eps: float,
    scales: tuple[Tensor, Tensor] | None = None,  # [P, 2 * I] and [P, M] float32, factors of the rows of w13 and w2
) -> Tensor:
    """Add `grouped_experts_forward` to `residual` and return the RMSNorm of the sum [T, M]."""
    out = grouped_experts_forward(hidden, w13, w2, slots, weights, scales)
    return add_rms_norm(out, residual, norm_weight, eps)
