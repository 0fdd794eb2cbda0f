"""Router: softmax and choice in one pass over each token's logits."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from backend.kernels.cpu.compiled import FEW_NUMBERS, ZERO, exp, kernel, parallel_kernel
from backend.kernels.cpu.linear import float32_linear


def route(
    hidden: Tensor,  # [T, M]
    weight: Tensor,  # [E, M]
    bias: Tensor | None,  # [E] float32
    top_k: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    """As the reference; of experts that are equally probable the first is taken."""
    logits = float32_linear(hidden, weight)
    if bias is not None:
        logits += bias
    experts = torch.empty(len(hidden), top_k, dtype=torch.int64)
    weights = torch.empty(len(hidden), top_k)
    choose = _tokens if logits.numel() <= FEW_NUMBERS else _tokens_in_parallel
    choose(logits.numpy(), renormalize, experts.numpy(), weights.numpy())
    return experts, weights


@kernel
def _token(logits, t, renormalize, experts, weights):
    """The best of logits[t] [E], which are overwritten, best first into experts[t] and weights[t] [K]."""
    count, top = logits.shape[1], logits[t, 0]
    for e in range(1, count):
        top = max(top, logits[t, e])
    total = chosen = ZERO
    for e in range(count):
        logits[t, e] = exp(logits[t, e] - top)
        total += logits[t, e]
    for k in range(experts.shape[1]):
        # Powers are positive, so those already taken, as -1, never are the best again.
        best, most = 0, logits[t, 0]
        for e in range(1, count):
            if logits[t, e] > most:
                best, most = e, logits[t, e]
        experts[t, k], weights[t, k] = best, most
        chosen += most
        logits[t, best] = np.float32(-1.0)
    divisor = chosen if renormalize else total
    for k in range(experts.shape[1]):
        weights[t, k] /= divisor


@kernel
def _tokens(logits, renormalize, experts, weights):
    for t in range(logits.shape[0]):
        _token(logits, t, renormalize, experts, weights)


@parallel_kernel
def _tokens_in_parallel(logits, renormalize, experts, weights):
    for t in prange(logits.shape[0]):
        _token(logits, t, renormalize, experts, weights)
