"""Dense linear layers, and the matrix product that they share with the experts.

Few rows are bound by reading the weights: 16-bit ones are read where they are, by a compiled kernel. Many rows are bound by
arithmetic and go to torch's matrix products, in the type that this processor multiplies fast; on a processor with a matrix
unit a kernel of our own is faster for all but the fewest rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numba import get_num_threads, prange
from torch import Tensor

from backend.kernels.cpu import bfloat16, tiles
from backend.kernels.cpu.bfloat16 import rows_times
from backend.kernels.cpu.compiled import as_array, parallel_kernel, words
from backend.kernels.cpu.panel_layers import matrix_panels, pays
from backend.kernels.cpu.panels import ROWS, TOKENS
from backend.kernels.cpu.tile_layers import ROWS_AT_ONCE, matrix_tiles, tiles_pay

#: Rows up to which the compiled kernel beats widening 16-bit weights for a float32 product.
FEW_ROWS = 48
#: Rows for which MKL multiplies weight @ x.T up to three times faster than x @ weight.T; the result is copied back.
_TRANSPOSED_ROWS = range(6, 64)
#: Rows are filled up with zeros to multiples of this before oneDNN multiplies them. It compiles code for each number of rows
#: that it meets and keeps some of it for good, a quarter of a MiB each time, whatever its cache of shapes may hold.
_ROWS_STEP = 32
#: Weights widened at a time: 2 MiB of float32, which stay in the caches until they are used.
_WIDENED_ELEMENTS = 2**19

_scratch = threading.local()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in], weight [out, in] of any floating type, bias [out] of x's type -> [T, out] of x's type."""
    panels_kernel = _panels_kernel(x, weight)
    if panels_kernel is not None:
        out = _panels(x, weight, panels_kernel)
    else:
        out = torch.empty(x.shape[0], weight.shape[0])
        matmul_into(x.float(), weight, out)
    out = out.to(x.dtype)
    return out if bias is None else out.add_(bias)


def output_logits(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x [R, in], weight [V, in] -> [R, V] float32; written to `out` if given."""
    logits = linear(x, weight)
    return logits.float() if out is None else out.copy_(logits)


def float32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """As `linear` without a bias, but x is never rounded to the weights' type: for outputs that decide between alternatives."""
    if weight.dtype == torch.float32 or len(x) > FEW_ROWS:
        return F.linear(x.float(), weight.float())
    out = torch.empty(len(x), weight.shape[0])
    _few_rows(as_array(x.float().contiguous()), as_array(weight), out.numpy(), get_num_threads())
    return out


def matmul_into(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [n, out] = x [n, in] @ weight [out, in].T; x and out are float32, the weight of any floating type."""
    if weight.dtype == torch.float32:
        _multiply(x, weight, out)
    elif x.shape[0] <= FEW_ROWS:
        x = x.contiguous()
        x = x.to(weight.dtype) if bfloat16.multiplies(weight) else x
        _few_rows(as_array(x), as_array(weight), out.numpy(), get_num_threads())
    elif weight.dtype == torch.bfloat16 and _has_bfloat16_units():
        out.copy_(torch.mm(_filled_up(x, weight.dtype), weight.t())[: len(out)])
    else:
        step = max(1, _WIDENED_ELEMENTS // weight.shape[1])
        buffer = _widening_buffer(min(step, weight.shape[0]) * weight.shape[1])
        for start in range(0, weight.shape[0], step):
            piece = weight[start : start + step]
            widened = buffer[: piece.numel()].view(piece.shape).copy_(piece)
            _multiply(x, widened, out[:, start : start + step])


def _panels_kernel(x: Tensor, weight: Tensor) -> Callable | None:
    """What multiplies these by panels, if that is the fastest way."""
    rows, panels = len(x), -(-len(x) // TOKENS)
    if not bfloat16.multiplies(weight):
        return None
    if tiles.available() and weight.shape[0] % ROWS_AT_ONCE == 0:
        return matrix_tiles if tiles_pay(rows, panels) else None
    # Enough rows for panels, but not enough for a library's matrix product.
    few = rows <= FEW_ROWS and weight.shape[0] % ROWS == 0
    return matrix_panels if few and pays(rows, panels) else None


def _panels(x: Tensor, weight: Tensor, multiply: Callable) -> Tensor:
    count = -(-len(x) // TOKENS)
    panels = torch.empty(count, weight.shape[1] // 2, TOKENS, dtype=torch.int32)
    y = torch.empty(count * TOKENS, weight.shape[0])
    x = x.to(weight.dtype).contiguous()
    multiply(words(x), as_array(weight), words(panels), y.numpy(), get_num_threads())
    return y[: len(x)]


@parallel_kernel
def _few_rows(x, weight, out, parts):
    num_rows, num_out = out.shape
    span = (num_out + parts - 1) // parts
    for part in prange(parts):
        a, b = np.empty(num_rows, np.float32), np.empty(num_rows, np.float32)
        first, last = part * span, min(num_out, (part + 1) * span)
        # In pairs far apart: from two neighbouring rows at once, memory gives less than half its rate.
        half = (last - first + 1) // 2
        for r in range(first, first + half):
            other = min(r + half, last - 1)
            rows_times(weight[r], weight[other], x, 0, num_rows, a, b)
            for i in range(num_rows):
                out[i, r] = a[i]
                out[i, other] = b[i]


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    if x.shape[0] in _TRANSPOSED_ROWS:
        out.copy_(torch.mm(weight, x.t()).t())
    else:
        torch.mm(x, weight.t(), out=out)


def _filled_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [n, in] in this type, with rows of zeros up to the next multiple of _ROWS_STEP."""
    filled = torch.empty(-(-len(x) // _ROWS_STEP) * _ROWS_STEP, x.shape[1], dtype=dtype)
    filled[: len(x)].copy_(x)
    filled[len(x) :].zero_()
    return filled


def _widening_buffer(elements: int) -> Tensor:
    """Float32 scratch of this thread, kept between calls: fresh memory costs page faults each time."""
    buffer: Tensor | None = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < elements:
        buffer = _scratch.buffer = torch.empty(elements)
    return buffer


def _has_bfloat16_units() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
