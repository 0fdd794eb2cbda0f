"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): RMSNorm on each query and key head, no shared expert."""

from __future__ import annotations

from collections.abc import Mapping

from backend.models.config import ModelConfig, RawConfig, base_fields, sparse_layers

MODEL_TYPE = "qwen3_moe"
ARCHITECTURE = "Qwen3MoeForCausalLM"


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """ModelConfig of a Qwen3-MoE config.json; defaults are those of transformers' Qwen3MoeConfig."""
    config = RawConfig(raw)
    num_layers = config.integer("num_hidden_layers")
    bias = config.boolean("attention_bias", False)
    # Unlike Qwen2-MoE, the window holds for every layer; transformers does not read max_window_layers here.
    window = config.integer("sliding_window", default=4096) if config.boolean("use_sliding_window", False) else None
    return ModelConfig(
        **{  # type: ignore[arg-type]
            **base_fields(config),
            "architecture": ARCHITECTURE,
            "expert_size": config.integer("moe_intermediate_size"),
            "dense_size": config.integer("intermediate_size"),
            "moe_layers": sparse_layers(config, num_layers),
            "norm_topk_prob": config.boolean("norm_topk_prob", False),
            "qkv_bias": bias,
            "output_bias": bias,
            "qk_norm": "head",
            "sliding_windows": (window,) * num_layers,
        }
    )
