"""Views of one slot point into the stacked tensors that the kernel reads."""

from __future__ import annotations

import torch

from backend.experts.weight_store import ExpertWeights


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
