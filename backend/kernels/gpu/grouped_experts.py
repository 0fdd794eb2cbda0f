"""Grouped expert MLPs over weight slots.

Four launches: sort the assignments by slot, gate and up with the activation, down with the gate weight, sum over k. A decode
step has few rows per slot and is bound by reading weights: a program owns some columns of one slot, reads them once and
multiplies them with all rows of the slot. A prefill step is bound by multiplying: a program owns a tile of rows of one slot
and some columns. Sizes of grids and buffers depend on shapes only, and sums are made in a fixed order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from backend.kernels.gpu.align import align
from backend.kernels.gpu.expert_tile import assignments_at, product, scale_columns, store_tile, tile_of, two_products
from backend.kernels.tuning import LEAST_ROWS, ExpertShape, TileConfig, expert_tiles

_COMBINE_COLUMNS = 1024
#: Row tiles whose programs run side by side on the same columns, so that weights are read from memory once (prefill).
_TILE_GROUP = 8


def grouped_experts_forward(
    hidden: Tensor,  # [T, M]
    w13: Tensor,  # [P, 2 * I, M] of any floating type, gate rows above up rows
    w2: Tensor,  # [P, M, I]
    slots: Tensor,  # [T, K] int64, -1: skip
    weights: Tensor,  # [T, K] float32
    scales: tuple[Tensor, Tensor] | None = None,  # [P, 2 * I] and [P, M] float32, factors of the rows of w13 and w2
) -> Tensor:
    """Sum over k of weights[t, k] * w2 @ (silu(gate) * up) with the weights of slots[t, k]; returns [T, M].

    Weights of 8 bits are widened in registers. float32 sums; a prefill step rounds each weighted expert output to hidden's type, a decode step does not.
    """
    phase, tiles = phase_and_tiles(hidden, w2, slots)
    return run_with_tiles(hidden, w13, w2, slots, weights, phase, tiles, scales)


def phase_and_tiles(hidden: Tensor, w2: Tensor, slots: Tensor) -> tuple[str, dict[str, TileConfig]]:
    """How `weighted_outputs` is best computed."""
    (num_tokens, hidden_size), (num_slots, _, size), top_k = hidden.shape, w2.shape, slots.shape[1]
    dtype = str(hidden.dtype).removeprefix("torch.")
    shape = ExpertShape(num_slots, hidden_size, size, num_tokens, top_k, dtype, _device_name(hidden.device))
    return shape.phase, expert_tiles(shape)


@lru_cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def run_with_tiles(
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    slots: Tensor,
    weights: Tensor,
    phase: str,
    tiles: dict[str, TileConfig],
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`grouped_experts_forward` in the given phase with the given block sizes."""
    out = torch.empty_like(hidden)
    num_tokens, hidden_size = hidden.shape
    if num_tokens == 0:
        return out
    partial = weighted_outputs(hidden, w13, w2, slots, weights, phase, tiles, scales)
    _combine_kernel[(num_tokens, triton.cdiv(hidden_size, _COMBINE_COLUMNS))](
        partial, slots.contiguous(), out, hidden_size, TOP_K=slots.shape[1], COLUMNS=_COMBINE_COLUMNS, num_warps=4
    )
    return out


