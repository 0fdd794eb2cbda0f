"""Bytes and FLOPs that each kernel's arguments call for; the functions take what the kernel takes.

Every byte is counted once, however often a kernel reads it; a multiply-add is two FLOPs, elementwise work is not counted
except where there is nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loadtest.bench.floors import Cost


def grouped_experts_forward(hidden: Tensor, w13: Tensor, w2: Tensor, slots: Tensor, weights: Tensor) -> Cost:
    """The weights of the active slots, the rows in and out, three products per assignment."""
    served = slots[slots >= 0]
    read = served.unique().numel() * (w13[0].nbytes + w2[0].nbytes)
    return Cost(
        read + 2 * hidden.nbytes + slots.nbytes + weights.nbytes,
        2 * served.numel() * (w13[0].numel() + w2[0].numel()),
    )


def experts_add_rms_norm(
    hidden: Tensor, w13: Tensor, w2: Tensor, slots: Tensor, weights: Tensor, residual: Tensor, norm: Tensor, eps: float
) -> Cost:
    """One after the other, but for the experts' sum, which is neither written nor read."""
    experts = grouped_experts_forward(hidden, w13, w2, slots, weights)
    return experts + add_rms_norm(hidden, residual, norm, eps) + Cost(-2 * hidden.nbytes)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None,
) -> Cost:
    """The keys and values that each query sees."""
    del scale
    visible = context_lens if sliding_window is None else context_lens.clamp(max=sliding_window)
    seen = int(visible.sum())
    token_bytes = k_cache[0, 0].nbytes + v_cache[0, 0].nbytes
    return Cost(seen * token_bytes + 2 * q.nbytes + block_tables.nbytes + context_lens.nbytes, 4 * seen * q[0].numel())


def prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    scale: float,
    sliding_window: int | None,
) -> Cost:
    """The keys and values that any query of a chunk sees, and the causal pairs of query and key."""
    del scale
    tokens = pairs = 0
    for num_queries, context in zip(query_lens, context_lens, strict=True):
        window = sliding_window or context
        tokens += min(context, num_queries + window - 1)
        pairs += sum(min(position + 1, window) for position in range(context - num_queries, context))
    token_bytes = k_cache[0, 0].nbytes + v_cache[0, 0].nbytes
    return Cost(tokens * token_bytes + 2 * q.nbytes + block_tables.nbytes, 4 * pairs * q[0].numel())


def mixed_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    tiles: Tensor,
    scale: float,
    sliding_window: int | None,
) -> Cost:
    """`decode_attention` of the sequences with a context, and `prefill_attention` of the tiles, each as a chunk of its own."""
    n = int((context_lens > 0).sum())
    settings = (scale, sliding_window)
    decodes = decode_attention(q[:n], k_cache, v_cache, block_tables[:n], context_lens[:n], *settings)
    lens = [(count, first + count) for _, _, first, count in tiles.tolist() if count]
    chunks = zip(*lens, strict=True) if lens else ((), ())
    prompts = prefill_attention(q[n:], k_cache, v_cache, block_tables[n:], *chunks, *settings)
    return decodes + prompts + Cost(tiles.nbytes)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Cost:
    out_bytes = x.shape[0] * weight.shape[0] * x.element_size()
    bias_bytes = 0 if bias is None else bias.nbytes
    return Cost(weight.nbytes + x.nbytes + out_bytes + bias_bytes, 2 * x.shape[0] * weight.numel())


def output_logits(x: Tensor, weight: Tensor) -> Cost:
    """The output is float32."""
    logits = x.shape[0] * weight.shape[0]
    return Cost(weight.nbytes + x.nbytes + 4 * logits, 2 * x.shape[0] * weight.numel())


def gated_mlp(x: Tensor, w13: Tensor, w2: Tensor) -> Cost:
    """The weights, the rows in and out, three products per row."""
    weights = w13.numel() + w2.numel()
    return Cost(w13.nbytes + w2.nbytes + 2 * x.nbytes, 2 * x.shape[0] * weights)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Cost:
    del eps
    return Cost(2 * x.nbytes + weight.nbytes, 4 * x.numel())


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Cost:
    del eps
    return Cost(2 * x.nbytes + 2 * residual.nbytes + weight.nbytes, 5 * x.numel())


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Cost:
    return Cost(2 * x.numel() * x.element_size() + cos.nbytes + sin.nbytes, 3 * x.numel())


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_slots: Tensor) -> Cost:
    read = k.numel() * k.element_size() + v.numel() * v.element_size()
    return Cost(read + k.numel() * k_cache.element_size() + v.numel() * v_cache.element_size() + kv_slots.nbytes)


def rotate_and_store(
    heads: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, kv_slots: Tensor
) -> Cost:
    """All heads are read; query heads and both caches' rows are written."""
    row, kv_heads = heads.shape[2] * heads.element_size(), k_cache.shape[2]
    rows, all_heads = heads.shape[:2]
    moved = rows * row * (2 * all_heads - 2 * kv_heads) + 2 * rows * kv_heads * heads.shape[2] * k_cache.element_size()
    rotated = rows * (all_heads - kv_heads) * heads.shape[2]
    return Cost(moved + cos.nbytes + sin.nbytes + kv_slots.nbytes, 3 * rotated)


def route(hidden: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, renormalize: bool) -> Cost:
    """The router's product; the output is an int64 expert and a float32 weight per assignment."""
    del bias, renormalize
    return Cost(hidden.nbytes + weight.nbytes + hidden.shape[0] * top_k * 12, 2 * hidden.shape[0] * weight.numel())


def router_scores(hidden: Tensor, weight: Tensor, *rest: object) -> Cost:
    """The router's product; the output is a float32 probability for each expert."""
    del rest
    return Cost(
        hidden.nbytes + weight.nbytes + hidden.shape[0] * weight.shape[0] * 4, 2 * hidden.shape[0] * weight.numel()
    )


def remap_experts(experts: Tensor, weights: Tensor, expert_slots: Tensor, *rest: object) -> Cost:
    """Assignments in and out."""
    del rest
    return Cost(2 * (experts.nbytes + weights.nbytes) + expert_slots.nbytes)


select_experts = remap_experts


def add_shared_slots(
    hidden: Tensor, gate: Tensor, slots: Tensor, weights: Tensor, first_slot: int, num_slots: int
) -> Cost:
    """The gate's product; assignments in and out, with the added ones."""
    del first_slot
    assignments = slots.nbytes + weights.nbytes
    added = assignments // slots.shape[1] * num_slots
    return Cost(hidden.nbytes + gate.nbytes + 2 * assignments + added, 2 * hidden.numel())


def sample(logits: Tensor, rows: Sequence[object]) -> Cost:
    """Each logit once."""
    return Cost(logits.nbytes + 8 * len(rows))
