"""Grouped expert MLPs with what follows them in a layer, the residual and the norm: one launch less than one after the other."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from backend.kernels.gpu.common import power_of_2
from backend.kernels.gpu.grouped_experts import phase_and_tiles, sum_of_served, weighted_outputs
from backend.kernels.gpu.rmsnorm import add_and_norm


@triton.jit
def _combine_add_norm_kernel(
    partial_ptr,  # [T * K, M]
    slots_ptr,  # [T, K] int64
    residual_ptr,  # [T, M], added to
    norm_weight_ptr,  # [M]
    out_ptr,  # [T, M]
    hidden_size,
    eps,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,  # power of 2, at least M
):
    """Grid (T): the same sum, then `add_rms_norm`."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, SIZE)
    total = sum_of_served(partial_ptr, slots_ptr, token, columns, hidden_size, TOP_K, SIZE)
    add_and_norm(total, residual_ptr, norm_weight_ptr, out_ptr, token, columns, hidden_size, eps)


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
    out = torch.empty_like(residual)
    if len(hidden) == 0:
        return out
    partial = weighted_outputs(hidden, w13, w2, slots, weights, *phase_and_tiles(hidden, w2, slots), scales)
    size = hidden.shape[1]
    columns = power_of_2(size)
    _combine_add_norm_kernel[(len(hidden),)](
        partial,
        slots.contiguous(),
        residual,
        norm_weight,
        out,
        size,
        eps,
        TOP_K=slots.shape[1],
        SIZE=columns,
        num_warps=min(8, max(1, columns // 512)),
    )
    return out
