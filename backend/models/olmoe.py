"""OLMoE (OLMoE-1B-7B): RMSNorm over all query heads and over all key heads at once, optional clamping of q, k and v."""

from __future__ import annotations

from collections.abc import Mapping

from backend.errors import ConfigError
from backend.models.config import ModelConfig, RawConfig, base_fields

MODEL_TYPE = "olmoe"
ARCHITECTURE = "OlmoeForCausalLM"


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """ModelConfig of an OLMoE config.json; defaults are those of transformers' OlmoeConfig."""
    config = RawConfig(raw)
    config.refuse("sliding_window")
    fields = base_fields(config)
    if fields["head_dim"] * fields["num_heads"] != fields["hidden_size"]:  # type: ignore[operator]
        raise ConfigError("config.json: head_dim of an OLMoE model must be hidden_size / num_attention_heads")
    bias = config.boolean("attention_bias", False)
    return ModelConfig(
        **{  # type: ignore[arg-type]
            **fields,
            "architecture": ARCHITECTURE,
            "rms_norm_eps": config.number("rms_norm_eps", 1e-5),
            "expert_size": config.integer("intermediate_size"),
            "norm_topk_prob": config.boolean("norm_topk_prob", False),
            "qkv_bias": bias,
            "output_bias": bias,
            "qk_norm": "full",
            "clip_qkv": config.number("clip_qkv"),
        }
    )
