"""Router: which experts a token is sent to, and with which gate weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from backend.kernels.gpu.common import power_of_2
from backend.kernels.gpu.linear import linear

__all__ = ["route", "router_scores"]


@triton.jit
def _softmax(logits_ptr, bias_ptr, row, expert, num_experts, BIAS: tl.constexpr):
    """Probabilities [ROWS, EXPERTS] of rows `row` [ROWS, 1]; 0 beyond the experts."""
    inside = expert < num_experts
    logits = tl.load(logits_ptr + row * num_experts + expert, mask=inside, other=float("-inf")).to(tl.float32)
    if BIAS:
        logits += tl.load(bias_ptr + expert, mask=inside, other=0.0)
    raised = tl.exp(logits - tl.max(logits, 1)[:, None])
    return raised / tl.sum(raised, 1)[:, None]


@triton.jit(do_not_specialize=["num_tokens"])
def _top_k_kernel(
    logits_ptr,  # [T, E]
    bias_ptr,  # [E] float32, read with BIAS
    experts_ptr,  # [T, K] int64
    weights_ptr,  # [T, K] float32
    num_tokens,
    num_experts,
    BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    PLACES: tl.constexpr,  # power of 2, at least K
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,  # power of 2, at least E
):
    """Grid (blocks of ROWS tokens): the best expert is taken out K times."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)[None, :]
    place = tl.arange(0, PLACES)[None, :]
    # Rows beyond the last compute it again.
    left = _softmax(logits_ptr, bias_ptr, tl.minimum(row, num_tokens - 1)[:, None], expert, num_experts, BIAS)
    left = tl.where(expert < num_experts, left, -1.0)
    experts = tl.zeros([ROWS, PLACES], tl.int32)
    weights = tl.zeros([ROWS, PLACES], tl.float32)
    for k in tl.static_range(TOP_K):
        # Without a best one (NaN) still an expert that exists: tables are read at its place.
        best = tl.minimum(tl.argmax(left, 1), num_experts - 1)[:, None]
        experts = tl.where(place == k, best, experts)
        weights = tl.where(place == k, tl.max(left, 1)[:, None], weights)
        left = tl.where(expert == best, -1.0, left)
    if RENORMALIZE:
        weights /= tl.sum(weights, 1)[:, None]
    out = row[:, None] * TOP_K + place
    mask = (row < num_tokens)[:, None] & (place < TOP_K)
    tl.store(experts_ptr + out, experts.to(tl.int64), mask=mask)
    tl.store(weights_ptr + out, weights, mask=mask)


def router_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [T, M], weight [E, M] -> [T, E]; on a GPU in float32, since logits rounded to 16 bits are off by up to 1 %."""
    if hidden.is_cuda and hidden.element_size() == 2:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return linear(hidden, weight)


def router_scores(
    hidden: Tensor,  # [T, M]
    weight: Tensor,  # [E, M]
    bias: Tensor | None,  # [E] float32, as in `route`
) -> Tensor:
    """The probabilities [T, E] in float32 that `route` chooses by."""
    logits = router_logits(hidden, weight).float()
    return torch.softmax(logits if bias is None else logits + bias, dim=-1)


def route(
    hidden: Tensor,  # [T, M]
    weight: Tensor,  # [E, M]
    bias: Tensor | None,  # [E] float32, added to the logits; only dummy models have one, to skew their routing
    top_k: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    """Softmax over all experts in float32, then the `top_k` best, best first (equal ones by index).

    `renormalize` makes a token's weights sum to 1. Returns experts [T, K] int64 and weights [T, K] float32.
    """
    logits = router_logits(hidden, weight)
    num_tokens, num_experts = logits.shape
    experts = torch.empty(num_tokens, top_k, dtype=torch.int64, device=hidden.device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=hidden.device)
    if num_tokens == 0:
        return experts, weights
    columns = power_of_2(num_experts)
    rows = max(1, 512 // columns)
    _top_k_kernel[(triton.cdiv(num_tokens, rows),)](
        logits,
        logits if bias is None else bias,
        experts,
        weights,
        num_tokens,
        num_experts,
        BIAS=bias is not None,
        RENORMALIZE=renormalize,
        TOP_K=top_k,
        PLACES=power_of_2(top_k),
        ROWS=rows,
        EXPERTS=columns,
        num_warps=4,
    )
    return experts, weights
