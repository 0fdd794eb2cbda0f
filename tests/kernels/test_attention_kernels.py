"""Paged attention and the KV store against a loop over tokens and heads."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from backend.kernels import cpu, reference
from backend.kernels.reference import store_kv

HEAD_DIM = 6


class Paged:
    """Random keys and values of sequences, laid out in blocks in a scattered order; unused places hold huge values."""

    def __init__(self, context_lens: list[int], block_size: int, kv_heads: int) -> None:
        torch.manual_seed(sum(context_lens) + block_size)
        self.context_lens = context_lens
        needed = [-(-n // block_size) for n in context_lens]
        order = torch.randperm(sum(needed) + 3).tolist()
        self.tables = torch.zeros(len(needed), max(needed), dtype=torch.int32)
        self.k_cache = torch.full((len(order), block_size, kv_heads, HEAD_DIM), 1e4)
        self.v_cache = self.k_cache.clone()
        self.k = [torch.randn(n, kv_heads, HEAD_DIM) for n in context_lens]
        self.v = [torch.randn(n, kv_heads, HEAD_DIM) for n in context_lens]
        for seq, count in enumerate(needed):
            blocks = [order.pop() for _ in range(count)]
            self.tables[seq, :count] = torch.tensor(blocks)
            places = torch.tensor(
                [blocks[p // block_size] * block_size + p % block_size for p in range(context_lens[seq])]
            )
            store_kv(self.k[seq], self.v[seq], self.k_cache, self.v_cache, places)

    def naive(self, seq: int, position: int, q: Tensor, scale: float, window: int | None) -> Tensor:
        """q [H, D] at `position` of sequence `seq` -> [H, D]."""
        first = 0 if window is None else max(0, position - window + 1)
        k, v = self.k[seq][first : position + 1], self.v[seq][first : position + 1]
        group = q.shape[0] // k.shape[1]
        return torch.stack(
            [torch.softmax(k[:, h // group] @ q[h] * scale, 0) @ v[:, h // group] for h in range(q.shape[0])]
        )


HEADS = [(1, 1), (4, 4), (4, 2), (6, 1)]
WINDOWS = [None, 1, 5, 16, 1000]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("block_size", [1, 8, 16])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_decode_attention_equals_the_loop(
    kernels: ModuleType, heads: int, kv_heads: int, block_size: int, window: int | None
) -> None:
    lens = [1, 7, 8, 9, 16, 17, 40, 100]
    paged = Paged(lens, block_size, kv_heads)
    q = torch.randn(len(lens), heads, HEAD_DIM)
    out = kernels.decode_attention(q, paged.k_cache, paged.v_cache, paged.tables, torch.tensor(lens).int(), 0.3, window)
    expected = [paged.naive(seq, n - 1, q[seq], 0.3, window) for seq, n in enumerate(lens)]
    torch.testing.assert_close(out, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_decode_attention_of_one_sequence(kernels: ModuleType) -> None:
    paged = Paged([3], 4, 2)
    q = torch.randn(1, 4, HEAD_DIM)
    out = kernels.decode_attention(q, paged.k_cache, paged.v_cache, paged.tables, torch.tensor([3]).int(), 1.0, None)
    torch.testing.assert_close(out[0], paged.naive(0, 2, q[0], 1.0, None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("block_size", [1, 8, 16])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_prefill_attention_equals_the_loop(
    kernels: ModuleType, heads: int, kv_heads: int, block_size: int, window: int | None
) -> None:
    """Whole prompts, chunks that start and end on and beside block borders, and single tokens."""
    lens, queries = [1, 16, 17, 40, 33, 9, 24], [1, 16, 17, 7, 1, 8, 8]
    paged = Paged(lens, block_size, kv_heads)
    q = torch.randn(sum(queries), heads, HEAD_DIM)
    out = kernels.prefill_attention(q, paged.k_cache, paged.v_cache, paged.tables, queries, lens, 0.3, window)
    expected, row = [], 0
    for seq, (n, context) in enumerate(zip(queries, lens, strict=True)):
        expected += [paged.naive(seq, context - n + i, q[row + i], 0.3, window) for i in range(n)]
        row += n
    torch.testing.assert_close(out, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_attention_over_a_sixteen_bit_cache_keeps_the_queries_type(kernels: ModuleType) -> None:
    paged = Paged([5, 20], 8, 2)
    k, v = paged.k_cache.bfloat16(), paged.v_cache.bfloat16()
    q = torch.randn(2, 4, HEAD_DIM)
    decoded = kernels.decode_attention(q, k, v, paged.tables, torch.tensor([5, 20]).int(), 0.3, None)
    prefilled = kernels.prefill_attention(q, k, v, paged.tables, [1, 1], [5, 20], 0.3, None)
    expected = torch.stack([paged.naive(seq, n - 1, q[seq], 0.3, None) for seq, n in enumerate((5, 20))])
    for out in (decoded, prefilled):
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 32), (4, 2, 64), (3, 1, 96)])
def test_bfloat16_attention_equals_the_reference(
    heads: int, kv_heads: int, head_dim: int, block_size: int, window: int | None
) -> None:
    """Heads of a length that the processor's instruction takes; whole prompts, chunks beside block borders, single tokens."""
    lens, queries = [1, 16, 17, 40, 33, 9, 150], [1, 16, 17, 7, 1, 8, 77]
    generator = torch.Generator().manual_seed(block_size + heads)
    needed = [-(-n // block_size) for n in lens]
    shape = (sum(needed) + 1, block_size, kv_heads, head_dim)
    k, v = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    tables = torch.zeros(len(lens), max(needed), dtype=torch.int32)
    for row, blocks in zip(tables, torch.randperm(sum(needed), generator=generator).split(needed), strict=True):
        row[: len(blocks)] = blocks
    v[-1], q = float("nan"), torch.randn(sum(queries), heads, head_dim, generator=generator)
    prefill = (q, k, v, tables, queries, lens, head_dim**-0.5, window)
    decode = (q[: len(lens)], k, v, tables, torch.tensor(lens).int(), head_dim**-0.5, window)
    for name, args in (("prefill_attention", prefill), ("decode_attention", decode)):
        found, expected = getattr(cpu, name)(*args), getattr(reference, name)(*args)
        assert (found - expected).norm() < 8e-3 * expected.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 900])
