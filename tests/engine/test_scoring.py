"""Scoring given text: the model's own probabilities, whatever runs beside it, and nothing is left behind."""

import numpy as np
import pytest
import torch

from backend.brownout.settings import Settings
from backend.engine.llm import LLM
from backend.engine.request import Request
from backend.engine.sampling_params import SamplingParams
from backend.engine.scoring import Scorer
from backend.errors import InvalidRequestError, UnavailableError
from tests.models.harness import prompt_logits


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("dummy:tiny", max_model_len=64, kv_cache_blocks=40, max_batch_tokens=24, united="4")


def _sequences(count=9):
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 512, rng.integers(2, 60)).tolist(), 1) for _ in range(count)]


@pytest.mark.parametrize("decode", [False, True])
def test_scores_are_the_models_whatever_the_batch(llm, decode):
    sequences = _sequences()
    sequences[3] = (sequences[3][0], len(sequences[3][0]) - 1)
    sequences[4] = (sequences[4][0], len(sequences[4][0]))
    for batch in (1, 4):
        for (ids, first), found in zip(sequences, Scorer(llm.engine, batch, decode).score(sequences), strict=True):
            expected = prompt_logits(llm.engine.runner.model, ids).double().log_softmax(1)[first - 1 : -1]
            targets = torch.tensor(ids[first:])
            np.testing.assert_allclose(found.logprobs, expected.gather(1, targets.unsqueeze(1)).squeeze(1), atol=1e-4)
            assert found.greedy.tolist() == (expected.argmax(1) == targets).tolist()
    assert llm.engine.blocks.num_in_use == 0
    llm.engine.blocks.check()


def test_logits_are_shown_with_the_sequences_they_belong_to(llm):
    sequences = [(ids, max(1, len(ids) - 3)) for ids, _ in _sequences(4)]
    shown = {}

    def keep(owners, logits):
        for owner, row in zip(owners, logits, strict=True):
            shown.setdefault(owner, []).append(row.double().log_softmax(0))

    for number, found in enumerate(Scorer(llm.engine, 3, on_logits=keep).score(sequences)):
        ids, first = sequences[number]
        assert len(shown[number]) == len(ids) - first
        wanted = [float(row[token]) for row, token in zip(shown[number], ids[first:], strict=True)]
        np.testing.assert_allclose(found.logprobs, wanted, atol=1e-5)


def test_each_phase_has_its_threshold(llm):
    sequences = _sequences(4)
    found = {}
    for name, prefill, decode in (("full", 1.0, 1.0), ("prefill", 0.0, 1.0), ("decode", 1.0, 0.0)):
        llm.set_settings(Settings(threshold_prefill=prefill, threshold_decode=decode))
        for as_decode in (False, True):
            scored = Scorer(llm.engine, 4, as_decode).score(sequences)
            found[name, as_decode] = np.concatenate([s.logprobs for s in scored])
    llm.set_settings(Settings())
    np.testing.assert_allclose(found["decode", False], found["full", False], atol=1e-5)
    np.testing.assert_allclose(found["prefill", True], found["full", True], atol=1e-5)
    assert np.abs(found["prefill", False] - found["full", False]).max() > 0.01
    assert np.abs(found["decode", True] - found["full", True]).max() > 0.01


def test_what_cannot_be_scored_is_named(llm):
    with pytest.raises(InvalidRequestError, match="between token 1 and 3, got 0"):
        Scorer(llm.engine).score([([1, 2, 3], 0)])
    with pytest.raises(InvalidRequestError, match="context of 64 tokens"):
        Scorer(llm.engine).score([([1] * 65, 1)])
    llm.engine.add(Request("a", [1], SamplingParams()))
    with pytest.raises(UnavailableError, match="while the engine has no requests"):
        Scorer(llm.engine).score([([1, 2], 1)])
    llm.engine.abort("a")
