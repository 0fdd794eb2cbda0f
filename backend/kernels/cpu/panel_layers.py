"""Gated MLPs for many tokens per slot: experts, or one dense MLP as the only slot, over panels of sixteen tokens.

Activations go from the first product to the second as the panels that it takes, in bfloat16.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from backend.kernels.cpu.bfloat16 import narrow_two
from backend.kernels.cpu.compiled import ONE, exp, kernel, parallel_kernel
from backend.kernels.cpu.panels import (
    ROWS,
    TOKENS,
    panel_to_lanes,
    panel_to_rows,
    two_panels_to_lanes,
    two_panels_to_rows,
)

#: A product with a panel takes about this share of the time of dot products with sixteen tokens, however many tokens it has.
_PANEL_TIME = 0.75


def pays(tokens: int, panels: int) -> bool:
    """Whether tokens in so many panels are multiplied faster than one by one."""
    return tokens > _PANEL_TIME * TOKENS * panels


@kernel
def panels_of_slots(span):
    """Where each slot's panels begin, and each assignment's row in them, for spans [S + 1]; each slot has its own panels."""
    first = np.zeros(span.shape[0], np.int64)
    rows = np.empty(span[-1], np.int64)
    for s in range(span.shape[0] - 1):
        first[s + 1] = first[s] + (span[s + 1] - span[s] + TOKENS - 1) // TOKENS
        for i in range(span[s], span[s + 1]):
            rows[i] = first[s] * TOKENS + i - span[s]
    return first, rows


@parallel_kernel
def mlp_panels(x, w13, w2, panels, act, y, active, span, first, order, top_k, parts):
    """Fills y [16 N, M] with the outputs of the assignments of slot `active[s]` from row 16 * first[s] on.

    x [T, M / 2] are the tokens' bfloat16 numbers, in pairs; panels [N, M / 2, 16] and act [N, I / 2, 16] are room for inputs and
    activations of N panels. Assignments as from `sort_by_slot`; rows of y between the slots' are undefined.

    Every slot's rows of weights are cut into `parts`, one for each thread.
    """
    hidden, size = w2.shape[1], w2.shape[2]
    num_active = active.shape[0]
    for s in prange(num_active):
        for n in range(first[s], first[s + 1]):
            begin = span[s] + (n - first[s]) * TOKENS
            fill_panel(panels, n, x, order, begin, min(begin + TOKENS, span[s + 1]), top_k)

    rows_of_part = (size // ROWS + parts - 1) // parts * ROWS
    for job in prange(parts * num_active):
        part, s = job // num_active, job % num_active
        matrix = w13[active[s]]
        first_row, last_row = min(size, part * rows_of_part), min(size, (part + 1) * rows_of_part)
        gates, ups = np.empty(2 * ROWS * TOKENS, np.float32), np.empty(2 * ROWS * TOKENS, np.float32)
        n = first[s]
        while n + 2 <= first[s + 1]:
            for r in range(first_row, last_row, ROWS):
                two_panels_to_lanes(matrix, r, panels, n, gates)
                two_panels_to_lanes(matrix, size + r, panels, n, ups)
                activate(gates, ups, 2, act, n, r)
            n += 2
        if n < first[s + 1]:
            for r in range(first_row, last_row, ROWS):
                panel_to_lanes(matrix, r, panels, n, gates)
                panel_to_lanes(matrix, size + r, panels, n, ups)
                activate(gates[: ROWS * TOKENS], ups[: ROWS * TOKENS], 1, act, n, r)

    rows_of_part = (hidden // ROWS + parts - 1) // parts * ROWS
    for job in prange(parts * num_active):
        part, s = job // num_active, job % num_active
        matrix = w2[active[s]]
        first_row, last_row = min(hidden, part * rows_of_part), min(hidden, (part + 1) * rows_of_part)
        n = first[s]
        while n + 2 <= first[s + 1]:
            for r in range(first_row, last_row, ROWS):
                two_panels_to_rows(matrix, r, act, n, y)
            n += 2
        if n < first[s + 1]:
            for r in range(first_row, last_row, ROWS):
                panel_to_rows(matrix, r, act, n, y)


@kernel
def fill_panel(panels, n, x, order, begin, end, top_k):
    """panels[n] [M / 2, 16] = the tokens of assignments begin … end - 1, those that are missing as copies of the last."""
    tokens = np.empty(TOKENS, np.int64)
    for lane in range(TOKENS):
        tokens[lane] = order[min(begin + lane, end - 1)] // top_k
    for k in range(panels.shape[1]):
        for lane in range(TOKENS):
            panels[n, k, lane] = x[tokens[lane], k]


@kernel
def activate(gates, ups, count, act, n, first_row):
    """silu(gate) * up of rows `first_row` … and of `count` panels n … into act [N, I / 2, 16], in pairs of rows.

    gates and ups [rows * count * 16], by row, panel and token; gates are overwritten.
    """
    for i in range(gates.shape[0]):
        gates[i] = gates[i] / (ONE + exp(-gates[i])) * ups[i]
    for pair in range(gates.shape[0] // (2 * count * TOKENS)):
        for j in range(count):
            low = (2 * pair * count + j) * TOKENS
            high = low + count * TOKENS
            for lane in range(TOKENS):
                act[n + j, first_row // 2 + pair, lane] = narrow_two(gates[low + lane], gates[high + lane])


@parallel_kernel
def matrix_panels(x, weight, panels, y, parts):
    """Fills y [16 N, out] with weight [out, in] @ x for the tokens of x [T, in / 2], in pairs; panels [N, in / 2, 16] is room."""
    num_rows = weight.shape[0]
    order = np.arange(x.shape[0])
    for n in prange(panels.shape[0]):
        fill_panel(panels, n, x, order, n * TOKENS, min((n + 1) * TOKENS, x.shape[0]), 1)
    rows_of_part = (num_rows // ROWS + parts - 1) // parts * ROWS
    for part in prange(parts):
        first_row, last_row = min(num_rows, part * rows_of_part), min(num_rows, (part + 1) * rows_of_part)
        n = 0
        while n + 2 <= panels.shape[0]:
            for r in range(first_row, last_row, ROWS):
                two_panels_to_rows(weight, r, panels, n, y)
            n += 2
        if n < panels.shape[0]:
            for r in range(first_row, last_row, ROWS):
                panel_to_rows(weight, r, panels, n, y)
