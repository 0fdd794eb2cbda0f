"""Routed experts in training: one matmul per expert on a CPU, all experts with a mask on a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def run_experts(x: Tensor, chosen: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """x [N, H], chosen and weights [N, K], w_in [E, 2, I, H], w_out [E, H, I] -> weighted sum of the chosen experts [N, H]."""
    if x.is_cuda:
        return all_experts(x, chosen, weights, w_in, w_out)
    return _ChosenExperts.apply(x, chosen, weights, w_in, w_out)


def all_experts(x: Tensor, chosen: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """The same by running every expert on every token: more arithmetic, but few and large matmuls."""
    experts, _, size, hidden = w_in.shape
    spread = torch.zeros(len(x), experts, dtype=weights.dtype, device=x.device).scatter(1, chosen, weights)
    inner = F.linear(x, w_in.reshape(-1, hidden)).view(-1, experts, 2, size)
    active = F.silu(inner[:, :, 0]) * inner[:, :, 1] * spread[:, :, None]
    return active.flatten(1) @ w_out.transpose(1, 2).reshape(experts * size, hidden)


class _ChosenExperts(torch.autograd.Function):
    """Assignments sorted by expert, so that an expert's tokens are neighbours; gathers only, no scattered sums."""

    @staticmethod
    def forward(ctx, x: Tensor, chosen: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:  # type: ignore[override]
        tokens, k = chosen.shape
        experts, _, size, hidden = w_in.shape
        order = chosen.reshape(-1).argsort(stable=True)
        ends = torch.bincount(chosen.reshape(-1), minlength=experts).cumsum(0).tolist()
        runs = list(zip([0, *ends[:-1]], ends, strict=True))
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        sorted_x = x[order // k]
        sorted_weights = weights.reshape(-1)[order, None]
        inner = x.new_empty(tokens * k, 2 * size)
        for expert, (start, end) in enumerate(runs):
            if end > start:
                torch.mm(sorted_x[start:end], w_in[expert].reshape(2 * size, hidden).t(), out=inner[start:end])
        gate, up = inner.chunk(2, dim=-1)
        active = F.silu(gate) * up
        weighted = active * sorted_weights
        out = torch.empty_like(sorted_x)
        for expert, (start, end) in enumerate(runs):
            if end > start:
                torch.mm(weighted[start:end], w_out[expert].t(), out=out[start:end])
        ctx.save_for_backward(sorted_x, inner, active, sorted_weights, order, back, w_in, w_out)
        ctx.runs, ctx.k = runs, k
        return out[back].view(tokens, k, hidden).sum(dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        sorted_x, inner, active, sorted_weights, order, back, w_in, w_out = ctx.saved_tensors
        _, _, size, hidden = w_in.shape
        sorted_grad = grad[order // ctx.k]
        d_weighted, weighted = torch.empty_like(active), active * sorted_weights
        d_in, d_out = torch.zeros_like(w_in), torch.zeros_like(w_out)
        for expert, (start, end) in enumerate(ctx.runs):
            if end > start:
                torch.mm(sorted_grad[start:end], w_out[expert], out=d_weighted[start:end])
                torch.mm(sorted_grad[start:end].t(), weighted[start:end], out=d_out[expert])
        d_weights = (d_weighted * active).sum(dim=-1)
        d_active = d_weighted * sorted_weights
        gate, up = inner.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        d_inner = torch.cat((d_active * up * (sigmoid + silu * (1 - sigmoid)), d_active * silu), dim=-1)
        d_x = sorted_grad  # its values are no longer needed: the room is used again
        for expert, (start, end) in enumerate(ctx.runs):
            if end > start:
                torch.mm(d_inner[start:end], w_in[expert].view(2 * size, hidden), out=d_x[start:end])
                torch.mm(d_inner[start:end].t(), sorted_x[start:end], out=d_in[expert].view(2 * size, hidden))
        tokens = len(grad)
        return d_x[back].view(tokens, ctx.k, hidden).sum(dim=1), None, d_weights[back].view(tokens, ctx.k), d_in, d_out
