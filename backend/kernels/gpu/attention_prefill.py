"""Paged attention for sequences with any number of query tokens: the last tokens of a cached context (flash attention)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from backend.kernels.gpu.common import dot, power_of_2
from backend.kernels.query_tiles import query_tiles, tile_queries, tile_rows
from backend.kernels.transfer import to_device

#: Keys that a program takes at a time.
_KEYS = 64
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend(
    q,  # [ROWS, LANES]
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,  # this sequence's row of the block table
    acc,  # [ROWS, LANES] float32
    top,  # [ROWS] float32
    total,  # [ROWS] float32
    query,  # [ROWS] int32, positions of the queries
    begin,
    end,
    kv_head,
    scale,
    window,
    MASK: tl.constexpr,  # whether some query does not see some key
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Go on with the softmax over keys `begin` to `end`."""
    lane = tl.arange(0, LANES)
    lane_mask = lane < DIM
    for start in range(begin, end, KEYS):
        position = start + tl.arange(0, KEYS)
        inside = position < end
        block = tl.load(table_ptr + position // BLOCK, mask=inside, other=0).to(tl.int64)
        place = ((block * BLOCK + position % BLOCK) * KV_HEADS + kv_head) * DIM
        k = tl.load(k_cache_ptr + place[None, :] + lane[:, None], mask=inside[None, :] & lane_mask[:, None], other=0.0)
        scores = dot(q, k.to(q.dtype), tl.zeros([ROWS, KEYS], tl.float32)) * (scale * _LOG2_E)
        if MASK:
            visible = inside[None, :] & (position[None, :] <= query[:, None])
            if WINDOW:
                visible &= position[None, :] > query[:, None] - window
            scores = tl.where(visible, scores, float("-inf"))
        # A row that has seen no key yet has no top: -inf - -inf must not become NaN.
        new_top = tl.maximum(top, tl.maximum(tl.max(scores, 1), -1e30))
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(scores - new_top[:, None])
        v = tl.load(
            v_cache_ptr + place[:, None] + lane[None, :], mask=inside[:, None] & lane_mask[None, :], other=0.0
        ).to(q.dtype)
        acc = dot(weight.to(q.dtype), v, acc * shrink[:, None])
        total = total * shrink + tl.sum(weight, 1)
        top = new_top
    return acc, top, total


# The tables of prompts that stand behind decoding sequences begin anywhere: no other kernel for each such place.
@triton.jit(do_not_specialize=["stride_table"], do_not_specialize_on_alignment=["tables_ptr"])
def _prefill_kernel(
    q_ptr,  # [T, H, D]
    k_cache_ptr,  # [N, C, G, D]
    v_cache_ptr,
    tables_ptr,  # [S, B] int32
    tiles_ptr,  # [W, 4] int32: sequence, first row, first position, queries
    out_ptr,  # [T, H, D]
    scale,
    stride_q,
    stride_q_head,
    stride_table,
    window,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Grid (G, W): some queries of one sequence, all query heads of one KV head; row r is query r // GROUP."""
    kv_head = tl.program_id(0)
    tile = tiles_ptr + tl.program_id(1) * 4
    seq = tl.load(tile).to(tl.int64)
    first_row = tl.load(tile + 1).to(tl.int64)
    first = tl.load(tile + 2)
    count = tl.load(tile + 3)
    if count == 0:
        return
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    mask = (row < count * GROUP)[:, None] & (lane < DIM)[None, :]
    token = first_row + row // GROUP
    head = kv_head * GROUP + row % GROUP
    q = tl.load(q_ptr + token[:, None] * stride_q + head[:, None] * stride_q_head + lane[None, :], mask=mask, other=0.0)
    query = first + row // GROUP
    acc = tl.zeros([ROWS, LANES], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    table = tables_ptr + seq * stride_table
    begin = 0
    if WINDOW:
        begin = tl.maximum(first - window + 1, 0) // KEYS * KEYS
    else:
        # Keys before the first query are seen by all; whole steps of them need no mask.
        begin = first // KEYS * KEYS
        acc, top, total = _attend(
            q, k_cache_ptr, v_cache_ptr, table, acc, top, total, query, 0, begin, kv_head, scale, window,
            False, False, KV_HEADS, BLOCK, DIM, ROWS, LANES, KEYS,
        )  # fmt: skip
    acc, top, total = _attend(
        q, k_cache_ptr, v_cache_ptr, table, acc, top, total, query, begin, first + count, kv_head, scale, window,
        True, WINDOW, KV_HEADS, BLOCK, DIM, ROWS, LANES, KEYS,
    )  # fmt: skip
    out = acc / tl.where(total > 0, total, 1.0)[:, None]  # rows beyond the last query have no sum
    place = (token[:, None] * KV_HEADS * GROUP + head[:, None]) * DIM + lane[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mask)


@lru_cache(maxsize=4)
def _tiles(query_lens: tuple[int, ...], context_lens: tuple[int, ...], queries: int, device: torch.device) -> Tensor:
    """`query_tiles` on the device. Every layer of a step asks alike."""
    return to_device([query_tiles(query_lens, context_lens, queries)], device)[0]


def prefill_attention(
    q: Tensor,  # [T, H, D], sequences end to end
    k_cache: Tensor,  # [N, C, G, D], already holds the queries' own keys
    v_cache: Tensor,  # [N, C, G, D]
    block_tables: Tensor,  # [S, B] int32
    query_lens: Sequence[int],  # [S], query tokens; their sum is T
    context_lens: Sequence[int],  # [S], cached tokens after this step, queries included
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """Causal attention of each sequence's last `query_lens` positions over its cached tokens; returns [T, H, D].

    With a sliding window a query sees the last `sliding_window` tokens, itself included.
    """
    queries = tile_queries(q.shape[1] // k_cache.shape[2], q.element_size())
    tiles = _tiles(tuple(query_lens), tuple(context_lens), queries, q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    attend_tiles(q, k_cache, v_cache, block_tables, tiles, out, scale, sliding_window)
    return out


def attend_tiles(
    q: Tensor,  # [T, H, D]
    k_cache: Tensor,  # [N, C, G, D]
    v_cache: Tensor,  # [N, C, G, D]
    block_tables: Tensor,  # [S, B] int32
    tiles: Tensor,  # [W, 4] int32, see `query_tiles`; one without queries is left out
    out: Tensor,  # [T, H, D] contiguous, written in the tiles' rows
    scale: float,
    sliding_window: int | None,
) -> None:
    """`prefill_attention` of the queries in the tiles."""
    if len(tiles) == 0:
        return
    heads, head_dim = q.shape[1:]
    block_size, kv_heads = k_cache.shape[1:3]
    if q.stride(2) != 1:
        q = q.contiguous()
    wide = q.element_size() == 4
    _prefill_kernel[(kv_heads, len(tiles))](
        q,
        k_cache,
        v_cache,
        block_tables,
        tiles,
        out,
        scale,
        q.stride(0),
        q.stride(1),
        block_tables.stride(0),
        0 if sliding_window is None else sliding_window,
        WINDOW=sliding_window is not None,
        GROUP=heads // kv_heads,
        KV_HEADS=kv_heads,
        BLOCK=block_size,
        DIM=head_dim,
        ROWS=tile_rows(heads // kv_heads, q.element_size()),
        LANES=max(16, power_of_2(head_dim)),
        KEYS=_KEYS // 2 if wide else _KEYS,
        num_warps=4 if wide else 8,
        num_stages=2 if wide else 3,
    )
