"""Mixtral (Mixtral-8x7B, 8x22B): few large experts whose gate weights sum to 1, a sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping

from backend.models.config import ModelConfig, RawConfig, WeightNames, base_fields

MODEL_TYPE = "mixtral"
ARCHITECTURE = "MixtralForCausalLM"


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """ModelConfig of a Mixtral config.json; defaults are those of transformers' MixtralConfig."""
    config = RawConfig(raw)
    num_layers = config.integer("num_hidden_layers")
    window = config.integer("sliding_window") if raw.get("sliding_window") is not None else None
    return ModelConfig(
        **{  # type: ignore[arg-type]
            **base_fields(config, default_theta=1_000_000.0),
            "architecture": ARCHITECTURE,
            "rms_norm_eps": config.number("rms_norm_eps", 1e-5),
            "expert_size": config.integer("intermediate_size"),
            "norm_topk_prob": True,
            "sliding_windows": (window,) * num_layers,
            "names": WeightNames(moe_block="block_sparse_moe", gate="w1", up="w3", down="w2"),
        }
    )
