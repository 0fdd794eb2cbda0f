"""Routed experts in training: one matmul per expert on a CPU, all experts with a mask on a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Runs of assignments are padded to multiples of this: oneDNN prepares a kernel for every new shape.
_ROWS = 64


def run_experts(x: Tensor, chosen: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """x [N, H], chosen and weights [N, K], w_in [E, 2, I, H], w_out [E, H, I] -> weighted sum of the chosen experts [N, H].

    Under autocast the matmuls run in its type.
    """
    if x.is_cuda:
        return all_experts(x, chosen, weights, w_in, w_out)
    if torch.is_autocast_enabled("cpu"):
        low = torch.get_autocast_dtype("cpu")
        x, weights, w_in, w_out = x.to(low), weights.to(low), w_in.to(low), w_out.to(low)
    return _ChosenExperts.apply(x, chosen, weights, w_in, w_out)


def all_experts(x: Tensor, chosen: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """The same by running every expert on every token: more arithmetic, but few and large matmuls."""
    experts, _, size, hidden = w_in.shape
    spread = torch.zeros(len(x), experts, dtype=weights.dtype, device=x.device).scatter(1, chosen, weights)
    inner = F.linear(x, w_in.reshape(-1, hidden)).view(-1, experts, 2, size)
    active = F.silu(inner[:, :, 0]) * inner[:, :, 1] * spread[:, :, None]
    return active.flatten(1) @ w_out.transpose(1, 2).reshape(experts * size, hidden)


@torch.compile(dynamic=True)
def _activated(inner: Tensor, row_weights: Tensor) -> Tensor:
    """inner [P, 2 I] gates and ups, row_weights [P, 1] -> silu(gate) * up * weight [P, I]."""
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate) * up * row_weights


@torch.compile(dynamic=True)
def _activated_backward(inner: Tensor, row_weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `_activated`'s inner [P, 2 I] and weights [P] from its result's [P, I]."""
    gate, up = inner.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    d_active = grad * row_weights
    d_inner = torch.cat((d_active * up * (sigmoid + silu * (1 - sigmoid)), d_active * silu), dim=-1)
    return d_inner, (grad * silu * up).sum(dim=-1)


class _ChosenExperts(torch.autograd.Function):
    """Assignments sorted by expert, so that an expert's tokens are neighbours; gathers only, no scattered sums.

    P rows: the N*K assignments and, with weight 0, the padding of every expert's run.
    """

    @staticmethod
    def forward(ctx, x: Tensor, chosen: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:  # type: ignore[override]
        tokens, k = chosen.shape
        experts, _, size, hidden = w_in.shape
        order = chosen.reshape(-1).argsort(stable=True)
        counts = torch.bincount(chosen.reshape(-1), minlength=experts)
        padded = (counts + _ROWS - 1) // _ROWS * _ROWS
        ends = padded.cumsum(0)
        shifts = (ends - padded) - (counts.cumsum(0) - counts)
        rows = torch.arange(len(order)) + shifts.repeat_interleave(counts)  # of the sorted assignments
        ends = ends.tolist()
        runs = [
            (e, start, end) for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if end > start
        ]
        source = rows.new_zeros(ends[-1])  # [P] the row's token; padding reads token 0
        source[rows] = order // k
        row_weights = weights.new_zeros(ends[-1], 1)
        row_weights[rows, 0] = weights.reshape(-1)[order]
        back = torch.empty_like(order)  # [N*K] the assignment's row
        back[order] = rows
        rows_x = x[source]
        inner = x.new_empty(ends[-1], 2 * size)
        for expert, start, end in runs:
            torch.mm(rows_x[start:end], w_in[expert].view(2 * size, hidden).t(), out=inner[start:end])
        weighted = _activated(inner, row_weights)
        out = torch.empty_like(rows_x)
        for expert, start, end in runs:
            torch.mm(weighted[start:end], w_out[expert].t(), out=out[start:end])
        ctx.save_for_backward(rows_x, inner, row_weights, source, back, w_in, w_out)
        ctx.runs, ctx.k = runs, k
        return out[back].view(tokens, k, hidden).sum(dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        rows_x, inner, row_weights, source, back, w_in, w_out = ctx.saved_tensors
        _, _, size, hidden = w_in.shape
        weighted = _activated(inner, row_weights)
        rows_grad = grad[source]
        d_weighted = torch.empty_like(weighted)
        d_in, d_out = torch.zeros_like(w_in), torch.zeros_like(w_out)
        for expert, start, end in ctx.runs:
            torch.mm(rows_grad[start:end], w_out[expert], out=d_weighted[start:end])
            torch.mm(rows_grad[start:end].t(), weighted[start:end], out=d_out[expert])
        d_inner, d_weights = _activated_backward(inner, row_weights, d_weighted)
        d_x = rows_grad  # its values are no longer needed: the room is used again
        for expert, start, end in ctx.runs:
            torch.mm(d_inner[start:end], w_in[expert].view(2 * size, hidden), out=d_x[start:end])
            torch.mm(d_inner[start:end].t(), rows_x[start:end], out=d_in[expert].view(2 * size, hidden))
        tokens = len(grad)
        d_tokens = d_x[back].view(tokens, ctx.k, hidden).sum(dim=1)
        return d_tokens, None, d_weights[back].view(tokens, ctx.k), d_in, d_out
