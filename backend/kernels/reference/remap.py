"""Remap: from logical experts to the weight slots that serve them in this step."""

from __future__ import annotations

import torch
from torch import Tensor


def remap_experts(
    experts: Tensor,  # [T, K] int64, logical experts
    weights: Tensor,  # [T, K] float32, gate weights
    expert_slots: Tensor,  # [E] int64, slot of each logical expert's original weights
    thresholds: Tensor,  # [classes] float32, this layer's brownout thresholds; they choose among the slots of an expert
    token_class: Tensor,  # [T] int8, index into thresholds
    num_tokens: Tensor | None = None,  # [] int, rows from here on are padding; None: there are none
) -> tuple[Tensor, Tensor]:
    """Returns slots [T, K] int64 and their weights [T, K] float32; slot -1 means that nothing is to be computed.

    Each expert has its original slot only, so every threshold gives the same answer.
    """
    del thresholds, token_class
    slots = expert_slots[experts]
    if num_tokens is not None:
        rows = torch.arange(slots.shape[0], device=slots.device)
        slots = torch.where((rows < num_tokens).unsqueeze(1), slots, -1)
    return slots, weights
