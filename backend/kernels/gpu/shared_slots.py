"""The shared expert as always-on slots: beside its routed experts each token has some more, with the shared gate's weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from backend.kernels.gpu.common import power_of_2

_COLUMNS = 1024


@triton.jit
def _shared_slots_kernel(
    x_ptr,  # [T, M]
    gate_ptr,  # [M]
    slots_ptr,  # [T, K] int64
    weights_ptr,  # [T, K] float32
    new_slots_ptr,  # [T, K + F] int64, written
    new_weights_ptr,  # [T, K + F] float32, written
    num_tokens_ptr,  # [] int, read with PADDED
    hidden_size,
    first_slot,
    PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,  # F
    PLACES: tl.constexpr,  # power of 2, at least K + F
    COLUMNS: tl.constexpr,
):
    """Grid (T): one token each."""
    token = tl.program_id(0).to(tl.int64)
    total = tl.zeros([COLUMNS], tl.float32)
    for base in range(0, hidden_size, COLUMNS):
        column = base + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + token * hidden_size + column, mask=column < hidden_size, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + column, mask=column < hidden_size, other=0.0).to(tl.float32)
        total += x * gate
    share = 1.0 / (1.0 + tl.exp(-tl.sum(total, 0)))
    place = tl.arange(0, PLACES)
    routed = place < TOP_K
    slot = tl.load(slots_ptr + token * TOP_K + place, mask=routed, other=-1)
    weight = tl.load(weights_ptr + token * TOP_K + place, mask=routed, other=0.0)
    always = first_slot + place - TOP_K
    if PADDED:
        always = tl.where(token < tl.load(num_tokens_ptr), always, -1)
    inside = place < TOP_K + SHARED
    out = token * (TOP_K + SHARED) + place
    tl.store(new_slots_ptr + out, tl.where(routed, slot, always.to(tl.int64)), mask=inside)
    tl.store(new_weights_ptr + out, tl.where(routed, weight, share), mask=inside)


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
        hidden.contiguous(),
        gate,
        slots.contiguous(),
        weights.contiguous(),
        new_slots,
        new_weights,
        slots if num_tokens is None else num_tokens,
        hidden_size,
        first_slot,
        PADDED=num_tokens is not None,
        TOP_K=top_k,
        SHARED=num_slots,
        PLACES=power_of_2(top_k + num_slots),
        COLUMNS=min(_COLUMNS, power_of_2(hidden_size)),
        num_warps=4,
    )
    return new_slots, new_weights
