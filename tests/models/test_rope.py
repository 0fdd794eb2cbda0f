"""Rotary frequencies are transformers' own, variant by variant."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from backend.models.rope import RopeConfig, rope_frequencies

HEAD_DIM, LENGTH = 32, 2048
FACTORS = {"short_factor": [1.0 + i / 9 for i in range(16)], "long_factor": [2.0] * 16}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 300, "attention_factor": 0.9},
        {"rope_type": "yarn", "factor": 16.0, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.8, "mscale_all_dim": 1.1},
        {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 8},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 2.0,
            "high_freq_factor": 8.0,
            "original_max_position_embeddings": 100,
        },
        {"rope_type": "longrope", "original_max_position_embeddings": 512, **FACTORS},
        {"rope_type": "longrope", "original_max_position_embeddings": 512, "factor": 8.0, **FACTORS},
        {"rope_type": "longrope", "original_max_position_embeddings": 512, "attention_factor": 1.5, **FACTORS},
    ],
    ids=lambda rope: "-".join(str(v) for v in rope.values() if not isinstance(v, list)),
)
def test_frequencies_and_scaling_match_transformers(rope: dict[str, object]) -> None:
    rope = {"rope_theta": 10000.0, **rope}
    theirs = Qwen2MoeConfig(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, max_position_embeddings=LENGTH, rope_parameters=dict(rope)
    )
    theirs.head_dim = HEAD_DIM
    expected, expected_scaling = ROPE_INIT_FUNCTIONS[str(rope["rope_type"])](theirs, torch.device("cpu"))
    config = RopeConfig.from_raw({"rope_parameters": rope}, 10000.0, LENGTH)
    frequencies, scaling = rope_frequencies(config, HEAD_DIM)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert scaling == pytest.approx(expected_scaling)
