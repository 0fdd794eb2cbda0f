"""Router, remap and grouped experts against loops that spell the definition out."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from backend.kernels import cpu, reference
from backend.kernels.reference.shared_slots import SharedSlots


def naive_experts(hidden: Tensor, w13: Tensor, w2: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(hidden, dtype=torch.float64)
    size = w2.shape[2]
    for t in range(len(slots)):
        for slot, weight in zip(slots[t].tolist(), weights[t].tolist(), strict=True):
            if slot < 0:
                continue
            gate_up = w13[slot].double() @ hidden[t].double()
            act = torch.nn.functional.silu(gate_up[:size]) * gate_up[size:]
            out[t] += weight * (w2[slot].double() @ act)
    return out


def make_experts(num_slots: int, hidden_size: int, size: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    return (
        torch.randn(tokens, hidden_size),
        torch.randn(num_slots, 2 * size, hidden_size) / hidden_size**0.5,
        torch.randn(num_slots, hidden_size, size) / size**0.5,
    )


@pytest.mark.parametrize("hidden_size", [1, 5, 17, 48])
@pytest.mark.parametrize(("num_slots", "top_k"), [(1, 1), (3, 2), (11, 4)])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_grouped_experts_equal_the_loop(
    kernels: ModuleType, tokens: int, num_slots: int, top_k: int, hidden_size: int
) -> None:
    hidden, w13, w2 = make_experts(num_slots, hidden_size, 7, tokens)
    slots = torch.rand(tokens, num_slots).argsort(1)[:, :top_k]
    weights = torch.rand(tokens, top_k)
    expected = naive_experts(hidden, w13, w2, slots, weights)
    out = kernels.grouped_experts_forward(hidden, w13, w2, slots, weights)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_experts_with_residual_and_norm_are_one_after_the_other(kernels: ModuleType) -> None:
    experts, residual, norm = make_experts(3, 17, 7, 5), torch.randn(5, 17), torch.rand(17)
    slots, weights = torch.rand(5, 3).argsort(1)[:, :2], torch.rand(5, 2)
    total = residual.double() + naive_experts(*experts, slots, weights)
    out = kernels.experts_add_rms_norm(*experts, slots, weights, residual, norm, 1e-5)
    torch.testing.assert_close(residual.double(), total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.double(), reference.rms_norm(total, norm.double(), 1e-5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tokens", "num_slots"), [(1, 3), (33, 3), (130, 3), (130, 2), (400, 9)])
def test_bfloat16_experts_equal_the_loop(tokens: int, num_slots: int) -> None:
    """Sizes that the processor's instruction takes, from one token to many per slot, not all of them whole panels."""
    hidden, w13, w2 = make_experts(num_slots, 64, 96, tokens)
    w13, w2 = w13.bfloat16(), w2.bfloat16()
    slots, weights = torch.rand(tokens, num_slots).argsort(1)[:, :2], torch.rand(tokens, 2)
    slots[::3, 0] = -1
    expected = reference.grouped_experts_forward(hidden, w13, w2, slots, weights)
    out = cpu.grouped_experts_forward(hidden, w13, w2, slots, weights)
    assert (out - expected).norm() < 8e-3 * expected.norm()


@pytest.mark.parametrize("tokens", [1, 4, 60, 130])
def test_all_tokens_on_one_expert_and_the_others_empty(kernels: ModuleType, tokens: int) -> None:
    hidden, w13, w2 = make_experts(5, 24, 9, tokens)
    slots, weights = torch.full((tokens, 1), 3), torch.rand(tokens, 1)
    out = kernels.grouped_experts_forward(hidden, w13, w2, slots, weights)
    torch.testing.assert_close(out.double(), naive_experts(hidden, w13, w2, slots, weights), rtol=1e-4, atol=1e-5)


def test_one_token_may_use_a_slot_twice(kernels: ModuleType) -> None:
    hidden, w13, w2 = make_experts(4, 12, 5, 3)
    slots, weights = torch.tensor([[2, 2], [2, 1], [0, 0]]), torch.rand(3, 2)
    out = kernels.grouped_experts_forward(hidden, w13, w2, slots, weights)
    torch.testing.assert_close(out.double(), naive_experts(hidden, w13, w2, slots, weights), rtol=1e-4, atol=1e-5)


