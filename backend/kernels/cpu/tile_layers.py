"""`panel_layers` with the processor's matrix unit: the same panels, rooms and results, by `tiles` of weight rows."""

from __future__ import annotations

import numpy as np
from numba import prange

from backend.kernels.cpu.compiled import kernel, parallel_kernel
from backend.kernels.cpu.panel_layers import activate, fill_panel
from backend.kernels.cpu.panels import TOKENS
from backend.kernels.cpu.tiles import (
    ROWS,
    tiles_off,
    tiles_on,
    tiles_to_lanes,
    tiles_to_lanes_of_two,
    tiles_to_rows,
    tiles_to_rows_of_two,
)

#: Rows of w2 or of a matrix are taken so many at a time, and rows of w13 half as many: those of gates beside those of ups.
ROWS_AT_ONCE = 2 * ROWS
#: Panels that stay in the second-level cache while all weights of a part pass, each of which is read once for all of them.
_PANELS_AT_ONCE = 8
#: Tokens in a panel for which its product takes about as long as dot products with each: reading the weights counts then.
_FEW_TOKENS = 3


def tiles_pay(tokens: int, panels: int) -> bool:
    """Whether tokens in so many panels are multiplied faster than one by one."""
    return tokens > _FEW_TOKENS * panels


@parallel_kernel
def mlp_tiles(x, w13, w2, panels, act, y, active, span, first, order, top_k, parts):
    """As `mlp_panels`."""
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
        config, sums = np.empty(64, np.uint8), np.empty(2 * ROWS * 2 * TOKENS, np.float32)
        tiles_on(config)
        for begin in range(first[s], first[s + 1], _PANELS_AT_ONCE):
            end = min(begin + _PANELS_AT_ONCE, first[s + 1])
            for r in range(first_row, last_row, ROWS):
                n = begin
                while n + 2 <= end:
                    tiles_to_lanes_of_two(matrix, r, size + r, panels, n, sums)
                    activate(sums[: ROWS * 2 * TOKENS], sums[ROWS * 2 * TOKENS :], 2, act, n, r)
                    n += 2
                if n < end:
                    tiles_to_lanes(matrix, r, size + r, panels, n, sums)
                    activate(sums[: ROWS * TOKENS], sums[ROWS * TOKENS : 2 * ROWS * TOKENS], 1, act, n, r)
        tiles_off(config)

    rows_of_part = (hidden // ROWS_AT_ONCE + parts - 1) // parts * ROWS_AT_ONCE
    for job in prange(parts * num_active):
        part, s = job // num_active, job % num_active
        matrix = w2[active[s]]
        first_row, last_row = min(hidden, part * rows_of_part), min(hidden, (part + 1) * rows_of_part)
        _rows_times_panels(matrix, first_row, last_row, act, first[s], first[s + 1], y)


@kernel
def _rows_times_panels(matrix, first_row, last_row, panels, first, last, y):
    """y[16 n + token, row] = matrix rows first_row … last_row - 1 times panels first … last - 1."""
    config = np.empty(64, np.uint8)
    tiles_on(config)
    for begin in range(first, last, _PANELS_AT_ONCE):
        end = min(begin + _PANELS_AT_ONCE, last)
        for r in range(first_row, last_row, ROWS_AT_ONCE):
            n = begin
            while n + 2 <= end:
                tiles_to_rows_of_two(matrix, r, panels, n, y)
                n += 2
            if n < end:
                tiles_to_rows(matrix, r, panels, n, y)
    tiles_off(config)


@parallel_kernel
def matrix_tiles(x, weight, panels, y, parts):
    """As `matrix_panels`; the weight's rows must be a multiple of ROWS_AT_ONCE."""
    num_rows = weight.shape[0]
    order = np.arange(x.shape[0])
    for n in prange(panels.shape[0]):
        fill_panel(panels, n, x, order, n * TOKENS, min((n + 1) * TOKENS, x.shape[0]), 1)
    rows_of_part = (num_rows // ROWS_AT_ONCE + parts - 1) // parts * ROWS_AT_ONCE
    for part in prange(parts):
        first_row, last_row = min(num_rows, part * rows_of_part), min(num_rows, (part + 1) * rows_of_part)
        _rows_times_panels(weight, first_row, last_row, panels, 0, panels.shape[0], y)
