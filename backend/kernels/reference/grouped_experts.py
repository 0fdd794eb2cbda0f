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
    scales: tuple[Tensor, Tensor] | None = None,  # [P, 2 * I] and [P, M] float32, factors of the rows of w13 and w2
) -> Tensor:
    """Sum over k of weights[t, k] * w2 @ (silu(gate) * up) with the weights of slots[t, k]; returns [T, M]."""
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for slot in slots.unique().tolist():
        if slot >= 0:
            tokens, places = torch.where(slots == slot)
            x = hidden.index_select(0, tokens)
            in_matrix, out_matrix = w13[slot].to(x.dtype), w2[slot].to(x.dtype)
            if scales is not None:
                in_matrix = in_matrix * scales[0][slot].to(x.dtype).unsqueeze(1)
                out_matrix = out_matrix * scales[1][slot].to(x.dtype).unsqueeze(1)
            gate, up = F.linear(x, in_matrix).chunk(2, dim=1)
            y = F.linear(F.silu(gate) * up, out_matrix)
            out.index_add_(0, tokens, y.float() * weights[tokens, places].unsqueeze(1))
    return out.to(hidden.dtype)