def test_rotate_and_store_equals_its_parts(dtype: torch.dtype, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    heads, angles = (torch.randn(tokens, *size, generator=generator) for size in ((8, 10), (5,)))
    slots = torch.randperm(2 * tokens, generator=generator)[:tokens]
    norms = [torch.rand(10, generator=generator) for _ in range(2)]
    written = []
    for kernels in (cpu, reference):
        own = heads.clone()
        caches = [torch.zeros(2 * tokens, 1, 2, 10, dtype=dtype) for _ in range(2)]
        kernels.rotate_and_store(own, angles.cos(), angles.sin(), *caches, slots, *norms, 1e-5)
        written.append((own[:, :4], *caches))
    for found, expected in zip(*written, strict=True):
        torch.testing.assert_close(found, expected)
        assert expected.count_nonzero()


def test_store_kv_writes_only_the_named_places() -> None:
    k_cache, v_cache = torch.zeros(3, 4, 2, 5), torch.zeros(3, 4, 2, 5)
    k, v = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    store_kv(k, v, k_cache, v_cache, torch.tensor([11, 4, 7]))
    for cache, rows in ((k_cache, k), (v_cache, v)):
        assert torch.equal(cache[2, 3], rows[0])
        assert torch.equal(cache[1, 0], rows[1])
        assert torch.equal(cache[1, 3], rows[2])
        assert cache.count_nonzero() == rows.count_nonzero()
