"""Remap: from the router's experts to the weight slots that serve them in this step.

Both functions work on fixed sizes and never read the device, so that they can stand in a captured graph. Tables, thresholds
and `similarity_min` are tensors that are changed in place between steps; `mechanism`, `ranking` and `renormalize` are plain
arguments: a graph is captured for one value of each.

Letters beside those of `backend.kernels`: N assignments of the step, theta(t) the threshold of a token's class. Fractions
are compared as integers, theta as floor(theta * 2^16 + 0.5), so that every implementation decides alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backend.kernels.reference.shared_slots import SharedSlots

#: Bits of the fraction in which thresholds are compared and gate weights are summed.
FRACTION_BITS = 16
#: Mechanisms of `select_experts`; the others are those of `remap_experts`.
BY_TOKEN = ("piggyback", "top_k")
#: Mechanisms of `remap_experts` in which united experts serve.
UNITED = ("united", "united_top_k")
#: Largest gate weight that is told from larger ones; routers give at most 1, or a family's scale factor.
LARGEST_WEIGHT = 1024.0


def remap_experts(
    experts: Tensor,  # [T, K] int64, the router's choice, no expert twice in a row
    weights: Tensor,  # [T, K] float32, gate weights
    expert_slots: Tensor,  # [E] int64, slot of each expert's original weights; -1: they are not there (needs united_slots)
    thresholds: Tensor,  # [classes] float32 between 0 and 1, this layer's theta per token class
    token_class: Tensor,  # [T] int8, index into thresholds
    num_tokens: Tensor | None = None,  # [] int, rows from here on are padding; None: there are none
    *,
    united_slots: Tensor | None = None,  # [E] int64, slot of the united expert of each expert's group; equal: one group
    mechanism: str = "united",
    ranking: str = "count",
    similarity: Tensor | None = None,  # [E, E] float32 (`reroute`): [e, f] how well f stands in for e
    similarity_min: Tensor | None = None,  # [] float32 (`reroute`)
    renormalize: bool = False,  # `united_top_k`: gate weights of the experts that are left sum to 1
    replaced: Tensor | None = None,  # [T] int32, in place: each token's assignments that its own experts do not serve
    shared: SharedSlots | None = None,  # its slots are added: [T, K + F] instead of [T, K], see `add_shared_slots`
) -> tuple[Tensor, Tensor]:
    """Keep the most demanded experts, replace the others (BrownoutServe, Algorithm 1).

    Experts are ranked by demand, ties by index: the number of their assignments (`ranking` "count") or the sum of the gate
    weights of these ("gate_mass"). before(e) is the demand of those ranked above e, N that of all.
    Expert e is kept if before(e) < theta(t) * N for some token t that is routed to it, and then serves all its assignments.
    An expert that is not kept is replaced:

    - `united`: by its group's united expert, if another expert of the group that tokens are routed to is not kept either;
      alone it stays, since nothing would be saved;
    - `united_top_k`: as `united`, of fewer assignments: a token has only its floor((1 + theta) * K / 2 + 0.5) best experts, half
      of them at theta = 0. The others count nowhere. Weights by which experts are ranked are those before `renormalize`;
    - `reroute` (after SERE, arXiv 2602.07616): by the most similar kept expert (ties by index), if it is at least as similar
      as `similarity_min`; else, and with theta = 0, where nothing is kept, it stays;
    - `drop`: by nothing.

    An expert that is not there (slot -1) is never kept and counts among those that are not; whatever the mechanism its group's
    united expert serves it, also if it is alone.

    Assignments of a token that thereby land on one slot become one: the first has the sum of their weights, the others slot -1.
    Returns slots [T, K] int64, -1 where nothing is to be computed, and weights [T, K] float32, of no meaning there.
    """
    num_experts = len(expert_slots)
    index = torch.arange(num_experts, device=experts.device)
    present = _valid(experts, num_tokens).expand_as(experts)
    if mechanism == "united_top_k":
        best = torch.arange(experts.shape[1], device=experts.device) < _num_best(
            thresholds, token_class, experts.shape[1]
        )
        valid = present & best
    else:
        valid = present
    demand, theta = _demand(experts, weights, thresholds, token_class, valid, num_experts, ranking)
    active = demand > 0
    ranked_above = (demand > demand.unsqueeze(1)) | ((demand == demand.unsqueeze(1)) & (index < index.unsqueeze(1)))
    before = (ranked_above * demand).sum(1)
    missing = expert_slots < 0
    kept = active & ~missing & (before << FRACTION_BITS < theta * demand.sum())
    given_up = active & ~kept
    if mechanism in UNITED:
        together = index if united_slots is None else united_slots
        same_group = together.unsqueeze(1) == together
        moved = given_up & (missing | ((same_group & given_up).sum(1) >= 2))
        target = expert_slots if united_slots is None else torch.where(moved, united_slots, expert_slots)
    elif mechanism == "reroute":
        assert similarity is not None and similarity_min is not None
        candidates = torch.where(kept, similarity, -torch.inf)
        best = candidates.amax(1)
        moved = given_up & kept.any() & (best >= similarity_min)
        nearest = torch.where(candidates == best.unsqueeze(1), index, num_experts - 1).amin(1)
        target = torch.where(moved, expert_slots[nearest], expert_slots)
    else:
        moved, target = given_up, torch.where(given_up, -1, expert_slots)
    if united_slots is not None:
        moved = moved | (given_up & missing)
        target = torch.where(missing, united_slots, target)
    slots = torch.where(valid, target[experts], -1)
    moved_assignments = moved[experts] & valid
    if replaced is not None:
        replaced += (moved_assignments | (present & ~valid)).sum(1)
    if renormalize and mechanism == "united_top_k":
        left = weights / _ordered_sum(torch.where(valid, weights, 0.0))
        weights = torch.where(valid.all(1, keepdim=True), weights, left)
    slots, weights = _merge(slots, weights, moved_assignments.any(1, keepdim=True))
    return (slots, weights) if shared is None else shared.added_to(slots, weights, num_tokens)


def select_experts(
    experts: Tensor,  # [T, K] int64, the router's choice, best first
    weights: Tensor,  # [T, K] float32, gate weights
    expert_slots: Tensor,  # [E] int64, slot of each expert's original weights
    thresholds: Tensor,  # [classes] float32 between 0 and 1, this layer's theta per token class
    token_class: Tensor,  # [T] int8, index into thresholds
    num_tokens: Tensor | None = None,  # [] int, rows from here on are padding; None: there are none
    *,
    scores: Tensor | None = None,  # [T, E] float32, the router's probabilities (`piggyback`); None: `top_k`
    renormalize: bool = False,
    replaced: Tensor | None = None,  # [T] int32, in place: each token's assignments that its own experts do not serve
) -> tuple[Tensor, Tensor]:
    """Fewer experts by token: of its K a token is sure of its k0 = max(1, floor(theta * K + 0.5)) best.

    - `top_k`: it has those alone;
    - `piggyback` (after OEA, arXiv 2511.02237): the sure experts of all tokens are loaded, and each token has its best up to K
      among them (ties by index).

    Gate weights are those of the experts a token has, summing to 1 with `renormalize`. Tokens with k0 = K are left alone.
    Returns slots [T, K] int64, -1 where nothing is to be computed, and weights [T, K] float32, of no meaning there.
    """
    top_k = experts.shape[1]
    valid = _valid(experts, num_tokens)
    num_sure = torch.floor(thresholds * top_k + 0.5).clamp(min=1).long()[token_class.long()].unsqueeze(1)
    sure = torch.arange(top_k, device=experts.device) < num_sure
    whole = (num_sure >= top_k) | ~valid
    if scores is None:
        chosen, served, new_weights = experts, sure, weights
    else:
        loaded = torch.zeros(len(expert_slots), dtype=torch.int32, device=experts.device)
        loaded.index_add_(0, experts.flatten(), (sure & valid).flatten().int())
        best = torch.where(loaded > 0, scores, -1.0).sort(dim=1, descending=True, stable=True)
        chosen, new_weights = best.indices[:, :top_k], best.values[:, :top_k]
        served = new_weights >= 0
    if renormalize:
        new_weights = new_weights / _ordered_sum(torch.where(served, new_weights, 0.0))
    if replaced is not None:
        own = ((chosen.unsqueeze(1) == experts.unsqueeze(2)) & served.unsqueeze(1)).any(2)
        replaced += (~(own | whole)).sum(1)
    slots = torch.where(whole, expert_slots[experts], torch.where(served, expert_slots[chosen], -1))
    return torch.where(valid, slots, -1), torch.where(whole, weights, new_weights)


def _valid(experts: Tensor, num_tokens: Tensor | None) -> Tensor:
    """[T, 1] bool: rows that are not padding."""
    rows = torch.arange(len(experts), device=experts.device).unsqueeze(1)
    return rows >= 0 if num_tokens is None else rows < num_tokens


def _fractions(thresholds: Tensor) -> Tensor:
    """[classes] int64: thresholds in units of 2^-FRACTION_BITS."""
    return torch.floor(thresholds * 2**FRACTION_BITS + 0.5).long()


def _num_best(thresholds: Tensor, token_class: Tensor, top_k: int) -> Tensor:
    """[T, 1] int64: experts that a token has under `united_top_k`."""
    one = 1 << FRACTION_BITS
    return (((_fractions(thresholds) + one) * top_k + one) >> (FRACTION_BITS + 1))[token_class.long()].unsqueeze(1)


def _demand(
    experts: Tensor,
    weights: Tensor,
    thresholds: Tensor,
    token_class: Tensor,
    valid: Tensor,  # [T, K] bool
    num_experts: int,
    ranking: str,
) -> tuple[Tensor, Tensor]:
    """[E] int64 demand of each expert, and [E] int64 the largest theta of the tokens routed to it, as a fraction."""
    theta = torch.where(valid, _fractions(thresholds)[token_class.long()].unsqueeze(1), 0)
    if ranking == "gate_mass":
        # At least 1: an expert that tokens are routed to is never without demand. NaN (a request gone wrong) counts as little.
        bounded = torch.nan_to_num(weights, nan=0.0).clamp(0.0, LARGEST_WEIGHT)
        share = torch.floor(bounded * 2**FRACTION_BITS + 0.5).long().clamp(min=1)
    else:
        share = torch.ones_like(experts)
    zeros = torch.zeros(num_experts, dtype=torch.int64, device=experts.device)
    flat = experts.flatten()
    demand = zeros.index_add(0, flat, torch.where(valid, share, 0).flatten())
    return demand, zeros.scatter_reduce(0, flat, theta.flatten(), "amax")


def _merge(slots: Tensor, weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """In the marked rows [T, 1], make one assignment of those with equal slots."""
    top_k = slots.shape[1]
    same = (slots.unsqueeze(1) == slots.unsqueeze(2)) & rows.unsqueeze(2)
    place = torch.arange(top_k, device=slots.device)
    repeats = (same & (place < place.unsqueeze(1))).any(2)
    merged = _ordered_sum(torch.where(same, weights.unsqueeze(1), 0.0)).squeeze(2)
    return torch.where(repeats, -1, slots), torch.where(rows, merged, weights)


def _ordered_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension, which stays with size 1, from first to last: float sums depend on their order."""
    total = values[..., :1]
    for k in range(1, values.shape[-1]):
        total = total + values[..., k : k + 1]
    return total
