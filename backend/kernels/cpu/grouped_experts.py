"""Grouped expert MLPs for few rows per slot, compiled; many rows go to matrix products."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numba import prange
from torch import Tensor

from backend.kernels.cpu import bfloat16
from backend.kernels.cpu.bfloat16 import put, rows_times
from backend.kernels.cpu.compiled import ONE, ZERO, as_array, exp, kernel, parallel_kernel
from backend.kernels.cpu.linear import matmul_into

#: Average rows per slot up to which reading the weights costs more than computing with them.
FEW_ROWS = 24
#: Rows of weights that a thread takes at a time.
_TILE = 32


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
    # By the slots in use: united experts that no token needs change nothing, not even in the last bit.
    active, _, order = sort_by_slot(slots.contiguous().numpy(), w13.shape[0])
    few = len(order) <= FEW_ROWS * len(active)
    (_few_rows if few else _many_rows)(hidden.float().contiguous(), w13, w2, slots.contiguous(), weights, out)
    return out.to(hidden.dtype)


def _many_rows(x: Tensor, w13: Tensor, w2: Tensor, slots: Tensor, weights: Tensor, out: Tensor) -> None:
    """A pair of matrix products for each slot, over its assignments laid end to end."""
    size, top_k = w2.shape[2], slots.shape[1]
    active, span, order = sort_by_slot(slots.numpy(), w13.shape[0])
    rows = x.index_select(0, torch.from_numpy(order // top_k))
    gate_up = torch.empty(len(order), 2 * size)
    y = torch.empty_like(rows)
    spans = list(zip(active.tolist(), span[:-1].tolist(), span[1:].tolist(), strict=True))
    for slot, begin, end in spans:
        matmul_into(rows[begin:end], w13[slot], gate_up[begin:end])
    act = F.silu(gate_up[:, :size]).mul_(gate_up[:, size:])
    for slot, begin, end in spans:
        matmul_into(act[begin:end], w2[slot], y[begin:end])
    _combine(y.numpy(), order, weights.contiguous().numpy(), out.numpy())


def _few_rows(x: Tensor, w13: Tensor, w2: Tensor, slots: Tensor, weights: Tensor, out: Tensor) -> None:
    if bfloat16.multiplies(w13) and bfloat16.multiplies(w2):
        x = x.to(torch.bfloat16)
    y, order = _slot_outputs(as_array(x), as_array(w13), as_array(w2), slots.numpy())
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
def _slot_outputs(x, w13, w2, slots):
    """Outputs [A, M] of the assignments in order of their slots, and that order [A].

    Work is cut into tiles of weight rows, all slots' first tiles first: each thread then gets its share of every slot,
    however unevenly tokens are spread over them.
    """
    top_k = slots.shape[1]
    hidden, size = w2.shape[1], w2.shape[2]
    active, span, order = sort_by_slot(slots, w13.shape[0])
    num_active, num_rows = active.shape[0], order.shape[0]
    rows = np.empty((num_rows, hidden), x.dtype)
    for i in range(num_rows):
        rows[i] = x[order[i] // top_k]

    act = np.empty((num_rows, size), x.dtype)
    num_tiles = (size + _TILE - 1) // _TILE
    for job in prange(num_tiles * num_active):
        tile, s = job // num_active, job % num_active
        matrix, begin, end = w13[active[s]], span[s], span[s + 1]
        gate, up = np.empty(end - begin, np.float32), np.empty(end - begin, np.float32)
        for r in range(tile * _TILE, min(size, (tile + 1) * _TILE)):
            rows_times(matrix[r], matrix[size + r], rows, begin, end, gate, up)
            for i in range(end - begin):
                put(act, begin + i, r, gate[i] / (ONE + exp(-gate[i])) * up[i])

    y = np.empty((num_rows, hidden), np.float32)
    num_tiles = (hidden + _TILE - 1) // _TILE
    for job in prange(num_tiles * num_active):
        tile, s = job // num_active, job % num_active
        matrix, begin, end = w2[active[s]], span[s], span[s + 1]
        a, b = np.empty(end - begin, np.float32), np.empty(end - begin, np.float32)
        last = min(hidden, (tile + 1) * _TILE)
        for r in range(tile * _TILE, last, 2):
            other = min(r + 1, last - 1)
            rows_times(matrix[r], matrix[other], act, begin, end, a, b)
            for i in range(end - begin):
                y[begin + i, r] = a[i]
                y[begin + i, other] = b[i]
    return y, order


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
                    total[m] += weight * y[i, m]
