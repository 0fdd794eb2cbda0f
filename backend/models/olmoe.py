"""OLMoE (OLMoE-1B-7B): RMSNorm over all query heads and over all key heads at once, optional clamping of q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from backend.errors import ConfigError
from backend.models.config import ModelConfig, RawConfig, base_config

ARCHITECTURE = "OlmoeForCausalLM"


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """ModelConfig of an OLMoE config.json; defaults are those of transformers' OlmoeConfig."""
    config = RawConfig(raw)
    config.refuse("sliding_window")
    base = base_config(config, ARCHITECTURE, expert_size_key="intermediate_size", default_eps=1e-5)
    if base.head_dim * base.num_heads != base.hidden_size:
        raise ConfigError("config.json: head_dim of an OLMoE model must be hidden_size / num_attention_heads")
    bias = config.boolean("attention_bias", False)
    return replace(base, qkv_bias=bias, output_bias=bias, qk_norm="full", clip_qkv=config.optional_number("clip_qkv"))
