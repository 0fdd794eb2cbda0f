"""Sorting assignments by weight slot, so that programs find the rows that a slot serves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from backend.kernels.gpu.common import power_of_2

#: Assignments that a program looks at together: a prefill step has tens of thousands, and every program sees them all.
_CHUNK = 4096
#: One for each thread: then none counts the same assignment as another.
_LEAST_CHUNK = 128


@triton.jit(do_not_specialize=["num_assignments", "num_tiles"])
def _align_kernel(
    slots_ptr,  # [A] int64
    order_ptr,  # [L] int32, written up to the last slot's end
    begins_ptr,  # [P] int32
    counts_ptr,  # [P] int32
    tile_slots_ptr,  # [W] int32
    num_assignments,
    num_slots,
    num_tiles,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,  # power of 2, at least P
):
    """Grid (P + 1): program p lists the assignments of slot p, in ascending order; program P marks the unused tiles."""
    slot = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    bins = tl.arange(0, BINS)
    histogram = tl.zeros([BINS], tl.int32)
    for base in range(0, num_assignments, CHUNK):
        index = base + lane
        served = tl.load(slots_ptr + index, mask=index < num_assignments, other=-1).to(tl.int32)
        histogram += tl.histogram(served, BINS, mask=served >= 0)
    padded = (histogram + TILE - 1) // TILE * TILE
    begin = tl.sum(tl.where(bins < slot, padded, 0))
    if slot < num_slots:
        count = tl.sum(tl.where(bins == slot, histogram, 0))
        tl.store(begins_ptr + slot, begin)
        tl.store(counts_ptr + slot, count)
        if count > 0:
            written = 0
            for base in range(0, num_assignments, CHUNK):
                index = base + lane
                mine = tl.load(slots_ptr + index, mask=index < num_assignments, other=-1) == slot
                rank = written + tl.cumsum(mine.to(tl.int32), 0) - 1
                tl.store(order_ptr + begin + rank, index, mask=mine)
                written += tl.sum(mine.to(tl.int32))
            for base in range(0, tl.cdiv(count, TILE), CHUNK):
                tile = base + lane
                tl.store(tile_slots_ptr + begin // TILE + tile, slot + tile * 0, mask=tile < tl.cdiv(count, TILE))
    else:
        for base in range(begin // TILE, num_tiles, CHUNK):
            tl.store(tile_slots_ptr + base + lane, lane * 0 - 1, mask=base + lane < num_tiles)


def align(slots: Tensor, num_slots: int, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Group the assignments of `slots` [T, K] by slot; a slot's list begins at a multiple of `tile`. -1 is left out.

    Returns, all int32 and of sizes that depend on shapes only: `order` (flat indices t * K + k; what lies between the lists
    is undefined), `begins` [P] (start of each slot's list), `counts` [P] (its length) and `tile_slots` (the slot of each tile
    of `tile` places in `order`, -1: unused).
    """
    num_assignments = slots.numel()
    # Every list that is not empty wastes at most tile - 1 places.
    num_tiles = (num_assignments + min(num_slots, num_assignments) * (tile - 1)) // tile
    sizes = (num_tiles * tile, num_slots, num_slots, num_tiles)
    # Kernels are compiled for what begins at 16 bytes, and once more for what does not.
    places = [-(-size // 4) * 4 for size in sizes]
    empty = torch.empty(sum(places), dtype=torch.int32, device=slots.device)
    order, begins, counts, tile_slots = (part[:size] for part, size in zip(empty.split(places), sizes, strict=True))
    _align_kernel[(num_slots + 1,)](
        slots.contiguous(),
        order,
        begins,
        counts,
        tile_slots,
        num_assignments,
        num_slots,
        num_tiles,
        TILE=tile,
        CHUNK=min(_CHUNK, max(_LEAST_CHUNK, power_of_2(num_assignments))),
        BINS=power_of_2(num_slots),
        num_warps=4 if num_assignments <= 1024 else 8,
    )
    return order, begins, counts, tile_slots
