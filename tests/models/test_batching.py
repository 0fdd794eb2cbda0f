"""How requests are cut into steps and blocks must not show in what they generate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backend.models import MoeModel, load_model
from tests.models.harness import Runner, Sequence, prompt_logits
from tests.models.tiny_checkpoints import make_checkpoint

CPU = torch.device("cpu")
NEW_TOKENS = 24


@pytest.fixture(scope="module", params=["qwen2_moe", "qwen3_moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MoeModel:
    """One model with equal numbers of query and key heads and windows in some layers, one with grouped heads."""
    options = {
        "qwen2_moe": {
            "num_key_value_heads": 4,
            "use_sliding_window": True,
            "sliding_window": 19,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "qwen3_moe": {},
    }[request.param]
    path: Path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(path, request.param, **options)
    return load_model(str(path), device=CPU)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 199, (n,), generator=generator).tolist() for n in (1, 2, 16, 17, 33, 50, 95)]


@pytest.fixture(scope="module")
def alone(model: MoeModel, prompts: list[list[int]]) -> list[list[int]]:
    return [Runner(model).generate([prompt], NEW_TOKENS)[0] for prompt in prompts]


@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_block_size_does_not_change_tokens(
    model: MoeModel, prompts: list[list[int]], alone: list[list[int]], block_size: int
) -> None:
    assert Runner(model, block_size).generate(prompts, NEW_TOKENS) == alone


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunked_prefill_gives_the_same_tokens(
    model: MoeModel, prompts: list[list[int]], alone: list[list[int]], chunk: int
) -> None:
    assert Runner(model).generate(prompts, NEW_TOKENS, chunk=chunk) == alone


def test_sequences_that_join_late_share_steps_with_decodes(
    model: MoeModel, prompts: list[list[int]], alone: list[list[int]]
) -> None:
    runner, running, waiting = Runner(model, 8), [], [Sequence(list(prompt)) for prompt in prompts]
    everyone = list(waiting)
    while waiting or running:
        if waiting:
            running.append(waiting.pop(0))
        logits = runner.step([(s, min(13, len(s.tokens) - s.computed)) for s in running])
        for sequence, row in zip(runner.order, logits, strict=True):
            if sequence.computed == len(sequence.tokens):
                sequence.tokens.append(int(row.argmax()))
        running = [s for s in running if len(s.tokens) < len(prompts[everyone.index(s)]) + NEW_TOKENS]
    assert [s.tokens[len(p) :] for s, p in zip(everyone, prompts, strict=True)] == alone


def test_batch_of_32_gives_the_tokens_of_each_sequence_alone(model: MoeModel) -> None:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 199, (3 + i % 29,), generator=generator).tolist() for i in range(32)]
    together = Runner(model).generate(prompts, 8)
    for i in (0, 13, 31):
        assert Runner(model).generate([prompts[i]], 8) == [together[i]]


def test_logits_only_for_the_wanted_rows(model: MoeModel, prompts: list[list[int]]) -> None:
    sequence = Sequence(list(prompts[4]))
    last = Runner(model).step([(sequence, len(sequence.tokens))])
    assert last.shape == (1, model.config.vocab_size)
    torch.testing.assert_close(last[0], prompt_logits(model, prompts[4])[-1], rtol=1e-4, atol=1e-4)
