"""The model's forward pass for training: the same arithmetic as `MoeModel.forward`, whole sequences, gradients.

The engine's forward works in place and on a paged cache, which autograd cannot follow. Here every layer is a few torch
operations on rows of packed windows; what serves the experts of a layer is the caller's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backend.models.attention import Attention
from backend.models.layers import GatedMLP
from backend.models.model import MoeModel

#: (layer, hidden [n, M], experts [n, K], weights [n, K]) -> [n, M]: the routed experts of a layer.
Serve = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Packed:
    """Windows packed into rows: ids and positions [B, T], document [B, T] (-1: padding)."""

    ids: Tensor
    positions: Tensor
    document: Tensor

    @property
    def valid(self) -> Tensor:
        """[B, T] bool: places that hold a token."""
        return self.document >= 0


def pack(windows: Sequence[Sequence[int]], length: int, device: torch.device) -> Packed:
    """Windows of at most `length` tokens, each whole, in as few rows as taking them in order gives."""
    rows: list[list[int]] = []
    room = 0
    for i, window in enumerate(windows):
        if len(window) > room:
            rows.append([])
            room = length
        rows[-1].append(i)
        room -= len(window)
    packed = torch.zeros(3, len(rows), length, dtype=torch.int64)
    packed[2] = -1
    for row, members in enumerate(rows):
        start = 0
        for i in members:
            part = slice(start, start + len(windows[i]))
            packed[0, row, part] = torch.tensor(windows[i])
            packed[1, row, part] = torch.arange(len(windows[i]))
            packed[2, row, part] = i
            start += len(windows[i])
    ids, positions, document = packed.to(device)
    return Packed(ids, positions, document)


def final_states(model: MoeModel, batch: Packed, serve: Serve) -> Tensor:
    """Normed hidden states [n, M] of the packed tokens (padding left out) before the output head."""
    valid = batch.valid
    cos, sin = (table.unflatten(0, batch.ids.shape) for table in model.angles(batch.positions.flatten()))
    x = F.embedding(batch.ids, model.embedding).to(model.activation_dtype)
    for index, layer in enumerate(model.layers):
        normed = F.rms_norm(x, x.shape[-1:], layer.input_norm.weight, layer.input_norm.eps)
        x = x + _attend(layer.attention, normed, cos, sin, batch)
        norm = layer.post_attention_norm
        tokens = F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)[valid]
        if layer.moe is None:
            assert layer.mlp is not None
            out = _gated_mlp(layer.mlp, tokens)
        else:
            moe = layer.moe
            out = serve(index, tokens, *_route(moe, tokens))
            if moe.shared_expert is not None and moe.shared_gate is not None:
                gate = torch.sigmoid(F.linear(tokens, moe.shared_gate.weight.to(tokens.dtype)))
                out = out + gate * _gated_mlp(moe.shared_expert, tokens)
        x = x.masked_scatter(valid.unsqueeze(2), x[valid] + out)
    return F.rms_norm(x[valid], x.shape[-1:], model.final_norm.weight, model.final_norm.eps)


def head_logits(model: MoeModel, states: Tensor) -> Tensor:
    """[n, M] -> [n, V] float32."""
    return F.linear(states, model.lm_head.to(states.dtype)).float()


def run_slots(x: Tensor, slots: Tensor, weights: Tensor, expert: Callable[[int], tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of weighted slots, as `grouped_experts_forward`, with gradients: slots and weights [n, K], `expert(slot)` its w13, w2."""
    rows, places = torch.where(slots >= 0)
    used = slots[rows, places]
    order = used.argsort(stable=True)
    rows, places = rows[order], places[order]
    numbers, sizes = torch.unique_consecutive(used[order], return_counts=True)
    parts = []
    for slot, part in zip(numbers.tolist(), x[rows].split(sizes.tolist()), strict=True):
        w13, w2 = expert(slot)
        gate, up = F.linear(part, w13.to(x.dtype)).chunk(2, dim=1)
        parts.append(F.linear(F.silu(gate) * up, w2.to(x.dtype)))
    out = torch.zeros(x.shape, device=x.device)
    if parts:
        out = out.index_add(0, rows, torch.cat(parts).float() * weights[rows, places].unsqueeze(1))
    return out.to(x.dtype)


def _route(moe, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """As the router kernel, which works in place."""
    logits = F.linear(tokens, moe.router.to(tokens.dtype)).float()
    if moe.router_bias is not None:
        logits = logits + moe.router_bias
    weights, experts = logits.softmax(dim=-1).topk(moe.top_k, dim=-1)
    if moe.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return experts, weights


def _gated_mlp(mlp: GatedMLP, x: Tensor) -> Tensor:
    gate, up = F.linear(x, mlp.gate_up.weight.to(x.dtype)).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, mlp.down.weight.to(x.dtype))


def _attend(attention: Attention, x: Tensor, cos: Tensor, sin: Tensor, batch: Packed) -> Tensor:
    """x [B, T, M] -> [B, T, M]; each document sees itself only."""
    qkv = F.linear(x, attention.qkv.weight.to(x.dtype), attention.qkv.bias)
    q, k, v = qkv.split(attention.qkv.out_sizes, dim=2)
    if attention.q_norm is not None and attention.k_norm is not None:
        q, k = (_norm_heads(attention, norm, part) for norm, part in ((attention.q_norm, q), (attention.k_norm, k)))
    if attention.clip is not None:
        q, k, v = (part.clamp(-attention.clip, attention.clip) for part in (q, k, v))
    q, k, v = (part.unflatten(2, (-1, attention.head_dim)).transpose(1, 2) for part in (q, k, v))
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    distance = batch.positions.unsqueeze(2) - batch.positions.unsqueeze(1)
    visible = (batch.document.unsqueeze(2) == batch.document.unsqueeze(1)) & (distance >= 0)
    if attention.window is not None:
        visible &= distance < attention.window
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible.unsqueeze(1), scale=attention.scale, enable_gqa=attention.heads != attention.kv_heads
    )
    return F.linear(out.transpose(1, 2).flatten(2), attention.output.weight.to(x.dtype), attention.output.bias)


def _norm_heads(attention: Attention, norm, part: Tensor) -> Tensor:
    heads = part.unflatten(2, (-1, attention.head_dim)) if attention.norm_per_head else part
    return F.rms_norm(heads, norm.weight.shape, norm.weight, norm.eps).reshape(part.shape)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, T, D], cos and sin [B, T, D / 2]."""
    low, high = x.chunk(2, dim=3)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=3)
