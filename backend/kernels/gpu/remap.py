"""Remap: from the router's experts to the weight slots that serve them in this step.

First the demand of every expert is counted, then is decided which experts are kept, then the assignments are rewritten.
Where the step is small enough for one program to see all assignments (decode) it does all that in one launch; else a launch
counts and another decides, once in each of its programs, and rewrites. Further programs of that launch add the slots of a
folded shared expert. All comparisons are of integers, so the slots are exactly those of the reference. Mechanisms that few
use run as the reference does, in torch: it never reads the device either.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from backend.kernels.gpu.common import power_of_2
from backend.kernels.gpu.shared_slots import add_shared_slots, columns_together, shared_columns
from backend.kernels.reference import remap as reference
from backend.kernels.reference.remap import UNITED, select_experts
from backend.kernels.reference.shared_slots import SharedSlots

__all__ = ["remap_experts", "select_experts"]

#: Assignments that a program looks at together, when it counts and when it rewrites.
_COUNTED, _REWRITTEN = 2048, 512
#: Assignments of the largest step that one program handles.
_FEW = 1024
_LEAST_ROWS = 16
_ONE = tl.constexpr(2.0**reference.FRACTION_BITS)
_BITS = tl.constexpr(reference.FRACTION_BITS)
_UNIT = tl.constexpr(1 << reference.FRACTION_BITS)
_LARGEST_WEIGHT = tl.constexpr(reference.LARGEST_WEIGHT)


@triton.jit
def _num_best(fraction, TOP_K: tl.constexpr):
    """Experts that a token has under `united_top_k`, by its threshold in units of 1 / _UNIT."""
    return ((fraction + _UNIT) * TOP_K + _UNIT) // (2 * _UNIT)


@triton.jit
def _routed(
    experts_ptr,  # [T, K] int64
    thresholds_ptr,  # [classes] float32
    token_class_ptr,  # [T] int8
    row,  # [ROWS, 1]
    place,  # [1, PLACES]
    end,  # rows from here on have no assignments
    TRIM: tl.constexpr,  # a token has its best experts only
    TOP_K: tl.constexpr,
):
    """The experts [ROWS, PLACES] int32 that tokens are routed to, -1 where they are to none; theta [ROWS, 1] int32 of the tokens."""
    token_class = tl.load(token_class_ptr + row, mask=row < end, other=0).to(tl.int32)
    threshold = tl.load(thresholds_ptr + token_class, mask=row < end, other=0.0)
    theta = tl.floor(threshold * _ONE + 0.5).to(tl.int32)
    there = (row < end) & (place < TOP_K)
    if TRIM:
        there = there & (place < _num_best(theta, TOP_K))
    return tl.load(experts_ptr + row * TOP_K + place, mask=there, other=-1).to(tl.int32), theta


@triton.jit
def _share(weights, GATE_MASS: tl.constexpr):
    """What an assignment adds to the demand of its expert, int64, from its gate weight."""
    if GATE_MASS:
        bounded = tl.where(weights == weights, tl.minimum(tl.maximum(weights, 0.0), _LARGEST_WEIGHT), 0.0)
        share = tl.maximum(tl.floor(bounded * _ONE + 0.5).to(tl.int64), 1)
    else:
        share = tl.full(weights.shape, 1, tl.int64)
    return share


@triton.jit
def _column(x, place, k):
    """Column k of x [ROWS, PLACES], as [ROWS, 1]."""
    return tl.sum(tl.where(place == k, x, 0), 1)[:, None]


@triton.jit(do_not_specialize=["num_rows"])
def _demand_kernel(
    experts_ptr,  # [T, K] int64
    weights_ptr,  # [T, K] float32
    thresholds_ptr,  # [classes] float32
    token_class_ptr,  # [T] int8
    num_tokens_ptr,  # [] int, read with PADDED
    demand_ptr,  # [2, E] int64: demand; largest theta of the tokens routed to it
    num_rows,
    num_experts,
    PADDED: tl.constexpr,
    GATE_MASS: tl.constexpr,
    TRIM: tl.constexpr,
    TOP_K: tl.constexpr,
    PLACES: tl.constexpr,  # power of 2, at least K
    ROWS: tl.constexpr,
):
    """Grid (E): one expert each."""
    expert = tl.program_id(0)
    place = tl.arange(0, PLACES)[None, :]
    demand = tl.zeros([ROWS, PLACES], tl.int64)
    largest = tl.zeros([ROWS, PLACES], tl.int32)
    end = num_rows
    if PADDED:
        end = tl.minimum(num_rows, tl.load(num_tokens_ptr).to(tl.int32))
    for base in range(0, end, ROWS):
        row = base + tl.arange(0, ROWS)[:, None]
        experts, theta = _routed(experts_ptr, thresholds_ptr, token_class_ptr, row, place, end, TRIM, TOP_K)
        mine = experts == expert
        largest = tl.maximum(largest, tl.where(mine, theta, 0))
        weights = tl.load(weights_ptr + row * TOP_K + place, mask=mine, other=0.0)
        demand += tl.where(mine, _share(weights, GATE_MASS), 0)
    tl.store(demand_ptr + expert, tl.sum(tl.sum(demand, 1), 0))
    tl.store(demand_ptr + num_experts + expert, tl.max(tl.max(largest, 1), 0).to(tl.int64))


@triton.jit(do_not_specialize=["num_rows"])
def _remap_kernel(
    experts_ptr,  # [T, K] int64
    weights_ptr,  # [T, K] float32
    expert_slots_ptr,  # [E] int64
    united_slots_ptr,  # [E] int64
    demand_ptr,  # [2, E] int64, as _demand_kernel leaves it; with ALL first written
    thresholds_ptr,  # [classes] float32, read with ALL and with TRIM
    token_class_ptr,  # [T] int8, read with ALL and with TRIM
    num_tokens_ptr,  # [] int, read with PADDED
    slots_ptr,  # [T, K + F] int64, written
    new_weights_ptr,  # [T, K + F] float32, written
    replaced_ptr,  # [T] int32, added to with COUNT
    x_ptr,  # [T, M], read with SHARED
    gate_ptr,  # [M], read with SHARED
    hidden_size,
    first_shared_slot,
    num_rows,
    num_experts,
    ALL: tl.constexpr,  # one block has all tokens: it counts their demand itself
    UNITED: tl.constexpr,  # else given up assignments are dropped
    GATE_MASS: tl.constexpr,
    TRIM: tl.constexpr,  # a token has its best experts only
    RENORMALIZE: tl.constexpr,  # their weights sum to 1
    PADDED: tl.constexpr,
    COUNT: tl.constexpr,
    TOP_K: tl.constexpr,
    PLACES: tl.constexpr,  # power of 2, at least K
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,  # power of 2, at least E
    STEP: tl.constexpr,  # experts compared with all others at a time
    SHARED: tl.constexpr,  # F, slots of the shared expert
    SHARED_PLACES: tl.constexpr,  # power of 2, at least F
    COLUMNS: tl.constexpr,
):
    """Grid (blocks of ROWS tokens), with SHARED (the same + T): those further programs have one token each."""
    block = tl.program_id(0)
    if SHARED:
        token = block - tl.cdiv(num_rows, ROWS)
        if token >= 0:
            shared_columns(
                token.to(tl.int64), x_ptr, gate_ptr, slots_ptr, new_weights_ptr, num_tokens_ptr, hidden_size,
                first_shared_slot, PADDED, TOP_K, SHARED, SHARED_PLACES, COLUMNS,
            )  # fmt: skip
            return
    row = block * ROWS + tl.arange(0, ROWS)[:, None]
    place = tl.arange(0, PLACES)[None, :]
    end = num_rows
    if PADDED:
        end = tl.minimum(num_rows, tl.load(num_tokens_ptr).to(tl.int32))
    experts, own_theta = _routed(experts_ptr, thresholds_ptr, token_class_ptr, row, place, end, TRIM, TOP_K)
    routed = experts >= 0
    inside = (row < num_rows) & (place < TOP_K)
    index = row * TOP_K + place
    weights = tl.load(weights_ptr + index, mask=inside, other=0.0)

    expert = tl.arange(0, EXPERTS)
    known = expert < num_experts
    if ALL:
        # In memory, since tokens by experts are too many for registers; sums of integers have no order.
        tl.store(demand_ptr + expert, tl.zeros([EXPERTS], tl.int64), mask=known)
        tl.store(demand_ptr + num_experts + expert, tl.zeros([EXPERTS], tl.int64), mask=known)
        tl.debug_barrier()
        tl.atomic_add(demand_ptr + experts, _share(weights, GATE_MASS), mask=routed, sem="relaxed", scope="cta")
        largest = tl.broadcast_to(own_theta, [ROWS, PLACES]).to(tl.int64)
        tl.atomic_max(demand_ptr + num_experts + experts, largest, mask=routed, sem="relaxed", scope="cta")
        tl.debug_barrier()
    demand = tl.load(demand_ptr + expert, mask=known, other=0)
    theta = tl.load(demand_ptr + num_experts + expert, mask=known, other=0)
    before = tl.zeros([EXPERTS], tl.int64)
    for base in range(0, num_experts, STEP):
        other = base + tl.arange(0, STEP)[:, None]
        theirs = tl.load(demand_ptr + other, mask=other < num_experts, other=0)
        above = (theirs > demand[None, :]) | ((theirs == demand[None, :]) & (other < expert[None, :]))
        before += tl.sum(tl.where(above, theirs, 0), 0)
    target = tl.load(expert_slots_ptr + expert, mask=known, other=0).to(tl.int32)
    missing = target < 0
    given_up = (demand > 0) & (missing | ((before << _BITS) >= theta * tl.sum(demand, 0)))
    united = tl.load(united_slots_ptr + expert, mask=known, other=-1).to(tl.int32)
    if UNITED:
        partners = tl.sum(((united[:, None] == united[None, :]) & given_up[:, None]).to(tl.int32), 0)
        given_up = given_up & (missing | (partners >= 2))
        target = tl.where(given_up, united, target)
    else:
        target = tl.where(given_up, tl.where(missing, united, -1), target)
    # One table for both: slots are at least -1, so slot + 1 and the mark fit into one number.
    table = (target + 1) * 2 + given_up.to(tl.int32)

    trimmed = tl.zeros([ROWS, 1], tl.int32)
    if TRIM:
        trimmed = tl.sum(((row < end) & (place < TOP_K) & (experts < 0)).to(tl.int32), 1)[:, None]
        if RENORMALIZE:
            total = tl.zeros([ROWS, 1], tl.float32)
            for k in tl.static_range(TOP_K):  # from first to last, as the reference adds them
                total += _column(tl.where(routed, weights, 0.0), place, k)
            weights = tl.where(trimmed > 0, tl.div_rn(weights, tl.where(trimmed > 0, total, 1.0)), weights)
    found = tl.gather(table, tl.reshape(tl.maximum(experts, 0), [ROWS * PLACES]), 0)
    found = tl.reshape(found, [ROWS, PLACES])
    slots = tl.where(routed, found // 2 - 1, -1)
    moved = tl.sum(tl.where(routed, found % 2, 0), 1)[:, None]
    # In rows that moved, assignments on one slot become one; weights are summed from first to last.
    merged = tl.zeros([ROWS, PLACES], tl.float32)
    repeats = tl.zeros([ROWS, PLACES], tl.int32)
    for k in tl.static_range(TOP_K):
        same = slots == _column(slots, place, k)
        merged += tl.where(same, _column(weights, place, k), 0.0)
        repeats = tl.where(same & (place > k), 1, repeats)
    slots = tl.where((moved > 0) & (repeats > 0), -1, slots)
    out = row * (TOP_K + SHARED) + place
    tl.store(slots_ptr + out, slots.to(tl.int64), mask=inside)
    tl.store(new_weights_ptr + out, tl.where(moved > 0, merged, weights), mask=inside)
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
    shared: SharedSlots | None = None,  # its slots are added: [T, K + F] instead of [T, K], see `add_shared_slots`
) -> tuple[Tensor, Tensor]:
    """Keep the most demanded experts, replace the others: see `backend.kernels.reference.remap`.

    Returns slots [T, K] int64, -1 where nothing is to be computed, and weights [T, K] float32, of no meaning there.
    With `shared` both have K + F columns.
    """
    if mechanism not in (*UNITED, "drop"):
        slots, new_weights = reference.remap_experts(
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
        return (
            (slots, new_weights)
            if shared is None
            else shared.added_to(slots, new_weights, num_tokens, add_shared_slots)
        )
    num_rows, top_k = experts.shape
    num_shared = 0 if shared is None else shared.num_slots
    slots, new_weights = (x.new_empty(num_rows, top_k + num_shared) for x in (experts, weights))
    if num_rows == 0:
        return slots, new_weights
    num_experts = len(expert_slots)
    columns, places = power_of_2(num_experts), power_of_2(top_k)
    few = num_rows <= _FEW // places
    demand = torch.empty((2, num_experts), dtype=torch.int64, device=experts.device)
    padding = experts if num_tokens is None else num_tokens
    in_both = {
        "GATE_MASS": ranking == "gate_mass",
        "TRIM": mechanism == "united_top_k",
        "PADDED": num_tokens is not None,
        "TOP_K": top_k,
        "PLACES": places,
    }
    if not few:
        _demand_kernel[(num_experts,)](
            experts,
            weights,
            thresholds,
            token_class,
            padding,
            demand,
            num_rows,
            num_experts,
            ROWS=_COUNTED // places,
            num_warps=4,
            **in_both,
        )
    hidden, gate, first_slot, _ = (experts, experts, 0, 0) if shared is None else shared
    rows = max(_LEAST_ROWS, power_of_2(num_rows)) if few else _REWRITTEN // places
    _remap_kernel[(triton.cdiv(num_rows, rows) + (num_rows if shared else 0),)](
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
        hidden.contiguous(),
        gate,
        hidden.shape[1],
        first_slot,
        num_rows,
        num_experts,
        ALL=few,
        UNITED=mechanism in UNITED,
        RENORMALIZE=renormalize,
        COUNT=replaced is not None,
        ROWS=rows,
        EXPERTS=columns,
        STEP=min(32, columns),
        SHARED=num_shared,
        SHARED_PLACES=power_of_2(num_shared),
        COLUMNS=columns_together(hidden.shape[1]),
        num_warps=4 if columns <= 64 and rows * places <= 256 else 8,
        # Without a bound the compiler spills some to have room for more programs, but there are few. More experts need more.
        maxnreg=128 if columns <= 128 else None,
        **in_both,
    )
    return slots, new_weights
