"""Mixtral (Mixtral-8x7B, 8x22B): few large experts whose gate weights sum to 1, a sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from backend.models.config import ModelConfig, RawConfig, WeightNames, base_config

ARCHITECTURE = "MixtralForCausalLM"


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """ModelConfig of a Mixtral config.json; defaults are those of transformers' MixtralConfig."""
    config = RawConfig(raw)
    base = base_config(
        config, ARCHITECTURE, expert_size_key="intermediate_size", default_theta=1_000_000.0, default_eps=1e-5
    )
    window = config.integer("sliding_window") if raw.get("sliding_window") is not None else None
    return replace(
        base,
        norm_topk_prob=True,
        sliding_windows=(window,) * base.num_layers,
        names=WeightNames(moe_block="block_sparse_moe", gate="w1", up="w3", down="w2"),
    )
