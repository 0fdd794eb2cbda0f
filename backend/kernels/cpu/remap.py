"""Remap, compiled: a few passes over the assignments; the same slots and weights as the reference, bit for bit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from backend.kernels.cpu.compiled import ZERO, exact_kernel
from backend.kernels.reference.remap import FRACTION_BITS, LARGEST_WEIGHT
from backend.kernels.reference.shared_slots import SharedSlots

_UNITED, _REROUTE, _DROP, _UNITED_TOP_K = 0, 1, 2, 3
_CODES = {"united": _UNITED, "reroute": _REROUTE, "drop": _DROP, "united_top_k": _UNITED_TOP_K}
_ONE = 1 << FRACTION_BITS
_UNIT, _HALF, _LARGEST = np.float32(1 << FRACTION_BITS), np.float32(0.5), np.float32(LARGEST_WEIGHT)
_NO_SIMILARITY, _NO_SCORES = np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32)


def remap_experts(
    experts: Tensor,  # [T, K] int64
    weights: Tensor,  # [T, K] float32
    expert_slots: Tensor,  # [E] int64
    thresholds: Tensor,  # [classes] float32
    token_class: Tensor,  # [T] int8
    num_tokens: Tensor | None = None,  # [] int
    *,
    united_slots: Tensor | None = None,  # [E] int64
    mechanism: str = "united",
    ranking: str = "count",
    similarity: Tensor | None = None,  # [E, E] float32
    similarity_min: Tensor | None = None,  # [] float32
    renormalize: bool = False,
    replaced: Tensor | None = None,  # [T] int32, in place
    shared: SharedSlots | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    if num_tokens is None and min(thresholds.tolist()) >= 1.0 and expert_slots.numpy().min() >= 0:
        slots = expert_slots[experts]
        return (slots, weights) if shared is None else shared.added_to(slots, weights)
    slots = torch.empty_like(experts, memory_format=torch.contiguous_format)
    out = torch.empty_like(weights, memory_format=torch.contiguous_format)
    # Without united experts each expert is alone in its group.
    groups = np.arange(len(expert_slots)) if united_slots is None else united_slots.numpy()
    _remap(
        experts.contiguous().numpy(),
        weights.contiguous().numpy(),
        expert_slots.numpy(),
        groups,
        thresholds.numpy(),
        token_class.numpy(),
        len(experts) if num_tokens is None else int(num_tokens),
        _CODES[mechanism],
        ranking == "gate_mass",
        _NO_SIMILARITY if similarity is None else similarity.numpy(),
        ZERO if similarity_min is None else np.float32(similarity_min.item()),
        renormalize,
        _counters(replaced, experts),
        slots.numpy(),
        out.numpy(),
    )
    return (slots, out) if shared is None else shared.added_to(slots, out, num_tokens)


def select_experts(
    experts: Tensor,  # [T, K] int64
    weights: Tensor,  # [T, K] float32
    expert_slots: Tensor,  # [E] int64
    thresholds: Tensor,  # [classes] float32
    token_class: Tensor,  # [T] int8
    num_tokens: Tensor | None = None,  # [] int
    *,
    scores: Tensor | None = None,  # [T, E] float32
    renormalize: bool = False,
    replaced: Tensor | None = None,  # [T] int32, in place
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    if num_tokens is None and min(thresholds.tolist()) >= 1.0:
        return expert_slots[experts], weights
    slots = torch.empty_like(experts, memory_format=torch.contiguous_format)
    out = torch.empty_like(weights, memory_format=torch.contiguous_format)
    _select(
        experts.contiguous().numpy(),
        weights.contiguous().numpy(),
        expert_slots.numpy(),
        thresholds.numpy(),
        token_class.numpy(),
        len(experts) if num_tokens is None else int(num_tokens),
        _NO_SCORES if scores is None else scores.contiguous().numpy(),
        renormalize,
        _counters(replaced, experts),
        slots.numpy(),
        out.numpy(),
    )
    return slots, out


def _counters(replaced: Tensor | None, experts: Tensor) -> np.ndarray:
    return np.zeros(len(experts), np.int32) if replaced is None else replaced.numpy()


@exact_kernel
def _remap(
    experts,
    weights,
    expert_slots,
    united_slots,
    thresholds,
    token_class,
    num_tokens,
    mechanism,
    by_mass,
    similarity,
    similarity_min,
    renormalize,
    replaced,
    slots,
    out,
):
    """Fills slots and out."""
    top_k = experts.shape[1]
    num_experts = len(expert_slots)
    slots[num_tokens:] = -1
    theta_of_class, best_of_class = np.empty(len(thresholds), np.int64), np.full(len(thresholds), top_k)
    for i in range(len(thresholds)):
        theta_of_class[i] = np.int64(thresholds[i] * _UNIT + _HALF)
        if mechanism == _UNITED_TOP_K:
            best_of_class[i] = ((theta_of_class[i] + _ONE) * top_k + _ONE) >> (FRACTION_BITS + 1)

    demand, theta = np.zeros(num_experts, np.int64), np.zeros(num_experts, np.int64)
    total = 0
    for t in range(num_tokens):
        own_theta = theta_of_class[token_class[t]]
        for k in range(best_of_class[token_class[t]]):
            share = _fraction(weights[t, k]) if by_mass else 1
            e = experts[t, k]
            demand[e] += share
            theta[e] = max(theta[e], own_theta)
            total += share
    kept, moved = np.zeros(num_experts, np.bool_), np.zeros(num_experts, np.bool_)
    target = expert_slots.copy()
    for e in range(num_experts):
        if demand[e]:
            before = 0
            for f in range(num_experts):
                ahead = demand[f] > demand[e] or (demand[f] == demand[e] and f < e)
                before += demand[f] if ahead else 0
            kept[e] = expert_slots[e] >= 0 and before << FRACTION_BITS < theta[e] * total
            moved[e] = not kept[e]
    if mechanism in (_UNITED, _UNITED_TOP_K):
        _unite(moved, united_slots, expert_slots, target)
    elif mechanism == _REROUTE:
        _reroute(moved, kept, similarity, similarity_min, expert_slots, target)
    else:
        for e in range(num_experts):
            if moved[e]:
                target[e] = -1
    for e in range(num_experts):
        if expert_slots[e] < 0:
            moved[e] = demand[e] > 0
            target[e] = united_slots[e]

    for t in range(num_tokens):
        num_moved, num_best = 0, best_of_class[token_class[t]]
        for k in range(num_best):
            e = experts[t, k]
            slots[t, k] = target[e]
            num_moved += moved[e]
        slots[t, num_best:] = -1
        replaced[t] += num_moved + top_k - num_best
        out[t] = weights[t]
        if renormalize and num_best < top_k:
            total = ZERO
            for k in range(num_best):
                total += weights[t, k]
            for k in range(top_k):
                out[t, k] /= total
        if num_moved:
            for k in range(num_best):
                for j in range(k):
                    if slots[t, k] >= 0 and slots[t, j] == slots[t, k]:
                        out[t, j] += out[t, k]
                        slots[t, k] = -1
    out[num_tokens:] = weights[num_tokens:]


@exact_kernel
def _unite(moved, united_slots, expert_slots, target):
    """Move the experts of groups where two or more are to be moved, and those that are not there; the others stay."""
    num_slots = 0
    for e in range(len(moved)):
        num_slots = max(num_slots, united_slots[e] + 1)
    size = np.zeros(num_slots, np.int64)
    for e in range(len(moved)):
        size[united_slots[e]] += moved[e]
    for e in range(len(moved)):
        moved[e] = moved[e] and (expert_slots[e] < 0 or size[united_slots[e]] >= 2)
        if moved[e]:
            target[e] = united_slots[e]


@exact_kernel
def _reroute(moved, kept, similarity, similarity_min, expert_slots, target):
    """Move each expert to the most similar kept one that is similar enough; the others stay."""
    for e in range(len(moved)):
        if moved[e]:
            best = -1
            for f in range(len(moved)):
                if kept[f] and (best < 0 or similarity[e, f] > similarity[e, best]):
                    best = f
            moved[e] = best >= 0 and similarity[e, best] >= similarity_min
            if moved[e]:
                target[e] = expert_slots[best]


@exact_kernel
def _fraction(weight):
    """A gate weight as a whole number of 2^-16, at least 1; NaN is 1."""
    if not weight > ZERO:
        return np.int64(1)
    return max(np.int64(1), np.int64(min(weight, _LARGEST) * _UNIT + _HALF))


@exact_kernel
def _select(
    experts, weights, expert_slots, thresholds, token_class, num_tokens, scores, renormalize, replaced, slots, out
):
    """Fills slots and out."""
    top_k = experts.shape[1]
    num_experts = scores.shape[1]
    sure = np.empty(len(thresholds), np.int64)
    for i in range(len(thresholds)):
        sure[i] = max(np.int64(1), np.int64(thresholds[i] * np.float32(top_k) + _HALF))
    slots[num_tokens:] = -1
    out[num_tokens:] = weights[num_tokens:]
    loaded = np.zeros(num_experts, np.bool_)
    if num_experts and sure.min() < top_k:
        for t in range(num_tokens):
            for k in range(min(top_k, sure[token_class[t]])):
                loaded[experts[t, k]] = True
    for t in range(num_tokens):
        num_sure = sure[token_class[t]]
        if num_sure >= top_k:
            for k in range(top_k):
                slots[t, k] = expert_slots[experts[t, k]]
            out[t] = weights[t]
            continue
        if num_experts:
            num_own = _best_loaded(experts[t], scores[t], loaded, expert_slots, slots[t], out[t])
        else:
            for k in range(top_k):
                slots[t, k] = expert_slots[experts[t, k]] if k < num_sure else -1
            out[t] = weights[t]
            num_own = num_sure
        replaced[t] += top_k - num_own
        if renormalize:
            total = ZERO
            for k in range(top_k):
                if slots[t, k] >= 0:
                    total += out[t, k]
            for k in range(top_k):
                out[t, k] /= total


@exact_kernel
def _best_loaded(experts, scores, loaded, expert_slots, slots, out):
    """Slots and scores [K] of a token's best loaded experts, best first; returns how many of them the router chose."""
    top_k, found = len(experts), 0
    for e in range(len(scores)):
        score = scores[e]
        if not (loaded[e] and score >= ZERO) or (found == top_k and score <= out[top_k - 1]):
            continue
        k = min(found, top_k - 1)
        while k > 0 and score > out[k - 1]:  # an equal one stays ahead: it has the lower index
            slots[k], out[k] = slots[k - 1], out[k - 1]
            k -= 1
        slots[k], out[k] = e, score
        found = min(found + 1, top_k)
    num_own = 0
    for k in range(found):
        for j in range(top_k):
            num_own += experts[j] == slots[k]
        slots[k] = expert_slots[slots[k]]
    slots[found:] = -1
    return num_own
