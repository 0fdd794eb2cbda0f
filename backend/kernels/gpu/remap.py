"""Remap: from the router's experts to the weight slots that serve them in this step, in two launches.

The first counts the demand of every expert; the second decides which experts are kept, once in each of its programs, and
rewrites the assignments. All comparisons are of integers, so the slots are exactly those of the reference. Mechanisms that
few use run as the reference does, in torch: it never reads the device either.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from backend.kernels.gpu.common import power_of_2
from backend.kernels.reference import remap as reference
from backend.kernels.reference.remap import UNITED, select_experts

__all__ = ["remap_experts", "select_experts"]

#: Assignments that a program looks at together. Fewer sizes are fewer kernels to compile at the start.
_CHUNK, _LEAST_CHUNK = 2048, 256
_LEAST_ROWS = 16
_ONE = tl.constexpr(2.0**reference.FRACTION_BITS)
_BITS = tl.constexpr(reference.FRACTION_BITS)
_UNIT = tl.constexpr(1 << reference.FRACTION_BITS)
_LARGEST_WEIGHT = tl.constexpr(reference.LARGEST_WEIGHT)


@triton.jit
def _num_best(fraction, TOP_K: tl.constexpr):
    """Experts that a token has under `united_top_k`, by its threshold in units of 1 / _UNIT."""
    return ((fraction + _UNIT) * TOP_K + _UNIT) // (2 * _UNIT)


@triton.jit(do_not_specialize=["num_assignments"])
def _demand_kernel(
    experts_ptr,  # [T, K] int64
    weights_ptr,  # [T, K] float32, read with GATE_MASS
    thresholds_ptr,  # [classes] float32
    token_class_ptr,  # [T] int8
    num_tokens_ptr,  # [] int, read with PADDED
    demand_ptr,  # [2, E] int64: demand; largest theta of the tokens routed to it
    num_experts,
    num_assignments,
    TOP_K: tl.constexpr,
    PADDED: tl.constexpr,
    GATE_MASS: tl.constexpr,
    TRIM: tl.constexpr,  # a token has its best experts only
    CHUNK: tl.constexpr,
):
    """Grid (E): one expert each."""
    expert = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    demand = tl.zeros([CHUNK], tl.int64)
    theta = tl.zeros([CHUNK], tl.int32)
    end = num_assignments
    if PADDED:
        end = tl.minimum(num_assignments, tl.load(num_tokens_ptr).to(tl.int32) * TOP_K)
    for base in range(0, end, CHUNK):
        index = base + lane
        inside = index < end
        mine = inside & (tl.load(experts_ptr + index, mask=inside, other=-1) == expert)
        token_class = tl.load(token_class_ptr + index // TOP_K, mask=mine, other=0).to(tl.int32)
        threshold = tl.load(thresholds_ptr + token_class, mask=mine, other=0.0)
        fraction = tl.floor(threshold * _ONE + 0.5).to(tl.int32)
        if TRIM:
            mine = mine & (index % TOP_K < _num_best(fraction, TOP_K))
        theta = tl.maximum(theta, tl.where(mine, fraction, 0))
        if GATE_MASS:
            weight = tl.load(weights_ptr + index, mask=mine, other=0.0)
            bounded = tl.where(weight == weight, tl.minimum(tl.maximum(weight, 0.0), _LARGEST_WEIGHT), 0.0)
            share = tl.maximum(tl.floor(bounded * _ONE + 0.5).to(tl.int64), 1)
            demand += tl.where(mine, share, 0)
        else:
            demand += mine.to(tl.int64)
    tl.store(demand_ptr + expert, tl.sum(demand, 0))
    tl.store(demand_ptr + num_experts + expert, tl.max(theta, 0).to(tl.int64))


@triton.jit(do_not_specialize=["num_rows"])
def _remap_kernel(
    experts_ptr,  # [T, K] int64
    weights_ptr,  # [T, K] float32
    expert_slots_ptr,  # [E] int64
    united_slots_ptr,  # [E] int64
    demand_ptr,  # [2, E] int64
    thresholds_ptr,  # [classes] float32, read with TRIM
    token_class_ptr,  # [T] int8, read with TRIM
    num_tokens_ptr,  # [] int, read with PADDED
    slots_ptr,  # [T, K] int64, written
    new_weights_ptr,  # [T, K] float32, written
    replaced_ptr,  # [T] int32, added to with COUNT
    num_rows,
    num_experts,
    UNITED: tl.constexpr,  # else given up assignments are dropped
    TRIM: tl.constexpr,  # a token has its best experts only
    RENORMALIZE: tl.constexpr,  # their weights sum to 1
    PADDED: tl.constexpr,
    COUNT: tl.constexpr,
    TOP_K: tl.constexpr,
    PLACES: tl.constexpr,  # power of 2, at least K
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,  # power of 2, at least E
    STEP: tl.constexpr,  # experts compared with all others at a time
):
    """Grid (blocks of ROWS tokens)."""
    expert = tl.arange(0, EXPERTS)
    known = expert < num_experts
    demand = tl.load(demand_ptr + expert, mask=known, other=0)
    theta = tl.load(demand_ptr + num_experts + expert, mask=known, other=0)
    before = tl.zeros([EXPERTS], tl.int64)
    for base in range(0, num_experts, STEP):
        other = base + tl.arange(0, STEP)
        theirs = tl.load(demand_ptr + other, mask=other < num_experts, other=0)[None, :]
        above = (theirs > demand[:, None]) | ((theirs == demand[:, None]) & (other[None, :] < expert[:, None]))
        before += tl.sum(tl.where(above, theirs, 0), 1)
    target = tl.load(expert_slots_ptr + expert, mask=known, other=0).to(tl.int32)
    missing = target < 0
    given_up = (demand > 0) & (missing | ((before << _BITS) >= theta * tl.sum(demand, 0)))
    united = tl.load(united_slots_ptr + expert, mask=known, other=-1).to(tl.int32)
    if UNITED:
        partners = tl.sum(((united[:, None] == united[None, :]) & given_up[None, :]).to(tl.int32), 1)
        given_up = given_up & (missing | (partners >= 2))
        target = tl.where(given_up, united, target)
    else:
        target = tl.where(given_up, tl.where(missing, united, -1), target)
    # One table for both: slots are at least -1, so slot + 1 and the mark fit into one number.
    table = (target + 1) * 2 + given_up.to(tl.int32)

    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    place = tl.arange(0, PLACES)[None, :]
    inside = (row < num_rows) & (place < TOP_K)
    valid = inside
    if PADDED:
        valid = valid & (row < tl.load(num_tokens_ptr).to(tl.int32))
    index = row.to(tl.int64) * TOP_K + place
    weights = tl.load(weights_ptr + index, mask=inside, other=0.0)
    trimmed = tl.zeros([ROWS, 1], tl.int32)
    if TRIM:
        token_class = tl.load(token_class_ptr + row, mask=row < num_rows, other=0).to(tl.int32)
        threshold = tl.load(thresholds_ptr + token_class, mask=row < num_rows, other=1.0)
        best = _num_best(tl.floor(threshold * _ONE + 0.5).to(tl.int32), TOP_K)
        trimmed = tl.sum((valid & (place >= best)).to(tl.int32), 1)[:, None]
        valid = valid & (place < best)
        if RENORMALIZE:
            total = tl.zeros([ROWS, 1], tl.float32)
            for k in tl.static_range(TOP_K):  # from first to last, as the reference adds them
                total += tl.sum(tl.where(valid & (place == k), weights, 0.0), 1)[:, None]
            weights = tl.where(trimmed > 0, tl.div_rn(weights, tl.where(trimmed > 0, total, 1.0)), weights)
    experts = tl.load(experts_ptr + index, mask=valid, other=0).to(tl.int32)
    found = tl.reshape(tl.gather(table, tl.reshape(experts, [ROWS * PLACES]), 0), [ROWS, PLACES])
    slots = tl.where(valid, found // 2 - 1, -1)
    moved = tl.sum(tl.where(valid, found % 2, 0), 1)[:, None]
    # In rows that moved, assignments on one slot become one; weights are summed from first to last.
    merged = tl.zeros([ROWS, PLACES], tl.float32)
    repeats = tl.zeros([ROWS, PLACES], tl.int32)
    for k in tl.static_range(TOP_K):
        slot = tl.sum(tl.where(place == k, slots, 0), 1)[:, None]
        weight = tl.sum(tl.where(place == k, weights, 0.0), 1)[:, None]
        same = slots == slot
        merged += tl.where(same, weight, 0.0)
        repeats = tl.where(same & (place > k), 1, repeats)
    slots = tl.where((moved > 0) & (repeats > 0), -1, slots)
    tl.store(slots_ptr + index, slots.to(tl.int64), mask=inside)
    tl.store(new_weights_ptr + index, tl.where(moved > 0, merged, weights), mask=inside)
    if COUNT:
        counted = replaced_ptr + row
        tl.store(counted, tl.load(counted, mask=row < num_rows, other=0) + moved + trimmed, mask=row < num_rows)


def remap_experts(
    experts: Tensor,  # [T, K] int64, the router's choice, no expert twice in a row
    weights: Tensor,  # [T, K] float32, gate weights
    expert_slots: Tensor,  # [E] int64, slot of each expert's original weights; -1: they are not there
    thresholds: Tensor,  # [classes] float32 between 0 and 1, this layer's theta per token class
    token_class: Tensor,  # [T] int8, index into thresholds
    num_tokens: Tensor | None = None,  # [] int, rows from here on are padding; None: there are none
    *,
    united_slots: Tensor | None = None,  # [E] int64, slot of the united expert of each expert's group; equal: one group
    mechanism: str = "united",
    ranking: str = "count",
    similarity: Tensor | None = None,  # [E, E] float32 (`reroute`): [e, f] how well f stands in for e
    similarity_min: Tensor | None = None,  # [] float32 (`reroute`)
    renormalize: bool = False,  # `united_top_k`: gate weights of the experts that are left sum to 1
    replaced: Tensor | None = None,  # [T] int32, in place: each token's assignments that its own experts do not serve
) -> tuple[Tensor, Tensor]:
    """Keep the most demanded experts, replace the others: see `backend.kernels.reference.remap`.

    Returns slots [T, K] int64, -1 where nothing is to be computed, and weights [T, K] float32, of no meaning there.
    """
    if mechanism not in (*UNITED, "drop"):
        return reference.remap_experts(
            experts,
            weights,
            expert_slots,
            thresholds,
            token_class,
            num_tokens,
            mechanism=mechanism,
            ranking=ranking,
            united_slots=united_slots,
            similarity=similarity,
            similarity_min=similarity_min,
            replaced=replaced,
        )
    num_rows, top_k = experts.shape
    slots, new_weights = torch.empty_like(experts), torch.empty_like(weights)
    if num_rows == 0:
        return slots, new_weights
    num_experts = len(expert_slots)
    demand = torch.empty((2, num_experts), dtype=torch.int64, device=experts.device)
    padding = experts if num_tokens is None else num_tokens
    _demand_kernel[(num_experts,)](
        experts,
        weights,
        thresholds,
        token_class,
        padding,
        demand,
        num_experts,
        experts.numel(),
        TOP_K=top_k,
        PADDED=num_tokens is not None,
        GATE_MASS=ranking == "gate_mass",
        TRIM=mechanism == "united_top_k",
        CHUNK=min(_CHUNK, max(_LEAST_CHUNK, power_of_2(experts.numel()))),
        num_warps=4,
    )
    columns, places = power_of_2(num_experts), power_of_2(top_k)
    # Every program decides about all experts anew: many rows in each, but enough programs for the device.
    rows = min(max(_LEAST_ROWS, power_of_2(num_rows)), max(1, 512 // places))
    _remap_kernel[(triton.cdiv(num_rows, rows),)](
        experts,
        weights,
        expert_slots,
        # Without united experts every expert is alone in its group.
        expert_slots if united_slots is None else united_slots,
        demand,
        thresholds,
        token_class,
        padding,
        slots,
        new_weights,
        experts if replaced is None else replaced,
        num_rows,
        num_experts,
        UNITED=mechanism in UNITED,
        TRIM=mechanism == "united_top_k",
        RENORMALIZE=renormalize,
        PADDED=num_tokens is not None,
        COUNT=replaced is not None,
        TOP_K=top_k,
        PLACES=places,
        ROWS=rows,
        EXPERTS=columns,
        STEP=min(32, columns),
        num_warps=4 if columns <= 64 else 8,
    )
    return slots, new_weights
