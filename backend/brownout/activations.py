"""What reaches the experts of each layer on calibration text: the model is run layer by layer over all of it.

Memory holds the hidden states of one layer for all tokens, and the keys and values of one layer for one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from backend.brownout.settings import TOKEN_CLASSES
from backend.models.config import ModelConfig
from backend.models.forward_batch import ForwardBatch
from backend.models.model import MoeModel

_BLOCK = 16
#: Tokens that run through a layer at once.
BATCH_TOKENS = 8192
#: Originals only, whatever the thresholds.
_CLASS = TOKEN_CLASSES.index("prefill_never")


@dataclass(frozen=True)
class LayerActivations:
    """Of one MoE layer: inputs [N, M] float32, chosen experts [N, K] int64, gate weights [N, K] float32."""

    layer: int
    inputs: Tensor
    experts: Tensor
    weights: Tensor


@torch.no_grad()
def layer_activations(model: MoeModel, windows: Sequence[Sequence[int]]) -> Iterator[LayerActivations]:
    """Activations of every MoE layer in order; rows are the windows' tokens in order. All experts are the originals."""
    config, device = model.config, model.device
    last = max(i for i, sparse in enumerate(config.moe_layers) if sparse)
    batches = _batches(windows, device)
    tokens = torch.tensor([token for window in windows for token in window], device=device)
    residual = F.embedding(tokens, model.embedding).to(model.activation_dtype)
    x = torch.empty_like(residual)
    shape = (
        max(int(batch.block_tables.max()) + 1 for _, batch in batches),
        _BLOCK,
        config.num_kv_heads,
        config.head_dim,
    )
    cache = tuple(torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(2))
    for index, layer in enumerate(model.layers[: last + 1]):
        for rows, batch in batches:
            part = residual[rows]
            normed = layer.input_norm.after_add(x[rows], part) if index else layer.input_norm(part)
            out = layer.attention(normed, model.angles(batch.positions), batch, cache)
            x[rows] = layer.post_attention_norm.after_add(out, part)
        if layer.moe is not None:
            moe = layer.moe
            experts, weights = moe.kernels.route(x, moe.router, moe.router_bias, moe.top_k, moe.renormalize)
            yield LayerActivations(index, x.float(), experts, weights)
        if index < last:
            for rows, batch in batches:
                replaced = torch.zeros_like(batch.token_class, dtype=torch.int32)  # stays 0
                x[rows] = layer.feed_forward(x[rows], batch.token_class, replaced)


def activation_bytes(config: ModelConfig, tokens: int, itemsize: int) -> int:
    """Bytes that `layer_activations` holds at most: two hidden states and a float32 copy per token, routing, a batch."""
    routing = 12 * config.top_k + 4 * config.num_experts
    batch = min(tokens, BATCH_TOKENS)
    wide = config.num_heads * config.head_dim + 2 * config.num_kv_heads * config.head_dim + 4 * config.hidden_size
    return tokens * (config.hidden_size * (2 * itemsize + 4) + routing) + 4 * batch * wide


def _batches(windows: Sequence[Sequence[int]], device: torch.device) -> list[tuple[slice, ForwardBatch]]:
    """Prefill batches of about BATCH_TOKENS tokens, each with the rows of all tokens that it covers."""
    batches, group, size, start = [], [], 0, 0
    for i, window in enumerate(windows):
        group.append(window)
        size += len(window)
        if size >= BATCH_TOKENS or i == len(windows) - 1:
            batches.append((slice(start, start + size), _prefill(group, device)))
            start, group, size = start + size, [], 0
    return batches


def _prefill(windows: Sequence[Sequence[int]], device: torch.device) -> ForwardBatch:
    """Whole windows side by side, each in blocks of its own."""
    lens = [len(window) for window in windows]
    counts = [-(-n // _BLOCK) for n in lens]
    firsts = [0, *accumulate(counts)]
    tables = torch.zeros(len(windows), max(counts), dtype=torch.int32)
    slots = []
    for i, (n, count) in enumerate(zip(lens, counts, strict=True)):
        tables[i, :count] = torch.arange(firsts[i], firsts[i] + count)
        slots.append(firsts[i] * _BLOCK + torch.arange(n))
    total = sum(lens)
    return ForwardBatch(
        token_ids=torch.tensor([token for window in windows for token in window], device=device),
        positions=torch.cat([torch.arange(n) for n in lens]).to(device),
        kv_slots=torch.cat(slots).to(device),
        query_start=torch.tensor([0, *accumulate(lens)], dtype=torch.int32, device=device),
        context_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        logit_rows=torch.empty(0, dtype=torch.int64, device=device),
        token_class=torch.full((total,), _CLASS, dtype=torch.int8, device=device),
        num_decodes=0,
        query_lens=lens,
        context_lens_host=lens,
    )
