"""The slots of a folded shared expert are added to those of the routed ones as in the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need Triton's compiler")

from backend.kernels import gpu, reference


@pytest.mark.parametrize(
    ("tokens", "hidden_size", "top_k", "shared", "dtype"),
    [(1, 7, 1, 1, torch.float32), (5, 33, 4, 4, torch.bfloat16), (3, 1030, 3, 2, torch.float16)],
)
@pytest.mark.parametrize("padding", [None, 0, 2])
def test_slots_and_weights_are_the_references(
    run, assert_near, tokens, hidden_size, top_k, shared, padding, dtype
) -> None:
    torch.manual_seed(tokens)
    hidden, gate = torch.randn(tokens, hidden_size).to(dtype), torch.randn(1, hidden_size).to(dtype) / hidden_size**0.5
    slots, weights = torch.randint(-1, 9, (tokens, top_k)), torch.rand(tokens, top_k)
    num_tokens = None if padding is None else torch.tensor(max(0, tokens - padding), dtype=torch.int32)
    args = (hidden, gate, slots, weights, 9, shared, num_tokens)
    (new_slots, new_weights), _ = run(gpu.add_shared_slots, *args)
    expected_slots, expected_weights = reference.add_shared_slots(hidden.double(), gate.double(), *args[2:])
    assert torch.equal(new_slots, expected_slots) and torch.equal(new_weights[:, :top_k], weights)
    torch.testing.assert_close(new_weights, expected_weights, rtol=1e-4, atol=1e-5)
