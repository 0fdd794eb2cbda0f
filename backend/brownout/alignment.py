"""The mean of experts as an expert, after their intermediate neurons have been put in the same order.

Exchanging intermediate neurons (rows of gate and up together with columns of down) leaves an expert's function as it is, so
equal experts may look different, and averaging them as they stand would blur them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_expert(w13: Tensor, w2: Tensor, usage: Tensor, align: bool = True) -> tuple[Tensor, Tensor]:
    """Mean of experts w13 [n, 2 I, M], w2 [n, M, I] weighted by `usage` [n] (all zero: evenly), as (w13 [2 I, M], w2 [M, I]).

    With `align` each expert's neurons are first put in the order in which they match those of the most used one best.
    """
    share = usage / usage.sum() if usage.sum() > 0 else torch.full_like(usage, 1 / len(usage))
    reference = int(usage.argmax())
    first, second = torch.zeros_like(w13[0]), torch.zeros_like(w2[0])
    for i in range(len(w13)):
        a, b = w13[i], w2[i]
        if align and i != reference:
            order = _matching(w13[reference], w2[reference], a, b)
            a, b = torch.cat([half[order] for half in a.chunk(2)]), b[:, order]
        first += share[i] * a
        second += share[i] * b
    return first, second


def _matching(w13: Tensor, w2: Tensor, other_w13: Tensor, other_w2: Tensor) -> Tensor:
    """[I] the neuron of the other expert for each neuron of the first: the assignment of the highest total similarity."""
    from scipy.optimize import linear_sum_assignment

    similarity = _neurons(w13, w2) @ _neurons(other_w13, other_w2).T
    _, order = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    return torch.from_numpy(order).to(w13.device)


def _neurons(w13: Tensor, w2: Tensor) -> Tensor:
    """[I, 3 M]: gate row, up row and down column of each neuron, each kind to the same scale."""
    gate, up = w13.chunk(2)
    return torch.cat([F.normalize(part.flatten(), dim=0).view_as(part) for part in (gate, up, w2.T)], dim=1)
