"""Grouped expert MLPs for few rows per slot, compiled; many rows go to matrix products."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numba import get_num_threads, prange
from torch import Tensor

from backend.kernels.cpu import bfloat16
from backend.kernels.cpu.bfloat16 import put, rows_times
from backend.kernels.cpu.compiled import ONE, ZERO, as_array, exp, kernel, parallel_kernel, widen
from backend.kernels.cpu.linear import matmul_into

#: Average rows per slot up to which the compiled kernel is faster than matrix products; with bfloat16 units it stays so longer.
FEW_ROWS, FEW_BFLOAT16_ROWS = 24, 48
#: Rows of x that meet a weight row together: they stay in the first-level cache while the weights pass.
_CHUNK = 32


def grouped_experts_forward(
    hidden: Tensor,  # [T, M]
    w13: Tensor,  # [P, 2 * I, M], gate rows above up rows
    w2: Tensor,  # [P, M, I]
    slots: Tensor,  # [T, K] int64, -1: skip
    weights: Tensor,  # [T, K] float32
) -> Tensor:
    """Sum over k of weights[t, k] * w2 @ (silu(gate) * up) with the weights of slots[t, k]; returns [T, M].

    float32 sums whatever the type of the weights. Where the processor multiplies bfloat16 and the weights are of that type,
    hidden and the activations are rounded to it, too.
    """
    out = torch.empty(hidden.shape)
    most = FEW_BFLOAT16_ROWS if bfloat16.multiplies(w13) else FEW_ROWS
    few = slots.numel() <= most * w13.shape[0]
    (_few_rows if few else _many_rows)(hidden.float().contiguous(), w13, w2, slots.contiguous(), weights, out)
    return out.to(hidden.dtype)


def _many_rows(x: Tensor, w13: Tensor, w2: Tensor, slots: Tensor, weights: Tensor, out: Tensor) -> None:
    """A pair of matrix products for each slot, over its assignments laid end to end."""
    size, top_k = w2.shape[2], slots.shape[1]
    active, span, order = sort_by_slot(slots.numpy(), w13.shape[0])
    spans = list(zip(active.tolist(), span[:-1].tolist(), span[1:].tolist(), strict=True))
    # Where the processor multiplies the weights' type, everything between the products is of that type, too.
    direct = bfloat16.multiplies(w13) and bfloat16.multiplies(w2)
    rows = (x.to(w13.dtype) if direct else x).index_select(0, torch.from_numpy(order // top_k))
    gate_up, y = rows.new_empty(len(order), 2 * size), torch.empty_like(rows)
    multiply = _multiply if direct else matmul_into
    for slot, begin, end in spans:
        multiply(rows[begin:end], w13[slot], gate_up[begin:end])
    act = F.silu(gate_up[:, :size]).mul_(gate_up[:, size:])
    for slot, begin, end in spans:
        multiply(act[begin:end], w2[slot], y[begin:end])
    _combine(as_array(y), order, weights.contiguous().numpy(), out.numpy())


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    torch.mm(x, weight.t(), out=out)


def _few_rows(x: Tensor, w13: Tensor, w2: Tensor, slots: Tensor, weights: Tensor, out: Tensor) -> None:
    if bfloat16.multiplies(w13) and bfloat16.multiplies(w2):
        x = x.to(torch.bfloat16)
    # From torch, whose memory begins at cache lines: vectors that lie across two lines load at half the rate.
    assignments, size = slots.numel(), w2.shape[2]
    rows, act = x.new_empty(assignments, x.shape[1]), x.new_empty(assignments, size)
    y = torch.empty(assignments, x.shape[1]).numpy()
    order = _slot_outputs(
        as_array(x), as_array(w13), as_array(w2), slots.numpy(), get_num_threads(), as_array(rows), as_array(act), y
    )
    _combine(y, order, weights.contiguous().numpy(), out.numpy())


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
def _slot_outputs(x, w13, w2, slots, parts, rows, act, y):
    """Fills y [T * K, M] with the outputs of the assignments in order of their slots; returns that order [A].

    rows [T * K, M] and act [T * K, I] are room for the assignments' inputs and activations, of x's type.

    Every slot's rows of weights are cut into `parts`, one for each thread, so that each gets its share of every slot, however
    unevenly tokens are spread over them, and reads long stretches of memory.
    """
    top_k = slots.shape[1]
    hidden, size = w2.shape[1], w2.shape[2]
    active, span, order = sort_by_slot(slots, w13.shape[0])
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
    return order


@parallel_kernel
def _combine(y, order, weights, out):
    """out [T, M] = sum over k of weights[t, k] * y of that assignment; skipped assignments add nothing."""
    num_tokens, top_k = weights.shape
    place = np.full(num_tokens * top_k, -1, np.int64)
    for i in range(order.shape[0]):
        place[order[i]] = i
    for t in prange(num_tokens):
        total = out[t]
        total[:] = ZERO
        for k in range(top_k):
            i = place[t * top_k + k]
            if i >= 0:
                weight = weights[t, k]
                for m in range(total.shape[0]):
                    total[m] += weight * widen(y[i, m])
