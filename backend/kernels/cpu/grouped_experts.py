"""Grouped expert MLPs, compiled for few rows per slot and, in bfloat16, for many; else many rows go to matrix products."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numba import get_num_threads, prange
from torch import Tensor

from backend.kernels.cpu import bfloat16, tiles
from backend.kernels.cpu.bfloat16 import put, rows_times
from backend.kernels.cpu.compiled import ONE, ZERO, as_array, exp, kernel, parallel_kernel, words
from backend.kernels.cpu.linear import matmul_into
from backend.kernels.cpu.panel_layers import mlp_panels, panels_of_slots, pays
from backend.kernels.cpu.panels import TOKENS
from backend.kernels.cpu.tile_layers import mlp_tiles, tiles_pay
from backend.kernels.reference.grouped_experts import grouped_experts_forward as reference

#: Average rows per active slot up to which the compiled kernel is faster than matrix products.
FEW_ROWS = 24
#: Rows of x that meet a weight row together: they stay in the first-level cache while the weights pass.
_CHUNK = 32


def grouped_experts_forward(
    hidden: Tensor,  # [T, M]
    w13: Tensor,  # [P, 2 * I, M], gate rows above up rows
    w2: Tensor,  # [P, M, I]
    slots: Tensor,  # [T, K] int64, -1: skip
    weights: Tensor,  # [T, K] float32
    scales: tuple[Tensor, Tensor] | None = None,  # [P, 2 * I] and [P, M] float32, factors of the rows of w13 and w2
) -> Tensor:
    """Sum over k of weights[t, k] * w2 @ (silu(gate) * up) with the weights of slots[t, k]; returns [T, M].

    float32 sums whatever the type of the weights. Where the processor multiplies bfloat16 and the weights are of that type,
    hidden and the activations are rounded to it, too.
    """
    if scales is not None:  # weights of 8 bits are for GPUs
        return reference(hidden, w13, w2, slots, weights, scales)
    out = torch.empty(hidden.shape)
    # By the slots in use: united experts that no token needs change nothing, not even in the last bit.
    active, span, order = sort_by_slot(slots.contiguous().numpy(), w13.shape[0])
    y, rows = slot_outputs(hidden, w13, w2, active, span, order, slots.shape[1])
    _combine(y, rows, order, weights.contiguous().numpy(), out.numpy())
    return out.to(hidden.dtype)


def slot_outputs(
    hidden: Tensor, w13: Tensor, w2: Tensor, active: np.ndarray, span: np.ndarray, order: np.ndarray, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """What the slots make of their assignments (see sort_by_slot): y [rows, M] and each assignment's row in it [A]."""
    direct = bfloat16.multiplies(w13) and bfloat16.multiplies(w2)
    x = hidden.to(w13.dtype if direct else torch.float32).contiguous()
    if direct:
        first, rows = panels_of_slots(span)
        tiled = tiles.available()
        if (tiles_pay if tiled else pays)(len(order), int(first[-1])):
            multiply = mlp_tiles if tiled else mlp_panels
            return _panels(multiply, x, w13, w2, active, span, order, top_k, first), rows
    few = direct or len(order) <= FEW_ROWS * len(active)
    outputs = _few_rows if few else _many_rows
    return outputs(x, w13, w2, active, span, order, top_k), np.arange(len(order))


