"""A folded shared expert: the same function, as slots in small steps and as matrix products in large ones."""

from __future__ import annotations

import pytest
import torch

from backend.experts.options import PoolOptions
from backend.kernels import reference
from backend.models import load_model
from backend.models.model import MoeModel
from backend.models.moe import FOLDED_ROWS, num_folded


@pytest.fixture
def model(monkeypatch) -> MoeModel:
    monkeypatch.setattr("backend.models.model.kernels_for", lambda *_: reference)
    return load_model("dummy:tiny", device=torch.device("cpu"), dtype="float32", united="4")


@pytest.mark.parametrize(
    ("rows", "mechanism"),
    [(1, "united"), (6, "united"), (6, "reroute"), (6, "top_k"), (6, "piggyback"), (FOLDED_ROWS + 1, "united")],
)
def test_folding_changes_nothing_but_where_it_is_computed(
    model: MoeModel, rows: int, mechanism: str, monkeypatch
) -> None:
    model.set_replacement(mechanism, "count", 4, 0.0)
    model.set_thresholds(torch.full_like(model.thresholds, 0.5).tolist())
    model.moe_block(0).similarity = torch.rand(2 * (model.config.num_experts,))
    block, x = model.moe_block(0), torch.randn(rows, model.config.hidden_size)
    num_tokens = torch.tensor(max(1, rows - 2))
    token_class = torch.zeros(rows, dtype=torch.int8)
    with torch.inference_mode():
        expected = block(x, token_class, num_tokens=num_tokens)
        block.fold_shared()
        assert block.num_shared_slots == num_folded(model.config) == 2
        if rows <= FOLDED_ROWS:
            monkeypatch.setattr(block, "shared_expert", lambda _: pytest.fail("computed twice"))
        found = block(x, token_class, num_tokens=num_tokens)
    valid = int(num_tokens)
    torch.testing.assert_close(found[:valid], expected[:valid], rtol=1e-4, atol=1e-5)
    assert block.last_slots.shape == (rows, model.config.top_k), "telemetry is of routed experts"


def test_folded_slots_come_after_the_united_ones_and_only_once(model: MoeModel) -> None:
    before, united = model.weight_bytes(), model.united_bytes()
    w13 = model.moe_block(0).united_weights(4)[0].clone()
    model.fold_shared_experts()
    model.fold_shared_experts()
    block = model.moe_block(0)
    assert block.shared_slots == slice(10, 12) and torch.equal(block.united_weights(4)[0], w13)
    assert block.experts.gate(0).shape == (model.config.expert_size, model.config.hidden_size)
    copies = len(model.moe_blocks) * (block.experts.w13[10:].nbytes + block.experts.w2[10:].nbytes)
    assert model.weight_bytes() - before == copies and model.united_bytes() == united


def test_a_shared_expert_of_another_size_stays_as_it_is(model: MoeModel) -> None:
    block = model.moe_block(0)
    block.experts.widen(3)
    block.fold_shared()
    assert block.shared_slots is None


def test_experts_in_eight_bits_are_near(model: MoeModel) -> None:
    x, token_class = torch.randn(9, model.config.hidden_size), torch.zeros(9, dtype=torch.int8)
    block = model.moe_block(0)
    with torch.inference_mode():
        block.fold_shared()
        expected = block(x, token_class)
        before = model.weight_bytes() + model.united_bytes()
        model.quantize_experts()
        found = block(x, token_class)
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < 0.06, "e4m3 has 3 bits behind the point"
    assert model.weight_bytes() + model.united_bytes() < before


def test_slots_of_a_resident_pool_stay_as_they_are() -> None:
    """Numbers of slots beyond the united experts' stand for experts that are late there."""
    pool = PoolOptions("resident", "0.5", "wait", "none")
    model = load_model("dummy:tiny", device=torch.device("cpu"), pool=pool)
    before = [len(block.experts.w13) for block in model.moe_blocks]
    model.fold_shared_experts()
    assert [len(block.experts.w13) for block in model.moe_blocks] == before
    assert all(block.num_shared_slots == 0 for block in model.moe_blocks)
