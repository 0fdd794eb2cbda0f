"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467), alone and with the residual addition before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from backend.kernels.gpu.common import power_of_2


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [R1, R2, M] with strides, elements of a row side by side
    residual_ptr,  # [R1, M] contiguous, read and written with ADD
    weight_ptr,  # [M]
    out_ptr,  # [R1, R2, M] contiguous
    size,
    rows_2,
    stride_1,
    stride_2,
    eps,
    ADD: tl.constexpr,
    SIZE: tl.constexpr,  # power of 2, at least M
):
    """Grid (R1 * R2): one row each."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    mask = column < size
    start = row // rows_2 * stride_1 + row % rows_2 * stride_2
    x = tl.load(x_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        add_and_norm(x, residual_ptr, weight_ptr, out_ptr, row, column, size, eps)
    else:
        _store_norm(x, weight_ptr, out_ptr, row, column, size, eps)


@triton.jit
def add_and_norm(x, residual_ptr, weight_ptr, out_ptr, row, column, size, eps):
    """Add x [SIZE] float32 to row `row` of the residual [*, size] and write the RMSNorm of the sum to that row of out."""
    mask = column < size
    place = residual_ptr + row * size + column
    total = (x + tl.load(place, mask=mask, other=0.0).to(tl.float32)).to(residual_ptr.dtype.element_ty)
    tl.store(place, total, mask=mask)
    _store_norm(total.to(tl.float32), weight_ptr, out_ptr, row, column, size, eps)


@triton.jit
def _store_norm(x, weight_ptr, out_ptr, row, column, size, eps):
    """Write the RMSNorm of x [SIZE] float32, 0 from `size` on, to row `row` of out [*, size]."""
    mask = column < size
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / size + eps)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * size + column, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., M], weight [M] -> x / sqrt(mean(x^2) + eps) * weight, in x's type with float32 arithmetic."""
    size = x.shape[-1]
    rows = x if x.dim() == 3 else x.reshape(-1, 1, size)
    if rows.stride(2) != 1:
        rows = rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(rows, rows, weight, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add x [T, M] to `residual` [T, M] (contiguous) in place and return the RMSNorm of the sum [T, M]."""
    out = torch.empty_like(residual)
    _launch(x.contiguous().unsqueeze(1), residual, weight, out, eps, add=True)
    return out


def _launch(x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, eps: float, add: bool) -> None:
    rows_1, rows_2, size = x.shape
    if out.numel() == 0:
        return
    columns = power_of_2(size)
    _rms_norm_kernel[(rows_1 * rows_2,)](
        x,
        residual,
        weight,
        out,
        size,
        rows_2,
        x.stride(0),
        x.stride(1),
        eps,
        ADD=add,
        SIZE=columns,
        num_warps=min(8, max(1, columns // 512)),
    )
