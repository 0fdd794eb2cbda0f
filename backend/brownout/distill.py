"""Distilling the united experts of one layer from the layer's own activations; all groups at once as batched matmuls.

Letters: N tokens, E experts, G groups, K experts per token, M hidden size, I intermediate size, P pairs (token, group) with
at least one of the token's experts in the group, n rows of a training batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backend.brownout.activations import LayerActivations
from backend.brownout.alignment import mean_expert
from backend.brownout.grouping import expert_output
from backend.brownout.united_file import UnitedLayer

#: Held-out error is looked at this many times; without a better one in a fifth of them the layer ends early.
_CHECKS = 25
_PATIENCE = 5
_ROWS_AT_ONCE = 16384


@dataclass(frozen=True)
class DistillOptions:
    """How united experts are made. `steps` 0 leaves them averaged."""

    steps: int = 2000
    #: Tokens per group in a training batch.
    rows: int = 256
    #: Adam's step relative to the root mean square of the weights that it changes.
    rate: float = 0.03
    #: `aligned` or `mean`: whether neurons are matched before members are averaged.
    init: str = "aligned"
    #: `chosen`: what the token's own members would give; `mean`: the mean of all members (the paper's).
    loss: str = "chosen"


@dataclass(frozen=True)
class Pairs:
    """Pairs in the order of their groups: token [P], group [P], scale [P] (sum of gate weights), target [P, M]."""

    token: Tensor
    group: Tensor
    scale: Tensor
    target: Tensor


@torch.no_grad()
def make_pairs(
    acts: LayerActivations, tokens: Tensor, groups: Tensor, w13: Tensor, w2: Tensor, loss: str = "chosen"
) -> Pairs:
    """Pairs of the given rows `tokens` [n] of the activations; w13 [E, 2 I, M] and w2 [E, M, I] are the layer's experts."""
    count = int(groups.max()) + 1
    experts, weights = acts.experts[tokens], acts.weights[tokens]
    group_of = groups[experts]
    scale = torch.zeros(len(tokens), count, device=tokens.device).scatter_add_(1, group_of, weights)
    has = torch.zeros_like(scale, dtype=torch.bool).scatter_(1, group_of, True)
    group, row = has.T.nonzero(as_tuple=True)
    pair_of = torch.full((count, len(tokens)), -1, device=tokens.device)
    pair_of[group, row] = torch.arange(len(row), device=tokens.device)
    inputs = acts.inputs
    target = torch.zeros(len(row), inputs.shape[1], device=tokens.device)
    if loss == "mean":
        sizes = torch.bincount(groups, minlength=count)
        for expert in range(len(groups)):
            mine = pair_of[groups[expert]]
            mine = mine[mine >= 0]
            target[mine] += expert_output(inputs[tokens[row[mine]]], w13[expert], w2[expert]) / sizes[groups[expert]]
        return Pairs(tokens[row], group, torch.ones(len(row), device=tokens.device), target)
    for expert in range(len(groups)):
        rows, places = torch.where(experts == expert)
        out = expert_output(inputs[tokens[rows]], w13[expert], w2[expert])
        target[pair_of[groups[expert], rows]] += out * weights[rows, places].unsqueeze(1)
    return Pairs(tokens[row], group, scale[row, group], target)


