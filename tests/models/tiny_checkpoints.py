"""Tiny random checkpoints, saved by transformers as a released model would be."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from backend.tokenizer import EOS_TOKEN, synthetic_backend

_COMMON = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 2,
    # Large enough that logits of a tiny model are far apart: greedy tokens then do not hang on rounding.
    "initializer_range": 0.15,
}
_FAMILIES: dict[str, tuple[type, type, dict[str, object]]] = {
    "qwen2_moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        {"num_experts": 7, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 36},
    ),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"num_experts": 7, "moe_intermediate_size": 20, "head_dim": 16}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 5}),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {"num_experts": 7}),
}
FAMILIES = tuple(_FAMILIES)


def make_checkpoint(
    path: Path,
    family: str = "qwen2_moe",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **overrides: object,
) -> PreTrainedModel:
    """Save a random model of `family` with its config.json to `path`; `overrides` go to its transformers config.

    Returns the transformers model (eager attention), for comparison. A small `max_shard_size` gives a sharded checkpoint.
    """
    config_class, model_class, own = _FAMILIES[family]
    config = config_class(**{**_COMMON, **own, **overrides}, attn_implementation="eager")
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts norms at 1 and biases at 0, which would hide a mix-up of either.
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return model


def build_synthetic_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer of dummy checkpoints as a transformers object, to be saved beside a checkpoint."""
    return PreTrainedTokenizerFast(tokenizer_object=synthetic_backend(vocab_size), eos_token=EOS_TOKEN)
