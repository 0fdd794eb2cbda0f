"""Router: which experts a token is sent to, and with which gate weights."""

from __future__ import annotations

import torch
from torch import Tensor

from backend.kernels.reference.linear import linear


def route(
    hidden: Tensor,  # [T, M]
    weight: Tensor,  # [E, M]
    bias: Tensor | None,  # [E] float32, added to the logits; only dummy models have one, to skew their routing
    top_k: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    """Softmax over all experts in float32, then the `top_k` best, best first.

    `renormalize` makes a token's weights sum to 1. Returns experts [T, K] int64 and weights [T, K] float32.
    """
    weights, experts = router_scores(hidden, weight, bias).topk(top_k, dim=-1)
    if renormalize:
        weights /= weights.sum(dim=-1, keepdim=True)
    return experts, weights


def router_scores(
    hidden: Tensor,  # [T, M]
    weight: Tensor,  # [E, M]
    bias: Tensor | None,  # [E] float32, as in `route`
) -> Tensor:
    """The probabilities [T, E] in float32 that `route` chooses by."""
    logits = linear(hidden, weight).float()
    if bias is not None:
        logits += bias
    return torch.softmax(logits, dim=-1)
