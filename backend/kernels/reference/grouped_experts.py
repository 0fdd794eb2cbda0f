"""Grouped expert MLPs over weight slots."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_experts_forward(
    hidden: Tensor,  # [T, M]
    w13: Tensor,  # [P, 2 * I, M], gate rows above up rows
    w2: Tensor,  # [P, M, I]
    slots: Tensor,  # [T, K] int64, -1: skip
    weights: Tensor,  # [T, K] float32
) -> Tensor:
    """Sum over k of weights[t, k] * w2 @ (silu(gate) * up) with the weights of slots[t, k]; returns [T, M].

    Assignments are sorted by slot, so that each active slot's weights are read once and its rows are contiguous.
    """
    top_k, size = slots.shape[1], w2.shape[2]
    flat = slots.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat + 1, minlength=w13.shape[0] + 1).tolist()
    spans, start = [], counts[0]
    for slot, count in enumerate(counts[1:]):
        if count:
            spans.append((slot, start, start + count))
            start += count
    rows = order // top_k
    x = hidden.index_select(0, rows)
    gate_up = x.new_empty(x.shape[0], 2 * size)
    for slot, start, end in spans:
        torch.mm(x[start:end], w13[slot].t(), out=gate_up[start:end])
    act = F.silu(gate_up[:, :size]).mul_(gate_up[:, size:])
    y = torch.zeros_like(x) if counts[0] else torch.empty_like(x)
    for slot, start, end in spans:
        torch.mm(act[start:end], w2[slot].t(), out=y[start:end])
    # Back to [T, K, M]; the weighted sum over k is one small batched product.
    unsorted = torch.empty_like(y).index_copy_(0, order, y).view(slots.shape[0], top_k, -1)
    return torch.bmm(weights.unsqueeze(1).to(y.dtype), unsorted).squeeze(1)
