"""Paged attention for sequences with one query token each: split over the keys, then combined (flash decoding)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from backend.kernels.gpu.common import dot, num_processors, power_of_2

#: Keys that a program takes at a time, and the least that make a split worth its place.
_KEYS = 64
LEAST_SPLIT = 256
_MOST_SPLITS = 64
#: Programs wanted per processor, so that long and short sequences even out.
_PROGRAMS_PER_PROCESSOR = 4
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _split_of(length, splits, LEAST: tl.constexpr, KEYS: tl.constexpr):
    """Keys of one split, a multiple of KEYS: `length` keys shared by at most `splits` programs."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, splits), KEYS) * KEYS, LEAST)


@triton.jit(do_not_specialize=["stride_table", "num_seqs"])
def _decode_kernel(
    q_ptr,  # [S, H, D]
    k_cache_ptr,  # [N, C, G, D]
    v_cache_ptr,
    tables_ptr,  # [S, B] int32
    lens_ptr,  # [S] int32
    out_ptr,  # [S, H, D], written if SPLITS is 1
    partial_ptr,  # [S, H, SPLITS, D] float32: sum of exp2(score - top) * v
    tops_ptr,  # [2, S, H, SPLITS] float32: largest score, and sum of exp2(score - top)
    scale,
    stride_q,
    stride_q_head,
    stride_table,
    num_seqs,
    window,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a KV head
    KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,  # C
    DIM: tl.constexpr,  # D
    ROWS: tl.constexpr,  # power of 2, at least GROUP and 16
    LANES: tl.constexpr,  # power of 2, at least D and 16
    KEYS: tl.constexpr,
):
    """Grid (G, SPLITS, S): all query heads of one KV head over one part of a sequence's visible keys."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    end = tl.load(lens_ptr + seq)
    first = 0
    if WINDOW:
        first = tl.maximum(end - window, 0)
    size = _split_of(end - first, SPLITS, LEAST, KEYS)
    begin = first + split * size
    if SPLITS > 1 and begin >= end:
        return
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    key = tl.arange(0, KEYS)
    head = kv_head * GROUP + row
    row_mask = row < GROUP
    lane_mask = lane < DIM
    q = tl.load(
        q_ptr + seq * stride_q + head[:, None] * stride_q_head + lane[None, :],
        mask=row_mask[:, None] & lane_mask[None, :],
        other=0.0,
    ).to(k_cache_ptr.dtype.element_ty)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, LANES], tl.float32)
    last = tl.minimum(begin + size, end)
    for start in range(begin, last, KEYS):
        position = start + key
        inside = position < last
        block = tl.load(tables_ptr + seq * stride_table + position // BLOCK, mask=inside, other=0).to(tl.int64)
        place = ((block * BLOCK + position % BLOCK) * KV_HEADS + kv_head) * DIM
        k = tl.load(k_cache_ptr + place[None, :] + lane[:, None], mask=inside[None, :] & lane_mask[:, None], other=0.0)
        scores = dot(q, k, tl.zeros([ROWS, KEYS], tl.float32)) * (scale * _LOG2_E)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(scores - new_top[:, None])
        v = tl.load(v_cache_ptr + place[:, None] + lane[None, :], mask=inside[:, None] & lane_mask[None, :], other=0.0)
        acc = dot(weight.to(v.dtype), v, acc * shrink[:, None])
        total = total * shrink + tl.sum(weight, 1)
        top = new_top
    if SPLITS == 1:
        tl.store(
            out_ptr + (seq * KV_HEADS * GROUP + head[:, None]) * DIM + lane[None, :],
            # A sequence without keys (a padding row) gets zeros.
            (acc / tl.where(total > 0, total, 1.0)[:, None]).to(out_ptr.dtype.element_ty),
            mask=row_mask[:, None] & lane_mask[None, :],
        )
    else:
        place = (seq * KV_HEADS * GROUP + head) * SPLITS + split
        tl.store(partial_ptr + place[:, None] * DIM + lane[None, :], acc, mask=row_mask[:, None] & lane_mask[None, :])
        tl.store(tops_ptr + place, top, mask=row_mask)
        tl.store(tops_ptr + tl.cast(num_seqs, tl.int64) * KV_HEADS * GROUP * SPLITS + place, total, mask=row_mask)


@triton.jit(do_not_specialize=["num_rows"])
def _combine_kernel(
    partial_ptr,  # [S, H, SPLITS, D] float32
    tops_ptr,  # [2, S, H, SPLITS] float32
    lens_ptr,  # [S] int32
    out_ptr,  # [S, H, D]
    num_rows,  # S * H
    window,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,  # power of 2, at least SPLITS
    KEYS: tl.constexpr,
):
    """Grid (S * H): one query head each."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lens_ptr + row // HEADS)
    if WINDOW:
        length = tl.minimum(length, window)
    used = tl.cdiv(length, _split_of(length, SPLITS, LEAST, KEYS))
    part = tl.arange(0, PARTS)
    lane = tl.arange(0, LANES)
    mask = part < used
    place = row * SPLITS + part
    tops = tl.load(tops_ptr + place, mask=mask, other=float("-inf"))
    totals = tl.load(tops_ptr + tl.cast(num_rows, tl.int64) * SPLITS + place, mask=mask, other=0.0)
    # -inf - -inf must not become NaN in a sequence without keys.
    share = tl.exp2(tops - tl.maximum(tl.max(tops, 0), -1e30))
    acc = tl.load(
        partial_ptr + place[:, None] * DIM + lane[None, :], mask=mask[:, None] & (lane < DIM)[None, :], other=0.0
    )
    total = tl.sum(totals * share, 0)
    value = tl.sum(acc * share[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * DIM + lane, value.to(out_ptr.dtype.element_ty), mask=lane < DIM)


def decode_attention(
    q: Tensor,  # [S, H, D]
    k_cache: Tensor,  # [N, C, G, D]
    v_cache: Tensor,  # [N, C, G, D]
    block_tables: Tensor,  # [S, B] int32
    context_lens: Tensor,  # [S] int32, cached tokens of the sequence, its query's own included
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """Softmax(scale * q k) v over a sequence's last `sliding_window` tokens (all if None); returns [S, H, D]."""
    longest = block_tables.shape[1] * k_cache.shape[1]
    if sliding_window is not None:
        longest = min(longest, sliding_window)
    splits = num_splits(q.shape[0] * k_cache.shape[2], longest, num_processors(q.device))
    return attend_in_splits(q, k_cache, v_cache, block_tables, context_lens, scale, sliding_window, splits, LEAST_SPLIT)


def num_splits(programs: int, longest: int, processors: int) -> int:
    """Parts to split the keys into when `programs` programs see up to `longest` keys each: a power of 2."""
    wanted = _PROGRAMS_PER_PROCESSOR * processors // max(1, programs)
    most = min(_MOST_SPLITS, -(-longest // LEAST_SPLIT), max(1, wanted))
    return 1 << (most.bit_length() - 1)


def attend_in_splits(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None,
    splits: int,
    least: int,
    out: Tensor | None = None,
) -> Tensor:
    """`decode_attention` with up to `splits` parts of at least `least` keys (a multiple of 64); writes to `out` if given."""
    num_seqs, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    if out is None:
        out = torch.empty((num_seqs, heads, head_dim), dtype=q.dtype, device=q.device)
    if num_seqs == 0:
        return out
    if q.stride(2) != 1:
        q = q.contiguous()
    window = 0 if sliding_window is None else sliding_window
    partial, tops = out, out
    if splits > 1:
        partial = q.new_empty((num_seqs, heads, splits, head_dim), dtype=torch.float32)
        tops = q.new_empty((2, num_seqs, heads, splits), dtype=torch.float32)
    lanes = max(16, power_of_2(head_dim))
    wide = k_cache.element_size() == 4  # for comparisons only
    keys = _KEYS // 2 if wide else _KEYS
    common = {"WINDOW": window > 0, "SPLITS": splits, "LEAST": least, "DIM": head_dim, "LANES": lanes, "KEYS": keys}
    _decode_kernel[(kv_heads, splits, num_seqs)](
        q,
        k_cache,
        v_cache,
        block_tables,
        context_lens,
        out,
        partial,
        tops,
        scale,
        q.stride(0),
        q.stride(1),
        block_tables.stride(0),
        num_seqs,
        window,
        GROUP=heads // kv_heads,
        KV_HEADS=kv_heads,
        BLOCK=block_size,
        ROWS=max(16, power_of_2(heads // kv_heads)),
        num_warps=4,
        num_stages=2 if wide else 3,
        **common,
    )
    if splits > 1:
        _combine_kernel[(num_seqs * heads,)](
            partial,
            tops,
            context_lens,
            out,
            num_seqs * heads,
            window,
            HEADS=heads,
            PARTS=power_of_2(splits),
            num_warps=4,
            **common,
        )
    return out
