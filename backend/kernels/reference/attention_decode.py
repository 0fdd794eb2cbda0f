"""Paged attention for sequences with one query token each.

Where tokens lie in the cache is the same in every layer, so it is worked out once a step (`plan_decode`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Sequences are padded to the longest of their group; one this much shorter than the longest starts a new group.
_SHORTEST_IN_GROUP = 0.6
_SUM_MODE = 0  # of embedding bags


@dataclass(frozen=True)
class _Group:
    """Sequences of similar length. S: how many, L: visible tokens of the longest; H = G * Q query heads."""

    sequences: Tensor  # [S] int64, their rows in the step
    hidden: Tensor  # [S, 1, 1, L] bool, padding
    rows: Tensor  # [S, G, L] int32, row of each token's key and value in the cache seen as [N * C * G, D]
    bag_rows: Tensor  # [S * H, L] int32, the same for each query head
    #: With one query head per key head only, in the order of memory: [S * L * G] int32.
    dot_rows: Tensor | None
    dot_bags: Tensor | None  # which query [S * G] each row of dot_rows meets


@dataclass(frozen=True)
class DecodePlan:
    """Where the visible tokens of each decoding sequence lie."""

    groups: tuple[_Group, ...]


def plan_decode(
    block_tables: Tensor,  # [S, B] int32
    context_lens: Sequence[int],  # [S], cached tokens of the sequence, its query's own included
    block_size: int,
    heads: int,
    kv_heads: int,
    sliding_window: int | None,
) -> DecodePlan:
    """Plan for all layers of a step that have this window; None: every cached token is visible."""
    visible = [n if sliding_window is None else min(n, sliding_window) for n in context_lens]
    longest_first = sorted(range(len(visible)), key=visible.__getitem__, reverse=True)
    groups, start = [], 0
    for i in range(1, len(longest_first) + 1):
        if i == len(longest_first) or visible[longest_first[i]] < _SHORTEST_IN_GROUP * visible[longest_first[start]]:
            members = longest_first[start:i]
            lens = [visible[s] for s in members]
            firsts = [context_lens[s] - visible[s] for s in members]
            groups.append(_plan_group(block_tables, members, firsts, lens, block_size, heads, kv_heads))
            start = i
    return DecodePlan(tuple(groups))


def _plan_group(
    block_tables: Tensor,
    members: list[int],
    firsts: list[int],  # position of each sequence's first visible token
    lens: list[int],
    block_size: int,
    heads: int,
    kv_heads: int,
) -> _Group:
    device = block_tables.device
    sequences = torch.tensor(members, device=device)
    offsets = torch.arange(max(lens), device=device)
    hidden = offsets >= torch.tensor(lens, device=device).unsqueeze(1)
    # Padding reads the first visible token again.
    positions = offsets.masked_fill(hidden, 0) + torch.tensor(firsts, device=device).unsqueeze(1)
    blocks = block_tables.index_select(0, sequences).gather(1, positions // block_size)
    tokens = blocks * block_size + (positions % block_size).int()  # [S, L] int32
    kv_range = torch.arange(kv_heads, device=device, dtype=torch.int32)
    rows = (tokens * kv_heads).unsqueeze(1) + kv_range.unsqueeze(1)
    dot_rows = dot_bags = None
    if heads == kv_heads:
        dot_rows = ((tokens * kv_heads).unsqueeze(2) + kv_range).view(-1)
        queries = torch.arange(len(members), device=device, dtype=torch.int32) * heads
        dot_bags = (queries.unsqueeze(1) + kv_range).unsqueeze(1).expand(*tokens.shape, heads).contiguous().view(-1)
    bag_rows = rows.unsqueeze(2).expand(-1, -1, heads // kv_heads, -1).reshape(-1, rows.shape[2])
    return _Group(sequences, hidden.unsqueeze(1).unsqueeze(1), rows, bag_rows, dot_rows, dot_bags)


def decode_attention(
    q: Tensor,  # [S, H, D]
    k_cache: Tensor,  # [N, C, G, D]
    v_cache: Tensor,  # [N, C, G, D]
    plan: DecodePlan,
    scale: float,
) -> Tensor:
    """Softmax(scale * q k) v over each sequence's visible tokens; returns [S, H, D] of q's type.

    Built from embedding-bag operators, which read rows of the cache in place: gathering keys and values first costs three
    times the memory traffic, which is what bounds this step.
    """
    out = torch.empty_like(q)
    k_rows, v_rows = k_cache.view(-1, q.shape[2]), v_cache.view(-1, q.shape[2])
    for group in plan.groups:
        scaled = (q.index_select(0, group.sequences) * scale).to(k_cache.dtype)  # [S, H, D]
        scores = _scores(scaled, k_rows, group)  # [S, G, Q, L]
        scores = scores.masked_fill_(group.hidden, float("-inf")).softmax(-1)
        attended = torch.nn.functional.embedding_bag(
            group.bag_rows, v_rows, mode="sum", per_sample_weights=scores.to(v_rows.dtype).view(group.bag_rows.shape)
        )
        out[group.sequences] = attended.view(scaled.shape).to(q.dtype)
    return out


def _scores(q: Tensor, k_rows: Tensor, group: _Group) -> Tensor:
    """q [S, H, D] against every token of the group: [S, G, Q, L] float32."""
    num_seqs, kv_heads, length = group.rows.shape
    if group.dot_rows is not None:
        # The gradient of a bag's weights is the dot product of its rows with the bag's gradient: q k, without a gather.
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            q.flatten(0, 1), k_rows, group.dot_rows, group.dot_bags[:1], group.dot_bags, _SUM_MODE
        )
        return dots.view(num_seqs, length, kv_heads, 1).permute(0, 2, 3, 1).float().contiguous()
    # Several query heads share a key: here the gather pays, and the rest is a matrix product.
    k = k_rows.index_select(0, group.rows.view(-1)).view(num_seqs, kv_heads, length, -1)
    return torch.matmul(q.view(num_seqs, kv_heads, -1, q.shape[2]), k.transpose(2, 3)).float()
