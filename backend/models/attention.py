"""Attention over a paged KV cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from backend.models.config import ModelConfig
from backend.models.forward_batch import ForwardBatch
from backend.models.layers import Backing, Linear, NamedWeight, RMSNorm


class KVCache:
    """Keys and values of all layers in blocks of `block_size` tokens: `k[layer]` is [num_blocks, block_size, G, D].

    Starts as zeros: the padding of block tables points at block 0, whose values are masked but must be finite. They are
    written, not mapped on demand, so that memory is taken at the start and not in the middle of a load.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.k = [torch.empty(shape, dtype=dtype, device=device).zero_() for _ in range(config.num_layers)]
        self.v = [torch.empty(shape, dtype=dtype, device=device).zero_() for _ in range(config.num_layers)]

    @staticmethod
    def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block: keys and values of `block_size` tokens in all layers."""
        return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize


class Attention:
    """Grouped-query attention of one layer: project, normalise, rotate, store, attend, project back."""

    def __init__(self, backing: Backing, config: ModelConfig, layer: int) -> None:
        self.kernels = backing.kernels
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.window = config.sliding_windows[layer]
        self.clip = config.clip_qkv
        self.qkv = Linear(backing, config.hidden_size, (q_size, kv_size, kv_size), bias=config.qkv_bias)
        self.output = Linear(backing, q_size, (config.hidden_size,), bias=config.output_bias)
        self.norm_per_head = config.qk_norm == "head"
        self.norm_eps = config.rms_norm_eps
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            per_head = self.norm_per_head
            self.q_norm = RMSNorm(backing, self.head_dim if per_head else q_size, config.rms_norm_eps)
            self.k_norm = RMSNorm(backing, self.head_dim if per_head else kv_size, config.rms_norm_eps)

    def weights(self, prefix: str) -> Iterator[NamedWeight]:
        yield from self.qkv.weights(f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj")
        yield from self.output.weights(f"{prefix}.o_proj")
        if self.q_norm is not None and self.k_norm is not None:
            yield from self.q_norm.weights(f"{prefix}.q_norm")
            yield from self.k_norm.weights(f"{prefix}.k_norm")

    def __call__(
        self, x: Tensor, angles: tuple[Tensor, Tensor], batch: ForwardBatch, kv: tuple[Tensor, Tensor]
    ) -> Tensor:
        """x [T, M], angles (cos, sin) [T, D / 2] -> [T, M]; writes the tokens' keys and values into this layer's cache."""
        qkv = self.qkv(x)
        head_norms: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.q_norm is not None and self.k_norm is not None:
            if self.norm_per_head:
                head_norms = (self.q_norm.weight, self.k_norm.weight)
            else:
                for norm, part in zip(
                    (self.q_norm, self.k_norm), qkv.split(self.qkv.out_sizes, dim=1)[:2], strict=True
                ):
                    part.copy_(norm(part))
        if self.clip is not None:
            qkv.clamp_(-self.clip, self.clip)
        heads = qkv.view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        self.kernels.rotate_and_store(heads, *angles, *kv, batch.kv_slots, *head_norms, self.norm_eps)
        q = heads[:, : self.heads]
        return self.output(self._attend(q, batch, *kv).flatten(1))

    def _attend(self, q: Tensor, batch: ForwardBatch, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """q [T, H, D] against the cache, which holds the new keys and values already; returns [T, H, D].

        The first `num_decodes` sequences have one query each, the rest are prefill chunks.
        """
        if batch.tiles is not None:
            return self.kernels.mixed_attention(
                q, k_cache, v_cache, batch.block_tables, batch.context_lens, batch.tiles, self.scale, self.window
            )
        n, parts = batch.num_decodes, []
        if n:
            tables, lens = batch.block_tables[:n], batch.context_lens[:n]
            parts.append(self.kernels.decode_attention(q[:n], k_cache, v_cache, tables, lens, self.scale, self.window))
        if n < q.shape[0]:
            tables, query_lens, lens = batch.block_tables[n:], batch.query_lens[n:], batch.context_lens_host[n:]
            parts.append(
                self.kernels.prefill_attention(
                    q[n:], k_cache, v_cache, tables, query_lens, lens, self.scale, self.window
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)
