"""Products by panels of tokens: by the processor's matrix unit, if it has one, and by its vectors give the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from backend.kernels.cpu import bfloat16, gated_mlp, grouped_experts_forward, linear, tiles
from backend.kernels.cpu.compiled import as_array, words
from backend.kernels.cpu.panel_layers import matrix_panels, mlp_panels, panels_of_slots
from backend.kernels.cpu.panels import TOKENS
from backend.kernels.cpu.tile_layers import matrix_tiles, mlp_tiles

pytestmark = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this processor has no AVX-512 BF16")
needs_unit = pytest.param("unit", marks=pytest.mark.skipif(not tiles.available(), reason="this processor has no AMX"))
KERNELS = {"vectors": (matrix_panels, mlp_panels), "unit": (matrix_tiles, mlp_tiles)}


@pytest.fixture(params=["vectors", needs_unit])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What multiplies panels, in these tests and in the layers."""
    monkeypatch.setattr(tiles, "available", lambda: request.param == "unit")
    return request.param


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize(("rows", "length"), [(32, 32), (96, 64), (352, 512)])
@pytest.mark.parametrize("tokens", [1, 16, 17, 40, 300])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_matrix_times_tokens(by: str, rows: int, length: int, tokens: int, parts: int) -> None:
    weight, x = normal(rows, length), normal(tokens, length, seed=1)
    count = -(-tokens // TOKENS)
    room, y = np.empty((count, length // 2, TOKENS), np.uint32), np.full((count * TOKENS, rows), np.nan, np.float32)
    KERNELS[by][0](words(x), as_array(weight), room, y, parts)
    torch.testing.assert_close(torch.from_numpy(y[:tokens]), x.float() @ weight.float().t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("counts", [(1,), (16, 3), (40, 1, 170, 33)])
def test_gated_mlps_of_slots(by: str, counts: tuple[int, ...], parts: int) -> None:
    hidden, size, num_slots, top_k = 64, 96, 7, 2
    w13, w2 = normal(num_slots, 2 * size, hidden) / 8, normal(num_slots, hidden, size, seed=1) / 8
    order = np.random.default_rng(0).permutation(sum(counts))
    x = normal(len(order) // top_k + 1, hidden, seed=2)
    active = np.arange(num_slots - len(counts), num_slots)
    span = np.cumsum([0, *counts])
    first, rows = panels_of_slots(span)
    panels, act = (np.empty((first[-1], length // 2, TOKENS), np.uint32) for length in (hidden, size))
    y = np.full((first[-1] * TOKENS, hidden), np.nan, np.float32)
    weights = as_array(w13), as_array(w2)
    KERNELS[by][1](words(x), *weights, panels, act, y, active, span, first, order, top_k, parts)
    for s, slot in enumerate(active):
        inputs = x[order[span[s] : span[s + 1]] // top_k].float()
        gate, up = (inputs @ w13[slot].float().t()).chunk(2, dim=1)
        expected = (torch.nn.functional.silu(gate) * up).bfloat16().float() @ w2[slot].float().t()
        found = torch.from_numpy(y[rows[span[s] : span[s + 1]]])
        assert (found - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("tokens", [1, 7, 50, 260])
def test_the_layers_take_what_the_processor_has(by: str, tokens: int) -> None:
    x, weight = normal(tokens, 64), normal(96, 64, seed=1)
    torch.testing.assert_close(linear(x, weight).float(), x.float() @ weight.float().t(), rtol=1e-2, atol=1e-2)
    w13, w2 = normal(4, 192, 64, seed=2) / 8, normal(4, 64, 96, seed=3) / 8
    slots, ones = torch.arange(tokens)[:, None] % 4, torch.ones(tokens, 1)
    expected = torch.cat([gated_mlp(row[None], w13[slot], w2[slot]) for row, slot in zip(x, slots[:, 0], strict=True)])
    found = grouped_experts_forward(x, w13, w2, slots, ones)
    assert (found.float() - expected.float()).norm() < 1e-2 * expected.float().norm()


@pytest.mark.skipif(not tiles.available(), reason="this processor has no AMX")
def test_the_unit_is_left_as_it_was_found() -> None:
    """oneDNN uses it too, and may take its own configuration to be in force still."""
    assert bfloat16.multiplies(normal(64, 64))
    x, weight = normal(200, 320), normal(160, 320, seed=1)
    expected = torch.mm(x, weight.t())
    for tokens in (40, 200):
        linear(x[:tokens], weight)
        assert torch.equal(torch.mm(x, weight.t()), expected)
