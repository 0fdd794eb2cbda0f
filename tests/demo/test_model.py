"""Training's model: experts, upcycling, optimizer."""

import pytest
import torch

from backend.demo.experts import all_experts, run_experts
from backend.demo.model import DemoModel
from backend.demo.optimizer import orthogonalized
from backend.demo.upcycle import upcycle


def _expert_inputs(tokens: int = 30) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    chosen = torch.stack([torch.randperm(6)[:3] for _ in range(tokens)])
    shapes = ((tokens, 16), (tokens, 3), (7, 2, 8, 16), (7, 16, 8))  # expert 6 is never chosen
    x, weights, w_in, w_out = (torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes)
    return x, chosen, weights, w_in, w_out


def test_chosen_experts_give_what_all_experts_with_a_mask_give():
    x, chosen, weights, w_in, w_out = _expert_inputs()
    torch.testing.assert_close(
        run_experts(x, chosen, weights, w_in, w_out), all_experts(x, chosen, weights, w_in, w_out)
    )


def test_both_have_the_same_gradients():
    x, chosen, weights, w_in, w_out = _expert_inputs()
    wanted = [x, weights, w_in, w_out]
    gradients = [
        torch.autograd.grad(run(x, chosen, weights, w_in, w_out).square().sum(), wanted)
        for run in (run_experts, all_experts)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_upcycling_without_noise_keeps_the_function(shape):
    torch.manual_seed(1)
    dense = DemoModel(shape, moe=False)
    ids = [torch.randint(0, shape.vocab_size, (3, 20))]
    moe = upcycle(dense, shape, noise=0.0, seed=0)
    torch.testing.assert_close(moe(ids, [None])[0], dense(ids, [None])[0], rtol=1e-4, atol=1e-5)


def test_noise_changes_the_function_little(shape):
    torch.manual_seed(1)
    dense = DemoModel(shape, moe=False)
    ids = [torch.randint(0, shape.vocab_size, (3, 20))]
    expected = dense(ids, [None])[0]
    found = upcycle(dense, shape, noise=0.05, seed=0)(ids, [None])[0]
    assert 0 < (found - expected).norm() < 0.5 * expected.norm()


def test_upcycling_refuses_sizes_that_do_not_fit(shape):
    from dataclasses import replace

    dense = DemoModel(shape, moe=False)
    with pytest.raises(ValueError, match="dense FFN"):
        upcycle(dense, replace(shape, expert_size=8), 0.1, 0)
    with pytest.raises(ValueError, match="multiple of 4"):
        upcycle(dense, replace(shape, experts=10), 0.1, 0)


def test_documents_in_a_row_do_not_see_each_other(moe, shape):
    ids = torch.randint(0, shape.vocab_size, (1, 12))
    numbers = torch.tensor([[1] * 5 + [2] * 7])
    together = moe([ids], [numbers])[0]
    alone = moe([ids[:, 5:]], [None])[0]
    torch.testing.assert_close(together[5:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 8), (8, 4), (2, 3, 6, 4)])
def test_orthogonalized_matrices_have_singular_values_near_one(size):
    torch.manual_seed(2)
    values = torch.linalg.svdvals(orthogonalized(torch.randn(size)))
    assert values.min() > 0.5
    assert values.max() < 1.3