@torch.no_grad()
def pair_errors(inputs: Tensor, pairs: Pairs, w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error and squared target, summed by group: [G] and [G] float64."""
    count = len(w13)
    error = torch.zeros(count, dtype=torch.float64, device=inputs.device)
    energy = torch.zeros_like(error)
    ends = torch.bincount(pairs.group, minlength=count).cumsum(0).tolist()
    for group in range(count):
        for start in range(ends[group - 1] if group else 0, ends[group], _ROWS_AT_ONCE):
            part = slice(start, min(start + _ROWS_AT_ONCE, ends[group]))
            out = expert_output(inputs[pairs.token[part]], w13[group], w2[group]) * pairs.scale[part].unsqueeze(1)
            error[group] += (out - pairs.target[part]).square().sum(dtype=torch.float64)
            energy[group] += pairs.target[part].square().sum(dtype=torch.float64)
    return error, energy


def united_layer(
    acts: LayerActivations,
    held_out: Tensor,
    w13: Tensor,
    w2: Tensor,
    groups: Tensor,
    options: DistillOptions,
    seed: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> tuple[UnitedLayer, dict[str, float]]:
    """United experts of one layer, and what is to be said of them.

    `held_out` [N] bool marks the tokens that are measured on and never trained on; w13 [E, 2 I, M] and w2 [E, M, I] are the
    experts, whose type the result has. `advance` is told of steps done. The report has `relative_error`, the squared error
    on held-out tokens relative to the squared outputs (1: as good as dropping them), and `averaged_error`, the same before
    training.
    """
    dtype = w13.dtype
    w13, w2, groups = w13.float(), w2.float(), groups.to(w13.device)
    count = int(groups.max()) + 1
    usage = torch.zeros(len(groups), device=w13.device)
    usage.index_add_(0, acts.experts[~held_out].flatten(), acts.weights[~held_out].flatten())
    means = [
        mean_expert(w13[m], w2[m], usage[m], options.init == "aligned") for m in (groups == g for g in range(count))
    ]
    best = [torch.stack(parts) for parts in zip(*means, strict=True)]
    measured = make_pairs(acts, held_out.nonzero().squeeze(1), groups, w13, w2)
    error, energy = pair_errors(acts.inputs, measured, best[0].to(dtype), best[1].to(dtype))
    averaged = error.clone()
    if options.steps:
        pairs = make_pairs(acts, (~held_out).nonzero().squeeze(1), groups, w13, w2, options.loss)
        best, error = _train(acts.inputs, pairs, measured, best, error, dtype, options, seed, advance)
    total = float(energy.sum().clamp(min=1e-30))
    report = {"relative_error": float(error.sum()) / total, "averaged_error": float(averaged.sum()) / total}
    return UnitedLayer(groups, best[0].to(dtype), best[1].to(dtype)), report


def _train(
    inputs: Tensor,
    pairs: Pairs,
    measured: Pairs,
    start: list[Tensor],
    error: Tensor,
    dtype: torch.dtype,
    options: DistillOptions,
    seed: int,
    advance: Callable[[int], None],
) -> tuple[list[Tensor], Tensor]:
    """Adam with cosine decay from `start`; the best state of each group by held-out error, and those errors [G]."""
    best, best_error = [tensor.clone() for tensor in start], error.clone()
    weights = [tensor.clone().requires_grad_() for tensor in start]
    scales = [max(float(tensor.square().mean().sqrt()), 1e-8) for tensor in start]
    optimizer = torch.optim.Adam(
        [{"params": [w], "lr": options.rate * scale} for w, scale in zip(weights, scales, strict=True)],
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _learning_rate(i, options.steps))
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.bincount(pairs.group, minlength=len(start[0]))
    firsts = sizes.cumsum(0) - sizes
    energy = torch.zeros(len(sizes), device=inputs.device)
    energy.index_add_(0, pairs.group, pairs.target.square().sum(1))
    weight = torch.where(energy > 0, sizes / energy.clamp(min=1e-30), 0.0) / options.rows
    every, last_better = max(1, options.steps // _CHECKS), 0
    for step in range(1, options.steps + 1):
        draw = torch.rand(len(sizes), options.rows, generator=generator).to(inputs.device)
        chosen = (firsts.unsqueeze(1) + (draw * sizes.unsqueeze(1)).long()).clamp(max=len(pairs.token) - 1)
        x, scale, target = inputs[pairs.token[chosen]], pairs.scale[chosen], pairs.target[chosen]
        gate, up = torch.bmm(x, weights[0].transpose(1, 2)).chunk(2, dim=2)
        out = torch.bmm(F.silu(gate) * up, weights[1].transpose(1, 2)) * scale.unsqueeze(2)
        loss = ((out - target).square().sum((1, 2)) * weight).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        advance(1)
        if step % every == 0 or step == options.steps:
            with torch.no_grad():
                # As they will be stored: rounding counts.
                now, _ = pair_errors(inputs, measured, weights[0].to(dtype), weights[1].to(dtype))
                better = now < best_error
                for kept, w in zip(best, weights, strict=True):
                    kept[better] = w[better]
                best_error = torch.where(better, now, best_error)
            if better.any():
                last_better = step
            elif step - last_better >= _PATIENCE * every:
                advance(options.steps - step)
                break
    return best, best_error


def _learning_rate(step: int, steps: int) -> float:
    """Relative to the highest: 20 steps of warm-up, then half a cosine to a hundredth."""
    warm = min(1.0, (step + 1) / 20)
    return warm * float(0.01 + 0.99 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / max(1, steps)))))