def weighted_outputs(
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    slots: Tensor,
    weights: Tensor,
    phase: str,
    tiles: dict[str, TileConfig],
    scales: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """[T * K, M] the weighted output of each assignment's slot; rows of skipped assignments are undefined."""
    (num_tokens, hidden_size), (num_slots, _, size), top_k = hidden.shape, w2.shape, slots.shape[1]
    hidden, slots, weights = hidden.contiguous(), slots.contiguous(), weights.contiguous()
    by_slot = phase == "decode"
    gate_up, down = tiles["gate_up"], tiles["down"]
    if not by_slot and gate_up.rows != down.rows:
        raise ValueError(f"prefill tiles must have the same number of rows, got {gate_up.rows} and {down.rows}")
    order, begins, counts, tile_slots = align(slots, num_slots, 1 if by_slot else gate_up.rows)
    act = hidden.new_empty(num_tokens * top_k, size)
    partial = hidden.new_empty(num_tokens * top_k, hidden_size, dtype=torch.float32 if by_slot else hidden.dtype)
    lists = (order, begins, counts, tile_slots)

    def launch(
        kernel, x: Tensor, w: Tensor, out: Tensor, tile: TileConfig, scale: Tensor, *gate: Tensor, rows_per_input: int
    ) -> None:
        columns, depth = out.shape[1], x.shape[1]
        blocks = triton.cdiv(columns, tile.columns)
        grid = (blocks, num_slots) if by_slot else (blocks * len(tile_slots),)
        kernel[grid](
            x,
            w,
            out,
            scale,
            *gate,
            *lists,
            len(tile_slots),
            columns,
            depth,
            ROWS_PER_INPUT=rows_per_input,
            BY_SLOT=by_slot,
            FEW_ROWS=LEAST_ROWS,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            EVEN=depth % tile.depth == 0 and columns % tile.columns == 0,
            GROUP=_TILE_GROUP,
            SCALED=scales is not None,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    scale_13, scale_2 = (weights, weights) if scales is None else scales
    launch(_gate_up_kernel, hidden, w13, act, gate_up, scale_13, rows_per_input=top_k)
    launch(_down_kernel, act, w2, partial, down, scale_2, weights, rows_per_input=1)
    return partial


@triton.jit
def _gate_up_tile(
    x_ptr,
    w_ptr,
    out_ptr,
    scale_ptr,
    order_ptr,
    first,
    end,
    slot,
    block,
    size,
    depth_size,
    ROWS_PER_INPUT: tl.constexpr,
    SWAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    SCALED: tl.constexpr,
):
    """silu(gate) * up of up to ROWS assignments of one slot in one block of columns."""
    assignment, row_mask = assignments_at(order_ptr, first, end, ROWS)
    columns = block * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
    gate, up = two_products(
        x_ptr,
        w_ptr + slot.to(tl.int64) * 2 * size * depth_size,
        assignment // ROWS_PER_INPUT,
        row_mask,
        columns,
        columns < size,
        tl.cast(size, tl.int64),
        depth_size,
        SWAP,
        ROWS,
        COLUMNS,
        DEPTH,
        EVEN,
    )
    if SCALED:
        scales = scale_ptr + slot.to(tl.int64) * 2 * size
        gate = scale_columns(gate, scales, columns, columns < size, SWAP)
        up = scale_columns(up, scales + size, columns, columns < size, SWAP)
    value = gate / (1.0 + tl.exp(-gate)) * up
    store_tile(out_ptr, value, assignment, row_mask, columns, columns < size, size, SWAP)


@triton.jit(do_not_specialize=["num_tiles"])
def _gate_up_kernel(
    x_ptr,  # [T, M]
    w_ptr,  # [P, 2 * I, M]
    out_ptr,  # [T * K, I], rows of skipped assignments are left alone
    scale_ptr,  # [P, 2 * I] float32, read with SCALED
    order_ptr,
    begins_ptr,
    counts_ptr,
    tile_slots_ptr,
    num_tiles,
    size,
    depth_size,
    ROWS_PER_INPUT: tl.constexpr,
    BY_SLOT: tl.constexpr,
    FEW_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Grid (column blocks, P) with BY_SLOT, else (column blocks * row tiles,)."""
    if BY_SLOT:
        block = tl.program_id(0)
        slot = tl.program_id(1)
        begin = tl.load(begins_ptr + slot)
        end = begin + tl.load(counts_ptr + slot)
        if end - begin > FEW_ROWS:
            for first in range(begin, end, ROWS):
                _gate_up_tile(
                    x_ptr, w_ptr, out_ptr, scale_ptr, order_ptr, first, end, slot, block, size, depth_size,
                    ROWS_PER_INPUT, True, ROWS, COLUMNS, DEPTH, EVEN, SCALED,
                )  # fmt: skip
        elif end > begin:
            _gate_up_tile(
                x_ptr, w_ptr, out_ptr, scale_ptr, order_ptr, begin, end, slot, block, size, depth_size,
                ROWS_PER_INPUT, True, FEW_ROWS, COLUMNS, DEPTH, EVEN, SCALED,
            )  # fmt: skip
    else:
        tile, block = tile_of(tl.program_id(0), num_tiles, tl.cdiv(size, COLUMNS), GROUP)
        slot = tl.load(tile_slots_ptr + tile)
        if slot >= 0:
            end = tl.load(begins_ptr + slot) + tl.load(counts_ptr + slot)
            _gate_up_tile(
                x_ptr, w_ptr, out_ptr, scale_ptr, order_ptr, tile * ROWS, end, slot, block, size, depth_size,
                ROWS_PER_INPUT, False, ROWS, COLUMNS, DEPTH, EVEN, SCALED,
            )  # fmt: skip


@triton.jit
def _down_tile(
    x_ptr,
    w_ptr,
    out_ptr,
    scale_ptr,
    weights_ptr,
    order_ptr,
    first,
    end,
    slot,
    block,
    size,
    depth_size,
    ROWS_PER_INPUT: tl.constexpr,
    SWAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Weighted down projection of up to ROWS assignments of one slot in one block of columns."""
    assignment, row_mask = assignments_at(order_ptr, first, end, ROWS)
    columns = block * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
    value = product(
        x_ptr,
        w_ptr + slot.to(tl.int64) * size * depth_size,
        assignment // ROWS_PER_INPUT,
        row_mask,
        columns,
        columns < size,
        depth_size,
        SWAP,
        ROWS,
        COLUMNS,
        DEPTH,
        EVEN,
    )
    if SCALED:
        value = scale_columns(value, scale_ptr + slot.to(tl.int64) * size, columns, columns < size, SWAP)
    weight = tl.load(weights_ptr + assignment, mask=row_mask, other=0.0)
    if SWAP:
        value *= weight[None, :]
    else:
        value *= weight[:, None]
    store_tile(out_ptr, value, assignment, row_mask, columns, columns < size, size, SWAP)


@triton.jit(do_not_specialize=["num_tiles"])
def _down_kernel(
    x_ptr,  # [T * K, I]
    w_ptr,  # [P, M, I]
    out_ptr,  # [T * K, M], rows of skipped assignments are left alone
    scale_ptr,  # [P, M] float32, read with SCALED
    weights_ptr,  # [T * K] float32
    order_ptr,
    begins_ptr,
    counts_ptr,
    tile_slots_ptr,
    num_tiles,
    size,
    depth_size,
    ROWS_PER_INPUT: tl.constexpr,
    BY_SLOT: tl.constexpr,
    FEW_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Grid (column blocks, P) with BY_SLOT, else (column blocks * row tiles,)."""
    if BY_SLOT:
        block = tl.program_id(0)
        slot = tl.program_id(1)
        begin = tl.load(begins_ptr + slot)
        end = begin + tl.load(counts_ptr + slot)
        if end - begin > FEW_ROWS:
            for first in range(begin, end, ROWS):
                _down_tile(
                    x_ptr, w_ptr, out_ptr, scale_ptr, weights_ptr, order_ptr, first, end, slot, block, size, depth_size,
                    ROWS_PER_INPUT, True, ROWS, COLUMNS, DEPTH, EVEN, SCALED,
                )  # fmt: skip
        elif end > begin:
            _down_tile(
                x_ptr, w_ptr, out_ptr, scale_ptr, weights_ptr, order_ptr, begin, end, slot, block, size, depth_size,
                ROWS_PER_INPUT, True, FEW_ROWS, COLUMNS, DEPTH, EVEN, SCALED,
            )  # fmt: skip
    else:
        tile, block = tile_of(tl.program_id(0), num_tiles, tl.cdiv(size, COLUMNS), GROUP)
        slot = tl.load(tile_slots_ptr + tile)
        if slot >= 0:
            end = tl.load(begins_ptr + slot) + tl.load(counts_ptr + slot)
            _down_tile(
                x_ptr, w_ptr, out_ptr, scale_ptr, weights_ptr, order_ptr, tile * ROWS, end, slot, block, size, depth_size,
                ROWS_PER_INPUT, False, ROWS, COLUMNS, DEPTH, EVEN, SCALED,
            )  # fmt: skip


@triton.jit
def _combine_kernel(
    partial_ptr,  # [T * K, M]
    slots_ptr,  # [T, K] int64
    out_ptr,  # [T, M]
    hidden_size,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (T, column blocks): the sum over k in ascending order, skipped assignments left out."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = sum_of_served(partial_ptr, slots_ptr, token, columns, hidden_size, TOP_K, COLUMNS)
    tl.store(out_ptr + token * hidden_size + columns, total.to(out_ptr.dtype.element_ty), mask=columns < hidden_size)


@triton.jit
def sum_of_served(partial_ptr, slots_ptr, token, columns, hidden_size, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
    """[COLUMNS] float32: a token's outputs summed in ascending order, without those of skipped assignments."""
    total = tl.zeros([COLUMNS], tl.float32)
    for k in tl.static_range(TOP_K):
        served = tl.where(tl.load(slots_ptr + token * TOP_K + k) >= 0, hidden_size, 0)  # columns of it to add
        row = partial_ptr + (token * TOP_K + k) * hidden_size
        total += tl.load(row + columns, mask=columns < served, other=0.0).to(tl.float32)
    return total
