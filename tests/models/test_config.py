"""What a config.json may say: unsupported architectures and options are named, never approximated."""

from __future__ import annotations

import pytest

from backend.errors import ConfigError
from backend.models.dummy import SHAPES
from backend.models.registry import parse_config

QWEN2 = SHAPES["tiny"]
QWEN3 = SHAPES["qwen3-30b-a3b"]
MIXTRAL = SHAPES["mixtral-8x7b"]
OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    ("raw", "changes", "complaint"),
    [
        (QWEN2, {"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM.*is not supported"),
        (QWEN2, {"architectures": None, "model_type": "gpt2"}, "gpt2.*is not supported"),
        (QWEN2, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (QWEN2, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (QWEN2, {"dual_chunk_attention_config": {"chunk_size": 1}}, "dual_chunk_attention_config"),
        (QWEN2, {"rope_scaling": {"type": "su", "factor": 2.0}}, "rope type 'su'"),
        (QWEN2, {"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn' needs 'factor'"),
        (QWEN2, {"rope_scaling": {"type": "linear", "factor": "2"}}, "rope option 'factor' must be a number"),
        (QWEN2, {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "option 'mrope_section'"),
        (QWEN2, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (QWEN2, {"layer_types": ["full_attention", "chunked_attention"]}, "layer type 'chunked_attention'"),
        (QWEN2, {"layer_types": ["full_attention"]}, "layer_types must have an entry for each of 2 layers"),
        (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window is false"),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 0}, "sliding_window must be a whole number"),
        (QWEN2, {"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        (QWEN2, {"num_attention_heads": 5}, "multiple of num_attention_heads"),
        (QWEN2, {"num_experts_per_tok": 9}, "more than the number of experts"),
        (QWEN2, {"mlp_only_layers": [0, 1]}, "no layer with experts"),
        (QWEN2, {"mlp_only_layers": "0"}, "mlp_only_layers must be a list"),
        (QWEN2, {"vocab_size": -1}, "vocab_size must be a whole number"),
        (QWEN2, {"vocab_size": None}, "vocab_size is missing"),
        (QWEN2, {"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false"),
        (QWEN2, {"rms_norm_eps": 0}, "rms_norm_eps must be a number greater than 0"),
        (QWEN2, {"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        (QWEN3, {"head_dim": 127}, "head_dim must be even"),
        (QWEN3, {"use_sliding_window": True, "sliding_window": True}, "sliding_window must be a whole number"),
        (MIXTRAL, {"sliding_window": -4}, "sliding_window must be a whole number"),
        (MIXTRAL, {"hidden_act": "relu"}, "hidden_act 'relu'"),
        (OLMOE, {"sliding_window": 4096}, "option sliding_window is not supported"),
        (OLMOE, {"head_dim": 32}, "head_dim of an OLMoE model"),
        (OLMOE, {"clip_qkv": -1.0}, "clip_qkv must be a number greater than 0"),
    ],
)
def test_unsupported_or_unusable_option_is_named(
    raw: dict[str, object], changes: dict[str, object], complaint: str
) -> None:
    parse_config(raw)
    with pytest.raises(ConfigError, match=complaint):
        parse_config({**raw, **changes})


def test_old_and_new_rope_spelling_mean_the_same() -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 256}
    old = parse_config({**QWEN2, "rope_theta": 5e5, "rope_scaling": {"type": "yarn", **yarn}})
    new = parse_config({**QWEN2, "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **yarn}})
    assert old == new


def test_context_is_the_length_for_which_the_frequencies_hold() -> None:
    def context(**rope: object) -> int:
        return parse_config({**QWEN2, "rope_scaling": rope}).max_position_embeddings

    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    assert context(type="default") == 1024
    assert context(type="yarn", factor=4.0, original_max_position_embeddings=1024) == 4096
    assert context(type="dynamic", factor=2.0) == 1024
    assert context(type="longrope", original_max_position_embeddings=300, **factors) == 300


def test_window_of_every_second_layer_below_the_limit() -> None:
    raw = {**QWEN2, "num_hidden_layers": 6, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3}
    assert parse_config(raw).sliding_windows == (32, None, 32, None, None, None)
