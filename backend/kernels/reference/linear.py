"""Dense linear layers, and the matrix product that they share with the experts."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

#: Rows for which MKL multiplies weight @ x.T up to three times faster than x @ weight.T; the result is copied back.
_TRANSPOSED_ROWS = range(6, 64)
#: Up to this many rows a product with 16-bit weights is bound by reading them, and widening them first costs more.
_NARROW_ROWS = 2
#: Weights widened at a time: 2 MiB of float32, which stay in the caches until they are used.
_WIDENED_ELEMENTS = 2**19

_scratch = threading.local()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in], weight [out, in], bias [out] of x's type -> [T, out] of x's type."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    matmul_into(x, weight, out)
    return out if bias is None else out.add_(bias)


def matmul_into(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [n, out] = x [n, in] @ weight [out, in].T; on a CPU a weight may be 16-bit while x and out are float32.

    Processors without 16-bit matrix instructions multiply such weights several times slower than float32 ones: there they
    are widened piece by piece.
    """
    if weight.dtype == x.dtype:
        _multiply(x, weight, out)
    elif x.shape[0] <= _NARROW_ROWS or (weight.dtype == torch.bfloat16 and _has_bfloat16_units()):
        out.copy_(torch.mm(x.to(weight.dtype), weight.t()))
    else:
        step = max(1, _WIDENED_ELEMENTS // weight.shape[1])
        buffer = _widening_buffer(min(step, weight.shape[0]) * weight.shape[1])
        for start in range(0, weight.shape[0], step):
            piece = weight[start : start + step]
            widened = buffer[: piece.numel()].view(piece.shape).copy_(piece)
            _multiply(x, widened, out[:, start : start + step])


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    if x.device.type == "cpu" and x.shape[0] in _TRANSPOSED_ROWS:
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
