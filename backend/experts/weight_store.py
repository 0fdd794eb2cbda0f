"""The stacked weights of one MoE layer's experts: one tensor per projection, one row of it per slot."""

from __future__ import annotations

import torch
from torch import Tensor


class ExpertWeights:
    """w13 [P, 2 * I, M] (gate rows above up rows) and w2 [P, M, I] for P slots."""

    def __init__(
        self, num_slots: int, hidden_size: int, expert_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.expert_size = expert_size
        self.w13 = torch.empty(num_slots, 2 * expert_size, hidden_size, dtype=dtype, device=device)
        self.w2 = torch.empty(num_slots, hidden_size, expert_size, dtype=dtype, device=device)

    def widen(self, times: int) -> None:
        """Repeat every intermediate neuron `times` times and divide w2 by it: the same function, `times` the cost.

        The tensors are replaced, so this belongs before anything holds on to them. One of them is held twice meanwhile.
        """
        num_slots, hidden_size, size = self.w2.shape
        w13 = self.w13.view(num_slots, 2, size, hidden_size).repeat_interleave(times, dim=2)
        self.w13 = w13.view(num_slots, 2 * size * times, hidden_size)
        self.w2 = (self.w2 / times).repeat_interleave(times, dim=2)
        self.expert_size = size * times

    def put(self, slot: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Copy an expert's gate and up [I, M] and down [M, I], not widened and from any device, into a slot."""
        times = self.expert_size // len(gate)
        if times > 1:
            gate, up = gate.repeat_interleave(times, dim=0), up.repeat_interleave(times, dim=0)
            down = (down.to(self.w2.dtype) / times).repeat_interleave(times, dim=1)
        self.gate(slot).copy_(gate, non_blocking=True)
        self.up(slot).copy_(up, non_blocking=True)
        self.down(slot).copy_(down, non_blocking=True)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return (self.w13.shape[1:].numel() + self.w2.shape[1:].numel()) * self.w13.element_size()

    def gate(self, slot: int) -> Tensor:
        """View [I, M] of a slot's gate projection."""
        return self.w13[slot, : self.expert_size]

    def up(self, slot: int) -> Tensor:
        """View [I, M] of a slot's up projection."""
        return self.w13[slot, self.expert_size :]

    def down(self, slot: int) -> Tensor:
        """View [M, I] of a slot's down projection."""
        return self.w2[slot]