def test_skipped_assignments_add_nothing_even_if_inputs_are_not_finite(kernels: ModuleType) -> None:
    hidden, w13, w2 = make_experts(4, 12, 5, 3)
    hidden[2] = float("nan")
    slots, weights = torch.tensor([[1, -1], [-1, 0], [-1, -1]]), torch.rand(3, 2)
    out = kernels.grouped_experts_forward(hidden, w13, w2, slots, weights)
    expected = naive_experts(hidden[:2], w13, w2, slots[:2], weights[:2])
    torch.testing.assert_close(out[:2].double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(out[2], torch.zeros(12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5, 14, 31, 200])
@pytest.mark.parametrize(("hidden_size", "size"), [(40, 24), (64, 96), (96, 24)])
def test_narrow_weights_with_float32_activations(
    kernels: ModuleType, hidden_size: int, size: int, tokens: int, dtype: torch.dtype
) -> None:
    hidden, w13, w2 = make_experts(3, hidden_size, size, tokens)
    w13, w2 = w13.to(dtype), w2.to(dtype)
    slots, weights = torch.randint(0, 3, (tokens, 2)), torch.rand(tokens, 2)
    out = kernels.grouped_experts_forward(hidden, w13, w2, slots, weights)
    assert out.dtype == torch.float32
    expected = naive_experts(hidden, w13, w2, slots, weights)
    assert (out - expected).norm() <= 1e-2 * expected.norm()


def test_nothing_to_compute_gives_zeros(kernels: ModuleType) -> None:
    hidden, w13, w2 = make_experts(4, 12, 5, 3)
    out = kernels.grouped_experts_forward(hidden, w13, w2, torch.full((3, 2), -1), torch.rand(3, 2))
    assert torch.equal(out, torch.zeros(3, 12))


@pytest.mark.parametrize("tokens", [1, 20, 200])
def test_slots_that_nobody_uses_change_no_bit(kernels: ModuleType, tokens: int) -> None:
    hidden, w13, w2 = make_experts(4, 12, 5, tokens)
    slots, weights = torch.randint(0, 4, (tokens, 2)), torch.rand(tokens, 2)
    expected = kernels.grouped_experts_forward(hidden, w13, w2, slots, weights)
    more = torch.cat([w13, torch.randn(60, 10, 12)]), torch.cat([w2, torch.randn(60, 12, 5)])
    assert torch.equal(kernels.grouped_experts_forward(hidden, *more, slots, weights), expected)


def test_input_is_left_alone(kernels: ModuleType) -> None:
    hidden, w13, w2 = make_experts(2, 8, 4, 5)
    before = hidden.clone()
    kernels.grouped_experts_forward(hidden, w13, w2, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1))
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k"), [(1, 1, 1), (1, 7, 3), (37, 60, 4), (3, 5, 5), (1200, 60, 2)]
)
def test_router_takes_the_most_probable_experts(
    kernels: ModuleType, tokens: int, num_experts: int, top_k: int, renormalize: bool
) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 16), torch.randn(num_experts, 16)
    experts, weights = kernels.route(hidden, weight, None, top_k, renormalize)
    for t in range(tokens):
        probabilities = torch.softmax(weight @ hidden[t], 0)
        ranked = sorted(range(num_experts), key=lambda e: -probabilities[e].item())[:top_k]
        assert experts[t].tolist() == ranked
        expected = probabilities[ranked] / (probabilities[ranked].sum() if renormalize else 1)
        torch.testing.assert_close(weights[t], expected)


def test_router_bias_skews_the_choice(kernels: ModuleType) -> None:
    bias = torch.tensor([0.0, 50.0, 0.0, 40.0])
    experts, weights = kernels.route(torch.randn(9, 6), torch.randn(4, 6), bias, 2, False)
    assert experts.tolist() == [[1, 3]] * 9
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("theta", [1.0, 0.2])
def test_remap_adds_the_slots_of_a_shared_expert(kernels: ModuleType, theta: float) -> None:
    torch.manual_seed(0)
    weights, experts = torch.rand(7, 6).topk(3, dim=1)
    args = (experts, weights, torch.arange(6), torch.tensor([theta]), torch.zeros(7, dtype=torch.int8))
    hidden, gate = torch.randn(7, 10), torch.randn(1, 10).bfloat16()
    slots, new_weights = kernels.remap_experts(*args, shared=SharedSlots(hidden, gate, 9, 2))
    plain = kernels.remap_experts(*args)
    assert torch.equal(slots[:, :3], plain[0]) and torch.equal(new_weights[:, :3], plain[1])
    assert slots[:, 3:].tolist() == [[9, 10]] * 7
    torch.testing.assert_close(new_weights[:, 3:], torch.sigmoid(hidden @ gate.float().T).expand(7, 2))
