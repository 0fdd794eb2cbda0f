"""The slots of a folded shared expert are added to those of the routed ones as in the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need Triton's compiler")

from backend.kernels import gpu, reference
from backend.kernels.reference.shared_slots import SharedSlots


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


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 3), (9, 4), (140, 8)])
@pytest.mark.parametrize("padding", [None, 5])
@pytest.mark.parametrize("mechanism", ["united", "reroute"])
def test_remap_adds_them_to_what_it_returns_without(run, tokens, top_k, padding, mechanism) -> None:
    """In steps of which one program sees all assignments, and in a larger one."""
    torch.manual_seed(tokens)
    weights, experts = torch.rand(tokens, 12).softmax(1).topk(top_k, dim=1)
    num_tokens = None if padding is None else torch.tensor(max(0, tokens - padding), dtype=torch.int32)
    args = (experts, weights, torch.arange(12), torch.tensor([0.3]), torch.zeros(tokens, dtype=torch.int8), num_tokens)
    options = {"mechanism": mechanism, "similarity": torch.rand(12, 12), "similarity_min": torch.tensor(0.5)}
    options["united_slots"] = 12 + torch.arange(12) // 4
    hidden, gate = torch.randn(tokens, 33), torch.randn(1, 33)

    def remap(kernels, hidden, gate, *args, **options) -> tuple:
        return kernels.remap_experts(*args, shared=SharedSlots(hidden, gate, 15, 3), **options)

    (slots, new_weights), _ = run(partial(remap, gpu), hidden, gate, *args, **options)
    expected_slots, expected_weights = remap(reference, hidden, gate, *args, **options)
    assert slots.shape == (tokens, top_k + 3) and torch.equal(slots, expected_slots)
    served = slots >= 0
    torch.testing.assert_close(new_weights[served], expected_weights[served], rtol=1e-4, atol=1e-5)
    plain_slots, plain_weights = reference.remap_experts(*args, **options)
    assert torch.equal(slots[:, :top_k], plain_slots)
    routed = plain_slots >= 0
    assert torch.equal(new_weights[:, :top_k][routed], plain_weights[routed])
