"""The forward pass for training is the engine's."""

from __future__ import annotations

import pytest
import torch

from backend.brownout.differentiable import final_states, head_logits, pack, run_slots
from backend.models import load_model
from tests.models.harness import prompt_logits
from tests.models.tiny_checkpoints import make_checkpoint

CASES = {
    "qwen2_moe": {"norm_topk_prob": True, "mlp_only_layers": [1]},
    "qwen3_moe": {"attention_bias": True},
    "mixtral": {"sliding_window": 4},
    "olmoe": {"clip_qkv": 0.5},
}


@pytest.mark.parametrize("family", CASES)
def test_logits_are_those_of_the_engine(tmp_path, family):
    make_checkpoint(tmp_path, family, **CASES[family])
    model = load_model(str(tmp_path), device=torch.device("cpu"))
    windows = [torch.randint(0, 199, (n,)).tolist() for n in (9, 5, 12, 1, 3)]

    def serve(layer, x, experts, weights):
        store = model.layers[layer].moe.experts
        return run_slots(x, experts, weights, lambda slot: (store.w13[slot], store.w2[slot]))

    batch = pack(windows, 16, model.device)
    assert batch.ids.shape == (2, 16) and int(batch.valid.sum()) == 30
    with torch.no_grad():
        logits = head_logits(model, final_states(model, batch, serve))
    expected = torch.cat([prompt_logits(model, window) for window in windows])
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-3)


def test_slots_of_minus_one_do_nothing_and_gradients_reach_weights_and_inputs():
    w13, w2 = torch.randn(3, 8, 6, requires_grad=True), torch.randn(3, 6, 4)
    x, slots = torch.randn(2, 6, requires_grad=True), torch.tensor([[0, -1], [-1, -1]])
    out = run_slots(x, slots, torch.ones(2, 2), lambda slot: (w13[slot], w2[slot]))
    out.sum().backward()
    assert out[1].abs().max() == 0 and out[0].abs().max() > 0
    assert w13.grad[0].abs().max() > 0 and w13.grad[1:].abs().max() == 0
    assert x.grad[0].abs().max() > 0 and x.grad[1].abs().max() == 0
