"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): RMSNorm on each query and key head, no shared expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from backend.models.config import ModelConfig, RawConfig, base_config, qwen_sparse_layers

ARCHITECTURE = "Qwen3MoeForCausalLM"


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """ModelConfig of a Qwen3-MoE config.json; defaults are those of transformers' Qwen3MoeConfig."""
    config = RawConfig(raw)
    base = base_config(config, ARCHITECTURE, expert_size_key="moe_intermediate_size")
    bias = config.boolean("attention_bias", False)
    # Unlike Qwen2-MoE, the window holds for every layer; transformers does not read max_window_layers here.
    window = config.integer("sliding_window", default=4096) if config.boolean("use_sliding_window", False) else None
    return replace(
        base,
        dense_size=config.integer("intermediate_size"),
        moe_layers=qwen_sparse_layers(config, base.num_layers),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        sliding_windows=(window,) * base.num_layers,
    )
