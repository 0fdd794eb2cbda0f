"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): biased projections, and a shared expert behind a sigmoid gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from backend.errors import ConfigError
from backend.models.config import ModelConfig, RawConfig, base_config, qwen_sparse_layers

ARCHITECTURE = "Qwen2MoeForCausalLM"


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """ModelConfig of a Qwen2-MoE config.json; defaults are those of transformers' Qwen2MoeConfig."""
    config = RawConfig(raw)
    base = base_config(config, ARCHITECTURE, expert_size_key="moe_intermediate_size")
    return replace(
        base,
        shared_expert_size=config.integer("shared_expert_intermediate_size"),
        dense_size=config.integer("intermediate_size"),
        moe_layers=qwen_sparse_layers(config, base.num_layers),
        qkv_bias=config.boolean("qkv_bias", True),
        sliding_windows=_sliding_windows(config, base.num_layers),
    )


def _sliding_windows(config: RawConfig, num_layers: int) -> tuple[int | None, ...]:
    """`layer_types` says it layer by layer; without it every second layer below `max_window_layers` slides."""
    use = config.boolean("use_sliding_window", False)
    types = config.raw.get("layer_types")
    if types is None:
        limit = config.integer("max_window_layers", default=28, minimum=0)
        sliding = [use and layer % 2 == 0 and layer < limit for layer in range(num_layers)]
    else:
        if not isinstance(types, list) or len(types) != num_layers:
            raise ConfigError(f"config.json: layer_types must have an entry for each of {num_layers} layers")
        for layer_type in types:
            if layer_type not in ("full_attention", "sliding_attention"):
                raise ConfigError(f"config.json: layer type {layer_type!r} is not supported")
        sliding = [layer_type == "sliding_attention" for layer_type in types]
    if any(sliding) and not use:
        raise ConfigError("config.json: layer_types has sliding_attention but use_sliding_window is false")
    window = config.integer("sliding_window", default=4096) if any(sliding) else None
    return tuple(window if slides else None for slides in sliding)
