"""The model as it is trained: Qwen2's trunk with one FFN a layer (dense) or a mixture of experts, in float32.

Letters in shapes: B rows, T positions, N = B*T tokens, H hidden, E experts, K experts per token, I expert size, V vocabulary.
Matrices of one kind are stacked in one parameter; the optimizer treats the last two dimensions as a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backend.demo.experts import run_experts


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. `dense_size` is the FFN of the dense phase beside the shared expert."""

    vocab_size: int = 3072
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    experts: int = 60
    top_k: int = 4
    expert_size: int = 32
    dense_size: int = 128
    shared_size: int = 64
    rope_theta: float = 10_000.0
    eps: float = 1e-6

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)


class Block(NamedTuple):
    """Rows of one length in a batch: what sees what [B or 1, 1, T, T] and rotary tables [T, head size]."""

    rows: int
    length: int
    mask: Tensor
    cos: Tensor
    sin: Tensor


class Attention(nn.Module):
    """Causal attention within documents, with rotary positions and a bias on queries, keys and values."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.eps = shape.heads, shape.eps
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        self.qkv = nn.Parameter(torch.randn(3, shape.hidden, shape.hidden) * shape.hidden**-0.5)
        self.qkv_bias = nn.Parameter(torch.zeros(3, shape.hidden))
        self.out = nn.Parameter(torch.randn(shape.hidden, shape.hidden) * (2 * shape.layers * shape.hidden) ** -0.5)

    def forward(self, x: Tensor, blocks: list[Block]) -> Tensor:
        """x [N, H] -> x with the attention's output added; the blocks' tokens follow one another in N."""
        hidden = x.shape[-1]
        normed = F.rms_norm(x, (hidden,), self.norm, self.eps)
        qkv = F.linear(normed, self.qkv.view(3 * hidden, hidden), self.qkv_bias.view(-1))
        parts = qkv.split([block.rows * block.length for block in blocks])
        mixed = torch.cat([self._attend(part, block) for part, block in zip(parts, blocks, strict=True)])
        return x + F.linear(mixed, self.out)

    def _attend(self, qkv: Tensor, block: Block) -> Tensor:
        """qkv [tokens of the block, 3 H] -> [tokens of the block, H]."""
        hidden = qkv.shape[-1] // 3
        q, k, v = qkv.view(block.rows, block.length, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        q, k = q * block.cos + _turned(q) * block.sin, k * block.cos + _turned(k) * block.sin
        # Written out: on a CPU torch's fused attention takes five times as long backwards as these two matmuls.
        scores = (q @ k.transpose(-1, -2)).masked_fill(~block.mask, float("-inf")) * (hidden // self.heads) ** -0.5
        mixed = scores.softmax(dim=-1).to(v.dtype) @ v
        return mixed.transpose(1, 2).reshape(-1, hidden)


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class Feed(nn.Module):
    """A shared expert behind a sigmoid gate and beside it either one dense FFN or routed experts."""

    def __init__(self, shape: Shape, moe: bool) -> None:
        super().__init__()
        self.shape, self.moe = shape, moe
        hidden = shape.hidden
        self.norm = nn.Parameter(torch.ones(hidden))
        self.shared_in = nn.Parameter(torch.randn(2, shape.shared_size, hidden) * hidden**-0.5)
        self.shared_out = nn.Parameter(
            torch.randn(hidden, shape.shared_size) * (2 * shape.layers * shape.shared_size) ** -0.5
        )
        self.shared_gate = nn.Parameter(torch.zeros(1, hidden))
        if moe:
            size = shape.expert_size
            self.router = nn.Parameter(torch.randn(shape.experts, hidden) * hidden**-0.5)
            self.expert_in = nn.Parameter(torch.randn(shape.experts, 2, size, hidden) * hidden**-0.5)
            self.expert_out = nn.Parameter(torch.randn(shape.experts, hidden, size) * (2 * shape.layers * size) ** -0.5)
        else:
            size = shape.dense_size
            self.dense_in = nn.Parameter(torch.randn(2, size, hidden) * hidden**-0.5)
            self.dense_out = nn.Parameter(torch.randn(hidden, size) * (2 * shape.layers * size) ** -0.5)

    def forward(self, x: Tensor, top_k: int) -> tuple[Tensor, Tensor | None]:
        """x [N, H] -> x with the FFN's output added, and the router's balance loss (None when dense)."""
        normed, out = self.shared(x)
        if not self.moe:
            return out + _gated(normed, self.dense_in, self.dense_out), None
        probabilities = F.linear(normed, self.router).softmax(dim=-1)
        weights, chosen = probabilities.topk(top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        out = out + run_experts(normed, chosen, weights, self.expert_in, self.expert_out)
        return out, balance_loss(probabilities, chosen)

    def shared(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, H] -> (x normed, x with the shared expert's output added)."""
        normed = F.rms_norm(x, (x.shape[-1],), self.norm, self.shape.eps)
        gate = torch.sigmoid(F.linear(normed, self.shared_gate))
        return normed, x + gate * _gated(normed, self.shared_in, self.shared_out)


