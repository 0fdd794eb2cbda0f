"""Which weight slot serves which logical expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: In place of a slot: the expert's own weights are not there, its group's united expert serves it.
MISSING = -1


class ExpertMap:
    """Tables from logical experts to weight slots of one MoE layer.

    The tables are device tensors whose addresses never change: updates are made in place between steps, so that a captured
    graph which reads them stays valid.
    """

    def __init__(self, num_experts: int, num_slots: int, device: torch.device, num_resident: int | None = None) -> None:
        """The first `num_resident` slots (default: one for each expert) hold experts' own weights, at first those of the
        experts with these numbers."""
        self.num_resident = num_experts if num_resident is None else num_resident
        if num_slots < self.num_resident:
            raise ValueError(f"{num_slots} slots cannot hold {self.num_resident} experts")
        self.num_experts = num_experts
        self.num_slots = num_slots
        #: [E] int64, slot of each logical expert's original weights, or MISSING; from `num_slots` on: see ResidentExperts.
        self.expert_slots: Tensor = torch.arange(num_experts, device=device)
        self.expert_slots[self.num_resident :] = MISSING
        #: [E] int64, slot of the united expert of each expert's group, in the way that is in use; experts of one group have
        #: the same. Without a way in use every expert is alone in its group, so that none is ever replaced.
        self._alone = torch.arange(num_experts, device=device)
        self.united_slots = self._alone.clone()
        self._united_slots_of_way: dict[int, Tensor] = {}

    def assign(self, expert_slots: Sequence[int]) -> None:
        """Serve expert e from slot `expert_slots[e]` from the next step on."""
        if len(expert_slots) != self.num_experts:
            raise ValueError(f"expected a slot for each of {self.num_experts} experts, got {len(expert_slots)}")
        if not all(0 <= slot < self.num_slots for slot in expert_slots):
            raise ValueError(f"slots must lie between 0 and {self.num_slots - 1}")
        self.expert_slots.copy_(torch.tensor(expert_slots))

    @property
    def ways(self) -> tuple[int, ...]:
        """Ways whose united experts have slots, ascending."""
        return tuple(sorted(self._united_slots_of_way))

    def add_way(self, way: int, groups: Tensor, first_slot: int) -> None:
        """Serve group g of `groups` [E] int64 from slot `first_slot + g` when `way` is in use."""
        if groups.shape != (self.num_experts,):
            raise ValueError(f"expected a group for each of {self.num_experts} experts, got {list(groups.shape)}")
        if groups.min() < 0 or first_slot < self.num_resident or first_slot + int(groups.max()) >= self.num_slots:
            raise ValueError(f"united slots must lie between {self.num_resident} and {self.num_slots - 1}")
        self._united_slots_of_way[way] = (first_slot + groups).to(self.united_slots)

    def use_way(self, way: int) -> None:
        """From the next step on, replaced experts are served by the united experts of this way; 0: by none."""
        self.united_slots.copy_(self._united_slots_of_way[way] if way else self._alone)
