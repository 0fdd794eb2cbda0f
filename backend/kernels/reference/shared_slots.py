"""The shared expert as always-on slots: beside its routed experts each token has some more, with the shared gate's weight."""

from __future__ import annotations

import torch
from torch import Tensor

from backend.kernels.reference.linear import linear


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
    rows = len(hidden)
    always = torch.arange(first_slot, first_slot + num_slots, device=slots.device).expand(rows, num_slots)
    if num_tokens is not None:
        always = torch.where((torch.arange(rows, device=slots.device) < num_tokens).unsqueeze(1), always, -1)
    share = torch.sigmoid(linear(hidden.float(), gate)).expand(rows, num_slots)
    return torch.cat([slots, always], 1), torch.cat([weights, share.to(weights.dtype)], 1)
