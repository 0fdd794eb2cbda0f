"""Views of one slot point into the stacked tensors that the kernel reads."""

from __future__ import annotations

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
