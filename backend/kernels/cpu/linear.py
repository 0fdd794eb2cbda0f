"""Dense linear layers, and the matrix product that they share with the experts.

Few rows are bound by reading the weights: 16-bit ones are read where they are, by a compiled kernel. Many rows are bound by
arithmetic and go to torch's matrix products, in the type that this processor multiplies fast.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from numba import prange
from torch import Tensor

from backend.kernels.cpu import bfloat16
from backend.kernels.cpu.bfloat16 import rows_times
from backend.kernels.cpu.compiled import as_array, parallel_kernel

#: Rows up to which the compiled kernel beats widening 16-bit weights for a float32 product.
FEW_ROWS = 48
#: Rows for which MKL multiplies weight @ x.T up to three times faster than x @ weight.T; the result is copied back.
_TRANSPOSED_ROWS = range(6, 64)
#: Weights widened at a time: 2 MiB of float32, which stay in the caches until they are used.
_WIDENED_ELEMENTS = 2**19
#: Rows of weights that a thread takes at a time.
_TILE = 32

_scratch = threading.local()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in], weight [out, in] of any floating type, bias [out] of x's type -> [T, out] of x's type."""
    out = torch.empty(x.shape[0], weight.shape[0])
    matmul_into(x.float(), weight, out)
    out = out.to(x.dtype)
    return out if bias is None else out.add_(bias)


def matmul_into(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [n, out] = x [n, in] @ weight [out, in].T; x and out are float32, the weight of any floating type."""
    if weight.dtype == torch.float32:
        _multiply(x, weight, out)
    elif x.shape[0] <= FEW_ROWS:
        x = x.contiguous()
        _few_rows(as_array(x.to(weight.dtype) if bfloat16.multiplies(weight) else x), as_array(weight), out.numpy())
    elif weight.dtype == torch.bfloat16 and _has_bfloat16_units():
        out.copy_(torch.mm(x.to(weight.dtype), weight.t()))
    else:
        step = max(1, _WIDENED_ELEMENTS // weight.shape[1])
        buffer = _widening_buffer(min(step, weight.shape[0]) * weight.shape[1])
        for start in range(0, weight.shape[0], step):
            piece = weight[start : start + step]
            widened = buffer[: piece.numel()].view(piece.shape).copy_(piece)
            _multiply(x, widened, out[:, start : start + step])


@parallel_kernel
def _few_rows(x, weight, out):
    num_rows, num_out = out.shape
    for tile in prange((num_out + _TILE - 1) // _TILE):
        a, b = np.empty(num_rows, np.float32), np.empty(num_rows, np.float32)
        last = min(num_out, (tile + 1) * _TILE)
        for r in range(tile * _TILE, last, 2):
            other = min(r + 1, last - 1)
            rows_times(weight[r], weight[other], x, 0, num_rows, a, b)
            for i in range(num_rows):
                out[i, r] = a[i]
                out[i, other] = b[i]


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    if x.shape[0] in _TRANSPOSED_ROWS:
        out.copy_(torch.mm(weight, x.t()).t())
    else:
        torch.mm(x, weight.t(), out=out)


def _widening_buffer(elements: int) -> Tensor:
    """Float32 scratch of this thread, kept between calls: fresh memory costs page faults each time."""
    buffer: Tensor | None = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < elements:
        buffer = _scratch.buffer = torch.empty(elements)
    return buffer


def _has_bfloat16_units() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
