"""The same logits and the same greedy tokens as transformers, family by family and option by option."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backend.models import load_model
from tests.models.harness import Runner, prompt_logits
from tests.models.tiny_checkpoints import make_checkpoint

YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 3.0, 5.0, 7.0, 9.0],
    "original_max_position_embeddings": 256,
}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "qwen2_plain": ("qwen2_moe", {}),
    "qwen2_dense_layers_tied_renormalised": (
        "qwen2_moe",
        {"mlp_only_layers": [1], "tie_word_embeddings": True, "norm_topk_prob": True, "num_key_value_heads": 1},
    ),
    "qwen2_sparse_step_no_bias_yarn": (
        "qwen2_moe",
        {"decoder_sparse_step": 2, "qkv_bias": False, "rope_parameters": YARN, "num_hidden_layers": 4},
    ),
    "qwen2_sliding_by_layer_number": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 3, "num_hidden_layers": 4},
    ),
    "qwen2_sliding_by_layer_types": (
        "qwen2_moe",
        {
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "num_key_value_heads": 4,
        },
    ),
    "qwen2_longrope": ("qwen2_moe", {"rope_parameters": LONGROPE}),
    "qwen3_plain": ("qwen3_moe", {}),
    "qwen3_biased_renormalised_tied": (
        "qwen3_moe",
        {"attention_bias": True, "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "qwen3_sliding_dense_layer_linear_rope": (
        "qwen3_moe",
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "mlp_only_layers": [0],
            "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0},
        },
    ),
    "qwen3_wide_heads_yarn_options": (
        "qwen3_moe",
        {
            "head_dim": 24,
            "num_key_value_heads": 1,
            "decoder_sparse_step": 2,
            "rope_parameters": {
                **YARN,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "mscale": 0.7,
                "mscale_all_dim": 1.2,
                "truncate": False,
            },
        },
    ),
    "mixtral_plain": ("mixtral", {}),
    "mixtral_sliding": ("mixtral", {"sliding_window": 13, "num_experts_per_tok": 3}),
    "mixtral_llama3_rope_tied": ("mixtral", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mixtral_head_dim_dynamic_rope": (
        "mixtral",
        {
            "head_dim": 20,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
        },
    ),
    "olmoe_plain": ("olmoe", {"num_key_value_heads": 4}),
    "olmoe_clipped_grouped_heads": ("olmoe", {"clip_qkv": 0.6}),
    "olmoe_biased_renormalised": ("olmoe", {"attention_bias": True, "norm_topk_prob": True}),
    "olmoe_tied_yarn_factor": (
        "olmoe",
        {"tie_word_embeddings": True, "rope_parameters": {**YARN, "attention_factor": 1.3}},
    ),
}
PROMPT_LENS = (37, 5)
NEW_TOKENS = 64


@pytest.mark.parametrize("case", CASES)
def test_same_logits_and_greedy_tokens_as_transformers(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    reference = make_checkpoint(tmp_path, family, seed=len(case), **options)
    model = load_model(str(tmp_path), device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 199, (n,), generator=generator).tolist() for n in PROMPT_LENS]

    with torch.no_grad():
        expected = reference(torch.tensor([prompts[0]])).logits[0]
    assert relative_error(prompt_logits(model, prompts[0]), expected) < 1e-4

    ours = Runner(model, block_size=8).generate(prompts, NEW_TOKENS)
    for prompt, tokens in zip(prompts, ours, strict=True):
        theirs = reference.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert tokens == theirs[0, len(prompt) :].tolist()


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return ((ours - expected).abs().max() / expected.abs().max()).item()
