"""Grouped expert MLPs over weight slots."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from backend.kernels.reference.linear import matmul_into


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
    size = w2.shape[2]
    flat = slots.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat + 1, minlength=w13.shape[0] + 1).tolist()
    spans, start = [], counts[0]
    for slot, count in enumerate(counts[1:]):
        if count:
            spans.append((slot, start, start + count))
            start += count
    x = hidden.index_select(0, order // slots.shape[1])
    gate_up = x.new_empty(x.shape[0], 2 * size)
    for slot, start, end in spans:
        matmul_into(x[start:end], w13[slot], gate_up[start:end])
    act = F.silu(gate_up[:, :size]).mul_(gate_up[:, size:])
    y = x  # not needed any more
    y[: counts[0]] = 0
    for slot, start, end in spans:
        matmul_into(act[start:end], w2[slot], y[start:end])
    # Un-sort, weigh and add up in one pass.
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return F.embedding_bag(places.view(slots.shape), y, mode="sum", per_sample_weights=weights.to(y.dtype))
