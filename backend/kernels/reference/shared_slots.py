"""The shared expert as always-on slots: beside its routed experts each token has some more, with the shared gate's weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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


class SharedSlots(NamedTuple):
    """What `remap_experts` takes to add the shared expert's slots on its way."""

    hidden: Tensor  # [T, M]
    gate: Tensor  # [1, M]
    first_slot: int
    num_slots: int

    def added_to(
        self, slots: Tensor, weights: Tensor, num_tokens: Tensor | None = None, add: Callable = add_shared_slots
    ) -> tuple[Tensor, Tensor]:
        """See `add_shared_slots`; `add` is another implementation of it."""
        return add(self.hidden, self.gate, slots, weights, self.first_slot, self.num_slots, num_tokens)