def _panels(
    multiply: Callable,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    active: np.ndarray,
    span: np.ndarray,
    order: np.ndarray,
    top_k: int,
    first: np.ndarray,
) -> np.ndarray:
    count, hidden, size = int(first[-1]), w2.shape[1], w2.shape[2]
    panels, act = (torch.empty(count, length // 2, TOKENS, dtype=torch.int32) for length in (hidden, size))
    y = torch.empty(count * TOKENS, hidden).numpy()
    weights = as_array(w13), as_array(w2)
    multiply(words(x), *weights, words(panels), words(act), y, active, span, first, order, top_k, get_num_threads())
    return y


def _many_rows(
    x: Tensor, w13: Tensor, w2: Tensor, active: np.ndarray, span: np.ndarray, order: np.ndarray, top_k: int
) -> np.ndarray:
    """A pair of matrix products for each slot, over its assignments laid end to end, in float32."""
    size = w2.shape[2]
    spans = list(zip(active.tolist(), span[:-1].tolist(), span[1:].tolist(), strict=True))
    rows = x.index_select(0, torch.from_numpy(order // top_k))
    gate_up, y = rows.new_empty(len(order), 2 * size), torch.empty_like(rows)
    for slot, begin, end in spans:
        matmul_into(rows[begin:end], w13[slot], gate_up[begin:end])
    act = F.silu(gate_up[:, :size]).mul_(gate_up[:, size:])
    for slot, begin, end in spans:
        matmul_into(act[begin:end], w2[slot], y[begin:end])
    return y.numpy()


def _few_rows(
    x: Tensor, w13: Tensor, w2: Tensor, active: np.ndarray, span: np.ndarray, order: np.ndarray, top_k: int
) -> np.ndarray:
    # From torch, whose memory begins at cache lines: vectors that lie across two lines load at half the rate.
    rows, act = x.new_empty(len(order), x.shape[1]), x.new_empty(len(order), w2.shape[2])
    y = torch.empty(len(order), x.shape[1]).numpy()
    arrays = (as_array(tensor) for tensor in (x, w13, w2, rows, act))
    _slot_outputs(*arrays, y, active, span, order, top_k, get_num_threads())
    return y


@kernel
def sort_by_slot(slots, num_slots):
    """Counting sort of the assignments [T, K]: active slots [S], their spans [S + 1] and the order of assignments [A].

    `order[span[s]:span[s + 1]]` are the flat indices (t * K + k) that slot `active[s]` serves, ascending.
    """
    flat = slots.reshape(-1)
    counts = np.zeros(num_slots, np.int64)
    for i in range(flat.shape[0]):
        if flat[i] >= 0:
            counts[flat[i]] += 1
    num_active = np.count_nonzero(counts)
    active, span = np.empty(num_active, np.int64), np.zeros(num_active + 1, np.int64)
    place = np.empty(num_slots, np.int64)
    s = 0
    for slot in range(num_slots):
        if counts[slot]:
            active[s], place[slot], span[s + 1] = slot, span[s], span[s] + counts[slot]
            s += 1
    order = np.empty(span[num_active], np.int64)
    for i in range(flat.shape[0]):
        if flat[i] >= 0:
            order[place[flat[i]]] = i
            place[flat[i]] += 1
    return active, span, order


@parallel_kernel
def _slot_outputs(x, w13, w2, rows, act, y, active, span, order, top_k, parts):
    """Fills y [A, M] with the outputs of the assignments in the order of sort_by_slot.

    rows [A, M] and act [A, I] are room for the assignments' inputs and activations, of x's type.

    Every slot's rows of weights are cut into `parts`, one for each thread, so that each gets its share of every slot, however
    unevenly tokens are spread over them, and reads long stretches of memory.
    """
    hidden, size = w2.shape[1], w2.shape[2]
    num_active = active.shape[0]
    for i in range(order.shape[0]):
        rows[i] = x[order[i] // top_k]

    span_of_part = (size + parts - 1) // parts
    for job in prange(parts * num_active):
        part, s = job // num_active, job % num_active
        matrix = w13[active[s]]
        first, last = min(size, part * span_of_part), min(size, (part + 1) * span_of_part)
        a, b = np.empty(_CHUNK, np.float32), np.empty(_CHUNK, np.float32)
        gates, ups = np.empty((_CHUNK, last - first), np.float32), np.empty((_CHUNK, last - first), np.float32)
        for begin in range(span[s], span[s + 1], _CHUNK):
            end = min(begin + _CHUNK, span[s + 1])
            for r in range(first, last):
                rows_times(matrix[r], matrix[size + r], rows, begin, end, a, b)
                for i in range(end - begin):
                    gates[i, r - first] = a[i]
                    ups[i, r - first] = b[i]
            for i in range(end - begin):
                gate, up = gates[i], ups[i]
                for r in range(last - first):
                    put(act, begin + i, first + r, gate[r] / (ONE + exp(-gate[r])) * up[r])

    span_of_part = (hidden + parts - 1) // parts
    for job in prange(parts * num_active):
        part, s = job // num_active, job % num_active
        matrix = w2[active[s]]
        first, last = part * span_of_part, min(hidden, (part + 1) * span_of_part)
        a, b = np.empty(_CHUNK, np.float32), np.empty(_CHUNK, np.float32)
        # In pairs far apart: from two neighbouring rows at once, memory gives less than half its rate.
        half = (last - first + 1) // 2
        for begin in range(span[s], span[s + 1], _CHUNK):
            end = min(begin + _CHUNK, span[s + 1])
            for r in range(first, first + half):
                other = min(r + half, last - 1)
                rows_times(matrix[r], matrix[other], act, begin, end, a, b)
                for i in range(end - begin):
                    y[begin + i, r] = a[i]
                    y[begin + i, other] = b[i]


@parallel_kernel
def _combine(y, rows, order, weights, out):
    """out [T, M] = sum over k of weights[t, k] * y of that assignment; skipped assignments add nothing.

    The assignment order[i] has row rows[i] of y.
    """
    num_tokens, top_k = weights.shape
    place = np.full(num_tokens * top_k, -1, np.int64)
    for i in range(order.shape[0]):
        place[order[i]] = rows[i]
    for t in prange(num_tokens):
        total = out[t]
        total[:] = ZERO
        for k in range(top_k):
            i = place[t * top_k + k]
            if i >= 0:
                weight = weights[t, k]
                for m in range(total.shape[0]):
                    total[m] += weight * y[i, m]
