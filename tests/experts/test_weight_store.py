"""Views of one slot point into the stacked tensors that the kernel reads."""

from __future__ import annotations

import mmap

import torch

from backend.experts.weight_store import ExpertWeights
from backend.kernels.reference import grouped_experts_forward


def test_views_fill_the_stacked_tensors() -> None:
    store = ExpertWeights(3, hidden_size=5, expert_size=2, dtype=torch.float32, device=torch.device("cpu"))
    store.w13.zero_()
    store.w2.zero_()
    store.gate(1).fill_(1)
    store.up(1).fill_(2)
    store.down(2).fill_(3)
    assert store.w13.shape == (3, 4, 5)
    assert store.w2.shape == (3, 5, 2)
    assert store.w13[1, :, 0].tolist() == [1, 1, 2, 2]
    assert store.w13[[0, 2]].count_nonzero() == 0
    assert store.w2.sum((1, 2)).tolist() == [0, 0, 30]


def test_widened_experts_compute_the_same() -> None:
    store = ExpertWeights(3, 8, 5, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    store.w13.normal_(generator=generator)
    store.w2.normal_(generator=generator)
    hidden = torch.randn(4, 8, generator=generator)
    slots, weights = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2]]), torch.rand(4, 2, generator=generator)
    expected = grouped_experts_forward(hidden, store.w13, store.w2, slots, weights)
    store.widen(3)
    assert (store.expert_size, store.w13.shape, store.w2.shape) == (15, (3, 30, 8), (3, 8, 15))
    found = grouped_experts_forward(hidden, store.w13, store.w2, slots, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_quantised_weights_have_a_factor_for_each_row() -> None:
    torch.manual_seed(0)
    store = ExpertWeights(2, 8, 5, torch.float32, torch.device("cpu"))
    factors = torch.logspace(-6, 3, 8)
    store.w13.normal_()
    store.w2.copy_(torch.randn(2, 8, 5) * factors.unsqueeze(1))
    store.w2[1, 3] = 0.0
    before, num_bytes = store.w2.clone(), store.num_bytes
    store.quantize()
    assert store.w2.dtype == torch.float8_e4m3fn and store.scales is not None
    assert store.scales[0].shape == (2, 10) and store.scales[1].shape == (2, 8)
    restored = store.w2.float() * store.scales[1].unsqueeze(2)
    # Half of the last of 3 bits, and where numbers are small against the row's largest a step of the smallest ones.
    allowed = before.abs() / 16 + before.abs().amax(2, keepdim=True) / 2**17
    assert ((restored - before).abs() <= allowed).all() and restored[1, 3].eq(0).all()
    assert store.num_bytes < num_bytes


def test_appended_slots_come_last() -> None:
    store = ExpertWeights(2, 8, 5, torch.float32, torch.device("cpu"))
    first = store.w13.normal_().clone()
    w13, w2 = torch.randn(3, 10, 8), torch.randn(3, 8, 5)
    assert store.append(w13, w2) == slice(2, 5)
    assert torch.equal(store.w13[:2], first) and torch.equal(store.w13[2:], w13) and torch.equal(store.w2[2:], w2)


def test_released_slots_lose_their_memory_and_can_be_filled_again() -> None:
    weights = ExpertWeights(8, 64, 128, torch.float32, torch.device("cpu"))
    for part in (weights.w13, weights.w2):
        part.fill_(1.0)
    weights.release(slice(2, 6))
    left = weights.w13[2:6].flatten(), weights.w2[2:6].flatten()
    page = mmap.PAGESIZE // 4
    assert all((part[page:-page] == 0).all() for part in left), "pages that have gone read as zeros"
    assert all((part[[0, 1, 6, 7]] == 1).all() for part in (weights.w13, weights.w2))
    weights.put(3, *(torch.full(shape, 2.0) for shape in ((128, 64), (128, 64), (64, 128))))
    assert (weights.w13[3] == 2).all() and (weights.w2[3] == 2).all()
