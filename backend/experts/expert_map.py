"""Which weight slot serves which logical expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ExpertMap:
    """Tables from logical experts to weight slots of one MoE layer.

    The tables are device tensors whose addresses never change: updates are made in place between steps, so that a captured
    graph which reads them stays valid.
    """

    def __init__(self, num_experts: int, num_slots: int, device: torch.device) -> None:
        if num_slots < num_experts:
            raise ValueError(f"{num_slots} slots cannot hold {num_experts} experts")
        self.num_experts = num_experts
        self.num_slots = num_slots
        #: [E] int64, slot of each logical expert's original weights.
        self.expert_slots: Tensor = torch.arange(num_experts, device=device)

    def assign(self, expert_slots: Sequence[int]) -> None:
        """Serve expert e from slot `expert_slots[e]` from the next step on."""
        if len(expert_slots) != self.num_experts:
            raise ValueError(f"expected a slot for each of {self.num_experts} experts, got {len(expert_slots)}")
        if not all(0 <= slot < self.num_slots for slot in expert_slots):
            raise ValueError(f"slots must lie between 0 and {self.num_slots - 1}")
        self.expert_slots.copy_(torch.tensor(expert_slots))
