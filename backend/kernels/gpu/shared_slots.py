"""The shared expert as always-on slots: beside its routed experts each token has some more, with the shared gate's weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from backend.kernels.gpu.common import power_of_2

_COLUMNS = 1024


@triton.jit
def shared_columns(
    token,
    x_ptr,  # [T, M]
    gate_ptr,  # [M]
    slots_ptr,  # [T, K + F] int64, the last F columns written
    weights_ptr,  # [T, K + F] float32, the last F columns written
    num_tokens_ptr,  # [] int, read with PADDED
    hidden_size,
    first_slot,
    PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,  # F
    PLACES: tl.constexpr,  # power of 2, at least F
    COLUMNS: tl.constexpr,
):
    """One token's slots of the shared expert, and their weight."""
    total = tl.zeros([COLUMNS], tl.float32)
    for base in range(0, hidden_size, COLUMNS):
        column = base + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + token * hidden_size + column, mask=column < hidden_size, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + column, mask=column < hidden_size, other=0.0).to(tl.float32)
        total += x * gate
    share = 1.0 / (1.0 + tl.exp(-tl.sum(total, 0)))
    place = tl.arange(0, PLACES)
    slot = first_slot + place
    if PADDED:
        slot = tl.where(token < tl.load(num_tokens_ptr), slot, -1)
    out = token * (TOP_K + SHARED) + TOP_K + place
    tl.store(slots_ptr + out, slot.to(tl.int64), mask=place < SHARED)
    tl.store(weights_ptr + out, tl.zeros([PLACES], tl.float32) + share, mask=place < SHARED)


@triton.jit
def _shared_slots_kernel(
    slots_ptr,  # [T, K] int64
    weights_ptr,  # [T, K] float32
    new_slots_ptr,  # [T, K + F] int64, written
    new_weights_ptr,  # [T, K + F] float32, written
    x_ptr,
    gate_ptr,
    num_tokens_ptr,
    hidden_size,
    first_slot,
    PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    ROUTED_PLACES: tl.constexpr,  # power of 2, at least K
    SHARED: tl.constexpr,
    PLACES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (T): one token each; see `shared_columns`."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, ROUTED_PLACES)
    routed = place < TOP_K
    out = token * (TOP_K + SHARED) + place
    tl.store(new_slots_ptr + out, tl.load(slots_ptr + token * TOP_K + place, mask=routed), mask=routed)
    tl.store(new_weights_ptr + out, tl.load(weights_ptr + token * TOP_K + place, mask=routed), mask=routed)
    shared_columns(
        token, x_ptr, gate_ptr, new_slots_ptr, new_weights_ptr, num_tokens_ptr, hidden_size, first_slot,
        PADDED, TOP_K, SHARED, PLACES, COLUMNS,
    )  # fmt: skip


def columns_together(hidden_size: int) -> int:
    """Columns of a token that `shared_columns` looks at together."""
    return min(_COLUMNS, power_of_2(hidden_size))


def add_shared_slots(
    hidden: Tensor,  # [T, M]
    gate: Tensor,  # [1, M], the shared expert's gate
    slots: Tensor,  # [T, K] int64, -1: skip
    weights: Tensor,  # [T, K] float32
    first_slot: int,
    num_slots: int,
    num_tokens: Tensor | None = None,  # [] int, rows from here on are padding; None: there are none
) -> tuple[Tensor, Tensor]:
    """Slots [T, K + F] and weights: after those given the F = `num_slots` from `first_slot` on, each with the weight
    sigmoid(gate x); in padding rows -1."""
    (rows, hidden_size), top_k = hidden.shape, slots.shape[1]
    new_slots = torch.empty(rows, top_k + num_slots, dtype=slots.dtype, device=slots.device)
    new_weights = torch.empty(rows, top_k + num_slots, dtype=weights.dtype, device=weights.device)
    if rows == 0:
        return new_slots, new_weights
    _shared_slots_kernel[(rows,)](
        slots.contiguous(),
        weights.contiguous(),
        new_slots,
        new_weights,
        hidden.contiguous(),
        gate,
        slots if num_tokens is None else num_tokens,
        hidden_size,
        first_slot,
        PADDED=num_tokens is not None,
        TOP_K=top_k,
        ROUTED_PLACES=power_of_2(top_k),
        SHARED=num_slots,
        PLACES=power_of_2(num_slots),
        COLUMNS=columns_together(hidden_size),
        num_warps=4,
    )
    return new_slots, new_weights
