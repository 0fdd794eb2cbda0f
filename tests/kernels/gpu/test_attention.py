"""Paged attention against the reference: blocks in a scattered order, odd lengths, groups of heads, windows, splits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU kernels need Triton's compiler")

from backend.kernels import gpu, reference
from backend.kernels.gpu import attention_mixed
from backend.kernels.gpu.attention_decode import attend_in_splits, num_splits
from backend.kernels.query_tiles import query_tiles, tile_queries

HEADS = [(1, 1, 6, torch.float32), (4, 2, 16, torch.bfloat16), (5, 1, 20, torch.float16)]


def make_cache(
    lens: list[int], block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """k_cache, v_cache and tables; places that no sequence owns hold huge values."""
    torch.manual_seed(sum(lens))
    needed = [-(-n // block_size) for n in lens]
    order = torch.randperm(sum(needed) + 2).tolist()
    caches = torch.full((2, len(order), block_size, kv_heads, head_dim), 1e4, dtype=dtype)
    tables = torch.zeros(len(lens), max(needed), dtype=torch.int32)
    for seq, (count, length) in enumerate(zip(needed, lens, strict=True)):
        for i in range(count):
            tables[seq, i] = block = order.pop()
            filled = min(block_size, length - i * block_size)
            caches[:, block, :filled] = torch.randn(2, filled, kv_heads, head_dim).to(dtype)
    return caches[0], caches[1], tables


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "dtype"), HEADS)
@pytest.mark.parametrize(("block_size", "window", "splits"), [(16, None, 1), (1, 5, 1), (8, None, 2), (16, 100, 4)])
def test_decode_attention(run, assert_near, block_size, window, splits, heads, kv_heads, head_dim, dtype) -> None:
    lens = [1, 17, 64, 131]
    k_cache, v_cache, tables = make_cache(lens, block_size, kv_heads, head_dim, dtype)
    q = torch.randn(len(lens), heads, head_dim).to(dtype)
    args = (tables, torch.tensor(lens).int(), 0.3, window)
    out, _ = run(attend_in_splits, q, k_cache, v_cache, *args, splits, 64)
    assert out.dtype == dtype
    assert_near(out, reference.decode_attention(q.double(), k_cache.double(), v_cache.double(), *args))


def test_decode_attention_takes_strided_queries_and_gives_zeros_without_keys(run, assert_near) -> None:
    lens = [20, 3]
    k_cache, v_cache, tables = make_cache(lens, 8, 2, 16, torch.float32)
    fused = torch.randn(2, 8, 16)
    args = (k_cache, v_cache, tables, torch.tensor(lens).int(), 0.3, None)
    out, _ = run(lambda fused, *rest: gpu.decode_attention(fused[:, :4], *rest), fused, *args)
    assert_near(out, reference.decode_attention(fused[:, :4], *args))
    for splits in (1, 2):
        empty, _ = run(attend_in_splits, fused[:, :4], *args[:3], torch.zeros(2).int(), 0.3, None, splits, 64)
        assert torch.equal(empty, torch.zeros(2, 4, 16))


def test_splits_fill_the_processors_but_stay_worth_their_place() -> None:
    assert num_splits(programs=1, longest=100_000, processors=132) == 64
    assert num_splits(programs=1, longest=1000, processors=132) == 4
    assert num_splits(programs=64, longest=4096, processors=132) == 8
    assert num_splits(programs=1024, longest=100_000, processors=132) == 1


def test_splits_of_a_mixed_step_are_few_where_there_is_room_for_many_sequences() -> None:
    assert [attention_mixed._num_splits(programs, 32_768, None) for programs in (512, 4096, 10**5)] == [16, 2, 1]
    assert attention_mixed._num_splits(512, 32_768, sliding_window=4096) == 4
    assert attention_mixed._num_splits(1, 500, None) == 1
    assert attention_mixed._num_splits(1, 10**6, None) == 32


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "dtype"), HEADS)
@pytest.mark.parametrize(("block_size", "window"), [(16, None), (1, 5), (8, 70)])
def test_prefill_attention(run, assert_near, block_size, window, heads, kv_heads, head_dim, dtype) -> None:
    """Whole prompts, chunks over cached prefixes that end on and beside the borders of tiles, and single tokens."""
    lens, queries = [1, 130, 97, 33, 64], [1, 130, 5, 1, 32]
    k_cache, v_cache, tables = make_cache(lens, block_size, kv_heads, head_dim, dtype)
    q = torch.randn(sum(queries), heads, head_dim).to(dtype)
    args = (tables, queries, lens, 0.3, window)
    out, _ = run(gpu.prefill_attention, q, k_cache, v_cache, *args)
    assert out.dtype == dtype
    assert_near(out, reference.prefill_attention(q.double(), k_cache.double(), v_cache.double(), *args))


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "dtype"), HEADS)
@pytest.mark.parametrize(("block_size", "window", "split_keys"), [(16, None, 1024), (8, 70, 1024), (16, None, 32)])
def test_mixed_attention(
    run, assert_near, monkeypatch, block_size, window, split_keys, heads, kv_heads, head_dim, dtype
) -> None:
    """Decodes, then prompts and the end of one; rows, places for sequences, and tiles that nobody needs."""
    monkeypatch.setattr(attention_mixed, "_SPLIT_KEYS", split_keys)
    monkeypatch.setattr(attention_mixed, "LEAST_SPLIT", 64)
    lens, decodes, prompts, padding = [1, 17, 131, 130, 97, 33], 3, [130, 5, 33], 6
    k_cache, v_cache, tables = make_cache(lens, block_size, kv_heads, head_dim, dtype)
    tables = torch.cat([tables, torch.full((2, tables.shape[1]), 10**6, dtype=torch.int32)])
    q = torch.randn(decodes + sum(prompts) + padding, heads, head_dim).to(dtype)
    context_lens = torch.tensor([*lens[:decodes], *[0] * 5]).int()
    queries = tile_queries(heads // kv_heads, q.element_size())
    tiles = torch.from_numpy(query_tiles(prompts, lens[decodes:], queries, decodes, decodes))
    tiles = torch.cat([tiles, torch.zeros(4, 4, dtype=torch.int32)])
    args = (tables, context_lens, tiles, 0.3, window)
    out, _ = run(gpu.mixed_attention, q, k_cache, v_cache, *args)
    assert out.dtype == dtype

    wide, cache = q.double(), (k_cache.double(), v_cache.double())
    end = decodes + sum(prompts)
    first = reference.decode_attention(wide[:decodes], *cache, tables[:decodes], context_lens[:decodes], 0.3, window)
    chunks = (tables[decodes:6], prompts, lens[decodes:], 0.3, window)
    expected = torch.cat([first, reference.prefill_attention(wide[decodes:end], *cache, *chunks)])
    assert_near(out[:end], expected)
    assert_near(reference.mixed_attention(wide, *cache, *args)[:end], expected)
    assert not out[end:].any(), "rows without a token"
