"""RMSNorm, alone and with the residual addition before it, in one pass over each row."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from backend.kernels import reference
from backend.kernels.cpu.compiled import FEW_NUMBERS, ONE, ZERO, kernel, parallel_kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference, which also serves other types than float32 and rows that are not contiguous."""
    if not _fits(x, weight):
        return reference.rms_norm(x, weight, eps)
    out = torch.empty_like(x)
    rows = x.view(-1, x.shape[-1]), out.view(-1, x.shape[-1])
    norm = _rows if x.numel() <= FEW_NUMBERS else _rows_in_parallel
    norm(rows[0].numpy(), weight.numpy(), np.float32(eps), rows[1].numpy())
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference: adds x [T, M] to `residual` [T, M] in place and returns the norm of the sum."""
    if not _fits(x, residual, weight):
        return reference.add_rms_norm(x, residual, weight, eps)
    out = torch.empty_like(x)
    norm = _added_rows if x.numel() <= FEW_NUMBERS else _added_rows_in_parallel
    norm(x.numpy(), residual.numpy(), weight.numpy(), np.float32(eps), out.numpy())
    return out


def _fits(*tensors: Tensor) -> bool:
    return all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)


# Rows by index and not as slices: those count references, in memory that all threads would write to.


@kernel
def _row(x, t, weight, eps, out):
    """out[t] = the norm of x[t]."""
    total = ZERO
    for m in range(x.shape[1]):
        total += x[t, m] * x[t, m]
    factor = ONE / np.sqrt(total / np.float32(x.shape[1]) + eps)
    for m in range(x.shape[1]):
        out[t, m] = x[t, m] * factor * weight[m]


@kernel
def _added_row(x, t, residual, weight, eps, out):
    for m in range(x.shape[1]):
        residual[t, m] += x[t, m]
    _row(residual, t, weight, eps, out)


@kernel
def _rows(x, weight, eps, out):
    for t in range(x.shape[0]):
        _row(x, t, weight, eps, out)


@parallel_kernel
def _rows_in_parallel(x, weight, eps, out):
    for t in prange(x.shape[0]):
        _row(x, t, weight, eps, out)


@kernel
def _added_rows(x, residual, weight, eps, out):
    for t in range(x.shape[0]):
        _added_row(x, t, residual, weight, eps, out)


@parallel_kernel
def _added_rows_in_parallel(x, residual, weight, eps, out):
    for t in prange(x.shape[0]):
        _added_row(x, t, residual, weight, eps, out)