def _gated(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    gate, up = F.linear(x, w_in.view(-1, x.shape[-1])).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w_out)


def balance_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """Switch's auxiliary loss as transformers has it: E × Σ share of tokens × mean probability; K when balanced."""
    experts = probabilities.shape[-1]
    share = torch.bincount(chosen.reshape(-1), minlength=experts).to(probabilities.dtype) / chosen.shape[0]
    return experts * (share * probabilities.mean(dim=0)).sum()


class DemoModel(nn.Module):
    """Embedding, layers, and the tied output head."""

    def __init__(self, shape: Shape, moe: bool) -> None:
        super().__init__()
        self.shape, self.moe = shape, moe
        self.embedding = nn.Parameter(torch.randn(shape.vocab_size, shape.hidden) * 0.02)
        self.attention = nn.ModuleList(Attention(shape) for _ in range(shape.layers))
        self.feed = nn.ModuleList(Feed(shape, moe) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden))

    def forward(
        self, ids: Sequence[Tensor], documents: Sequence[Tensor | None], top_k: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Blocks of ids [B, T] -> normed hidden states [N, H] of all blocks' tokens in order, and the mean balance loss.

        Positions see earlier positions of their row, and where the block has `documents` [B, T] only those with their
        document's number.
        """
        blocks = [self._block(part, numbers) for part, numbers in zip(ids, documents, strict=True)]
        x = F.embedding(torch.cat([part.flatten() for part in ids]), self.embedding)
        balance = x.new_zeros(())
        for attention, feed in zip(self.attention, self.feed, strict=True):
            x = attention(x, blocks)
            x, loss = feed(x, top_k or self.shape.top_k)
            if loss is not None:
                balance = balance + loss / self.shape.layers
        return F.rms_norm(x, (self.shape.hidden,), self.norm, self.shape.eps), balance

    def _block(self, ids: Tensor, documents: Tensor | None) -> Block:
        rows, length = ids.shape
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=ids.device).tril()
        if documents is not None:
            mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
        return Block(rows, length, mask, *self.rotary(length, ids.device))

    def rotary(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, head size] of rotary positions."""
        size = self.shape.hidden // self.shape.heads
        frequency = self.shape.rope_theta ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
        angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()

    def compile(self) -> None:  # type: ignore[override]
        """Compile all but the routed experts; the layers share the compiled code."""
        self.losses = torch.compile(self.losses, dynamic=True)
        for attention, feed in zip(self.attention, self.feed, strict=True):
            attention.forward = torch.compile(attention.forward, dynamic=False)
            if self.moe:
                feed.shared = torch.compile(feed.shared, dynamic=False)
            else:
                feed.forward = torch.compile(feed.forward, dynamic=False)

    def logits(self, states: Tensor) -> Tensor:
        """[…, H] -> […, V]."""
        return F.linear(states, self.embedding)

    def losses(self, states: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy [T] of predicting targets [T] from states [T, H]."""
        return F.cross_entropy(self.logits(states).float(), targets, reduction="none")
