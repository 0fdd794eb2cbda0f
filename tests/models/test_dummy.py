"""Dummy models: the stated shapes, sane numbers, the stated skew."""

from __future__ import annotations

import pytest
import torch

from backend.errors import ConfigError
from backend.models import MoeModel, load_model
from backend.models.config import ModelConfig
from backend.models.dummy import raw_config
from backend.models.registry import parse_config
from tests.models.harness import Runner, prompt_logits

CPU = torch.device("cpu")


def shape(name: str) -> ModelConfig:
    return parse_config(raw_config(f"dummy:{name}"))


def expert_counts(model: MoeModel, tokens: int) -> torch.Tensor:
    """[layers, E] assignments of random tokens, seen at the routers."""
    counts = torch.zeros(model.config.num_layers, model.config.num_experts)
    prompt = torch.randint(0, model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    for i, layer in enumerate(model.layers):
        moe = layer.moe
        assert moe is not None
        moe.kernels = _Recorder(moe.kernels, counts[i])
    prompt_logits(model, prompt)
    return counts


class _Recorder:
    def __init__(self, kernels: object, counts: torch.Tensor) -> None:
        self.kernels, self.counts = kernels, counts

    def __getattr__(self, name: str) -> object:
        return getattr(self.kernels, name)

    def route(self, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
        experts, weights = self.kernels.route(*args)
        self.counts += torch.bincount(experts.flatten(), minlength=len(self.counts))
        return experts, weights


def test_shapes_are_the_published_ones() -> None:
    qwen = shape("qwen1.5-moe-a2.7b")
    assert (qwen.num_layers, qwen.hidden_size, qwen.num_heads, qwen.head_dim) == (24, 2048, 16, 128)
    assert (qwen.num_experts, qwen.top_k, qwen.expert_size, qwen.shared_expert_size) == (60, 4, 1408, 5632)
    assert shape("qwen3-30b-a3b").num_kv_heads == 4
    assert shape("mixtral-8x7b").expert_size == 14336


def test_cpu_m_has_294_million_parameters() -> None:
    assert load_model("dummy:cpu-m", device=CPU, dtype="bfloat16").weight_bytes() == pytest.approx(2 * 294e6, rel=0.01)


def test_seed_decides_the_weights() -> None:
    first, again, other = (load_model("dummy:tiny", device=CPU, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.embedding, again.embedding)
    assert not torch.equal(first.embedding, other.embedding)


@pytest.mark.parametrize("name", ["tiny", "cpu-s"])
def test_logits_have_a_standard_deviation_near_one(name: str) -> None:
    logits = prompt_logits(load_model(f"dummy:{name}", device=CPU), list(range(3, 40)))
    assert logits.isfinite().all()
    assert 0.7 < logits.std() < 1.4


def test_uniform_routing_uses_all_experts_evenly() -> None:
    counts = expert_counts(load_model("dummy:cpu-s", device=CPU), 600)
    share = counts / counts.sum(1, keepdim=True)
    assert share.max() < 4 / 60
    assert ((share > 0.2 / 60).float().mean(1) > 0.95).all()


def test_zipf_routing_is_skewed_by_its_exponent_in_a_new_order_per_layer() -> None:
    tops = []
    for exponent in (0.5, 1.2):
        counts = expert_counts(load_model("dummy:cpu-s", device=CPU, routing=f"zipf:{exponent}"), 600)
        share = (counts / counts.sum(1, keepdim=True)).sort(1, descending=True).values
        tops.append(share[:, :6].sum(1).mean().item())
        assert len(set(counts.argmax(1).tolist())) > 1
    assert 0.15 < tops[0] < tops[1] - 0.15


@pytest.mark.parametrize(
    ("checkpoint", "routing", "complaint"),
    [
        ("dummy:huge", "uniform", "unknown dummy shape 'huge'"),
        ("dummy:tiny", "zipf", "parameter routing"),
        ("dummy:tiny", "zipf:-1", "parameter routing"),
        ("dummy:tiny", "zipf:nan", "parameter routing"),
        ("dummy:tiny", "skewed", "parameter routing"),
    ],
)
def test_unknown_shape_or_routing_is_named(checkpoint: str, routing: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_model(checkpoint, device=CPU, routing=routing)


def test_unknown_dtype_is_named() -> None:
    with pytest.raises(ConfigError, match="parameter dtype"):
        load_model("dummy:tiny", device=CPU, dtype="int8")


def test_thresholds_reach_every_block_in_place() -> None:
    model = load_model("dummy:tiny", device=CPU)
    addresses = [layer.moe.thresholds.data_ptr() for layer in model.layers if layer.moe]
    model.set_thresholds([(0.5, 0.25, 1.0, 1.0), (0.75, 0.0, 1.0, 1.0)])
    assert [layer.moe.thresholds.tolist() for layer in model.layers if layer.moe] == [
        [0.5, 0.25, 1.0, 1.0],
        [0.75, 0.0, 1.0, 1.0],
    ]
    assert [layer.moe.thresholds.data_ptr() for layer in model.layers if layer.moe] == addresses
    with pytest.raises(RuntimeError):
        model.set_thresholds([(0.5, 0.25, 1.0)])


def test_greedy_runs_are_reproducible() -> None:
    model = load_model("dummy:tiny", device=CPU)
    runs = [Runner(model).generate([[5, 6, 7], [1]], 12) for _ in range(2)]
    assert runs[0] == runs[1]
