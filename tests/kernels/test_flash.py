"""The flash-attn package is asked for what the reference computes; a stand-in with the package's documented meaning answers."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from backend.kernels import flash, reference

BLOCK, LENS, QUERIES = flash.BLOCK_MULTIPLE, [300, 5, 260], [40, 5, 1]


def attend(
    q: Tensor, k_cache, v_cache, table: Tensor, context: int, scale: float, window_size: tuple[int, int]
) -> Tensor:
    """One sequence, q [n, H, D]: causal from the last position back, `window_size[0]` tokens before a query's own."""
    k, v = (cache[table.long()].flatten(0, 1)[:context].repeat_interleave(2, dim=1) for cache in (k_cache, v_cache))
    query = torch.arange(context - len(q), context).unsqueeze(1)
    key = torch.arange(context)
    visible = key <= query
    if window_size != (-1, -1):
        assert window_size[1] == 0
        visible &= key >= query - window_size[0]
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, float("-inf")).softmax(-1), v)


def with_kvcache(q, k_cache, v_cache, *, cache_seqlens, block_table, softmax_scale, causal, window_size):
    assert causal and block_table.dtype == cache_seqlens.dtype == torch.int32
    rows = zip(q, block_table, cache_seqlens.tolist(), strict=True)
    return torch.stack([attend(x, k_cache, v_cache, t, n, softmax_scale, window_size) for x, t, n in rows])


def varlen(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, block_table
):
    lens_q, lens_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert causal and (max_seqlen_q, max_seqlen_k) == (max(lens_q), max(lens_k))
    rows = zip(q.split(lens_q), block_table, lens_k, strict=True)
    return torch.cat([attend(x, k, v, t, n, softmax_scale, window_size) for x, t, n in rows])


@pytest.mark.parametrize("window", [None, 1, 17, 1000])
def test_flash_attention_is_asked_for_the_references_attention(monkeypatch, window: int | None) -> None:
    package = SimpleNamespace(flash_attn_with_kvcache=with_kvcache, flash_attn_varlen_func=varlen)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    torch.manual_seed(0)
    k_cache, v_cache = torch.randn(2, 6, BLOCK, 2, 8)
    tables = torch.tensor([[3, 1], [0, 0], [5, 2]], dtype=torch.int32)
    args = (k_cache, v_cache, tables)
    q = torch.randn(sum(QUERIES), 4, 8)
    expected = reference.prefill_attention(q, *args, QUERIES, LENS, 0.3, window)
    torch.testing.assert_close(flash.prefill_attention(q, *args, QUERIES, LENS, 0.3, window), expected)
    lens = torch.tensor(LENS, dtype=torch.int32)
    expected = reference.decode_attention(q[:3], *args, lens, 0.3, window)
    torch.testing.assert_close(flash.decode_attention(q[:3], *args, lens, 0.3, window), expected)
