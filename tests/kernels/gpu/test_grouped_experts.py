"""Grouped experts: both phases against the reference, over sizes that no tile divides."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need Triton's compiler")

from backend.kernels import reference
from backend.kernels.gpu.align import align
from backend.kernels.gpu.experts_norm import experts_add_rms_norm
from backend.kernels.gpu.grouped_experts import grouped_experts_forward, run_with_tiles
from backend.kernels.tuning import TileConfig

TILES = {"gate_up": TileConfig(32, 16, 16), "down": TileConfig(32, 32, 16)}


def make(tokens: int, num_slots: int, hidden_size: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(tokens)
    return (
        torch.randn(tokens, hidden_size).to(dtype),
        (torch.randn(num_slots, 2 * size, hidden_size) / hidden_size**0.5).to(dtype),
        (torch.randn(num_slots, hidden_size, size) / size**0.5).to(dtype),
    )


def exact(hidden, w13, w2, slots, weights) -> torch.Tensor:
    return reference.grouped_experts_forward(hidden.double(), w13.double(), w2.double(), slots, weights)


@pytest.mark.parametrize(
    ("tokens", "num_slots", "top_k", "hidden_size", "size", "dtype"),
    [
        (1, 1, 1, 1, 7, torch.float32),
        (7, 11, 4, 17, 9, torch.bfloat16),
        (7, 11, 4, 17, 9, torch.float32),
        (37, 3, 2, 48, 16, torch.float16),
    ],
)
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_each_phase_equals_the_reference(
    run, assert_near, phase, tokens, num_slots, top_k, hidden_size, size, dtype
) -> None:
    """Skipped assignments, slots without rows, and slots with more rows than a tile are among them."""
    hidden, w13, w2 = make(tokens, num_slots, hidden_size, size, dtype)
    slots, weights = torch.randint(-1, num_slots, (tokens, top_k)), torch.rand(tokens, top_k)
    if top_k > 1:
        slots[0] = -1
    args = (hidden, w13, w2, slots, weights)
    out, after = run(run_with_tiles, *args, phase, TILES)
    assert out.dtype == dtype
    assert_near(out, exact(*args))
    assert torch.equal(after[0], hidden)
    if top_k > 1:
        assert torch.equal(out[0], torch.zeros_like(out[0]))


@pytest.mark.parametrize("tokens", [2, 70])
def test_default_tiles_serve_any_size(run, assert_near, tokens: int) -> None:
    args = (*make(tokens, 2, 40, 24, torch.float32), torch.randint(0, 2, (tokens, 2)), torch.rand(tokens, 2))
    assert_near(run(grouped_experts_forward, *args)[0], exact(*args))


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_rows_that_are_skipped_do_not_spoil_their_neighbours(run, assert_near, phase: str) -> None:
    hidden, w13, w2 = make(4, 3, 20, 12, torch.float32)
    hidden[2] = float("nan")
    slots, weights = torch.tensor([[1, -1], [-1, 0], [-1, -1], [1, 1]]), torch.rand(4, 2)
    out, _ = run(run_with_tiles, hidden, w13, w2, slots, weights, phase, TILES)
    rows = [0, 1, 3]
    assert_near(out[rows], exact(hidden[rows], w13, w2, slots[rows], weights[rows]))
    assert torch.equal(out[2], torch.zeros(20))


@pytest.mark.parametrize("stored", [torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_weights_with_a_factor_for_each_output_row(run, assert_near, phase: str, stored: torch.dtype) -> None:
    if stored.itemsize == 1 and run.where != "interpreter" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no 8-bit floating point")
    hidden, w13, w2 = make(9, 3, 48, 20, torch.float16)
    w13, w2 = w13.to(stored), w2.to(stored)
    scales = torch.rand(3, 40) + 0.5, torch.rand(3, 48) + 0.5
    slots, weights = torch.randint(-1, 3, (9, 2)), torch.rand(9, 2)
    args = (hidden, w13, w2, slots, weights)
    out, _ = run(run_with_tiles, *args, phase, TILES, scales)
    wide = (hidden.double(), w13.double() * scales[0].unsqueeze(2), w2.double() * scales[1].unsqueeze(2))
    assert_near(out, reference.grouped_experts_forward(*wide, slots, weights))
    with_scales = reference.grouped_experts_forward(hidden.double(), w13, w2, slots, weights, scales)
    torch.testing.assert_close(with_scales, reference.grouped_experts_forward(*wide, slots, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_experts_with_residual_and_norm(run, assert_near, tokens: int, dtype: torch.dtype) -> None:
    """Some assignments are skipped, and all of one token: its residual stays."""
    args = make(tokens, 3, 40, 24, dtype)
    slots, weights = torch.randint(-1, 3, (tokens, 2)), torch.rand(tokens, 2)
    slots[-1] = -1
    residual, norm = torch.randn(tokens, 40).to(dtype), torch.rand(40).to(dtype)
    out, after = run(experts_add_rms_norm, *args, slots, weights, residual, norm, 1e-5)
    total = residual.double() + exact(*args, slots, weights)
    assert out.dtype == dtype
    assert_near(after[5], total)
    assert torch.equal(after[5][-1], residual[-1])
    assert_near(out, reference.rms_norm(total, norm.double(), 1e-5))


@pytest.mark.parametrize("tile", [1, 8])
@pytest.mark.parametrize(("assignments", "num_slots"), [(1, 1), (30, 7), (1100, 5)])
def test_align_lists_each_slots_assignments_in_order(run, assignments: int, num_slots: int, tile: int) -> None:
    torch.manual_seed(assignments)
    slots = torch.randint(-1, num_slots, (assignments, 1))
    (order, begins, counts, tile_slots), _ = run(align, slots, num_slots, tile)
    offsets = {(part.data_ptr() - order.data_ptr()) % 16 for part in (begins, counts, tile_slots)}
    assert offsets == {0}, "other places would need kernels of their own"
    used = 0
    for slot in range(num_slots):
        expected = torch.where(slots.flatten() == slot)[0].tolist()
        begin = int(begins[slot])
        assert begin == used and counts[slot] == len(expected)
        assert order[begin : begin + len(expected)].tolist() == expected
        tiles = -(-len(expected) // tile)
        assert tile_slots[begin // tile : begin // tile + tiles].tolist() == [slot] * tiles
        used += tiles * tile
    assert (tile_slots[used // tile :] == -1).all()
