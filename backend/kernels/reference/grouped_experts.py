"""Grouped expert MLPs over weight slots."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_experts_forward(
    hidden: Tensor,  # [T, M]
    w13: Tensor,  # [P, 2 * I, M] of any floating type, gate rows above up rows
    w2: Tensor,  # [P, M, I]
    slots: Tensor,  # [T, K] int64, -1: skip
    weights: Tensor,  # [T, K] float32
) -> Tensor:
    """Sum over k of weights[t, k] * w2 @ (silu(gate) * up) with the weights of slots[t, k]; returns [T, M]."""
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for slot in slots.unique().tolist():
        if slot >= 0:
            tokens, places = torch.where(slots == slot)
            x = hidden.index_select(0, tokens)
            gate, up = F.linear(x, w13[slot].to(x.dtype)).chunk(2, dim=1)
            y = F.linear(F.silu(gate) * up, w2[slot].to(x.dtype))
            out.index_add_(0, tokens, y.float() * weights[tokens, places].unsqueeze(1))
    return out.to(hidden.dtype)
