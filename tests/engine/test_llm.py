"""Text in, text out: the documented use without Triton."""

import pytest

from backend.brownout.settings import Settings
from backend.engine.llm import LLM
from backend.engine.sampling_params import SamplingParams
from backend.errors import InvalidRequestError


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("dummy:tiny", max_model_len=128, kv_cache_blocks=64, max_waiting=2)


def test_generate_completes_more_prompts_than_may_wait(llm):
    params = SamplingParams(max_tokens=6, n=2, seed=3, ignore_eos=True, logprobs=0)
    results = llm.generate(["Once", "upon", "a", [1, 2, 3], "time"], params)
    assert [len(completions) for completions in results] == [2] * 5
    for completions in results:
        for completion in completions:
            assert len(completion.token_ids) == 6 and completion.finish_reason == "length"
            assert completion.text == llm.tokenizer.decode(completion.token_ids)
            assert completion.cumulative_logprob < 0
    assert not llm.engine.has_work


def test_stop_string_ends_a_sequence(llm):
    greedy = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    full = llm.generate(["Hello"], greedy)[0][0].text
    stop = full[5:8]
    (completion,) = llm.generate(
        ["Hello"], SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, stop=(stop,))
    )[0]
    assert completion.text == full[: full.index(stop)] and completion.finish_reason == "stop"
    assert not llm.engine.has_work


def test_completions_tell_the_share_of_united_experts():
    llm = LLM("dummy:tiny", max_model_len=128, kv_cache_blocks=64, united="8")
    greedy = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    assert [c.united_share for (c,) in llm.generate(["some words", "and others"], greedy)] == [0.0, 0.0]
    llm.set_settings(Settings(version=1, threshold_prefill=0.0, threshold_decode=0.0))
    assert all(0.5 < c.united_share <= 1 for (c,) in llm.generate(["new words", "in any case"], greedy))


def test_abandoned_stream_leaves_nothing_behind(llm):
    stream = llm.stream(["Hello", "there"], SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    stream.close()
    assert not llm.engine.has_work and llm.engine.blocks.num_in_use == 0


def test_one_unusable_prompt_stops_the_call_before_anything_runs(llm):
    with pytest.raises(InvalidRequestError, match="at most 127"):
        llm.generate(["fine", list(range(128))])
    with pytest.raises(InvalidRequestError, match="temperature"):
        llm.generate(["fine"], SamplingParams(temperature=-1))
    assert not llm.engine.has_work


def test_widened_experts_change_no_token(llm):
    prompts = ["Once upon a time", "there was", [5, 6, 7]]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    wide = LLM("dummy:tiny", max_model_len=128, kv_cache_blocks=64, widen_experts=4)
    found = wide.generate(prompts, params)
    assert [c[0].token_ids for c in found] == [c[0].token_ids for c in llm.generate(prompts, params)]
    narrow, wider = llm.engine.runner.model, wide.engine.runner.model
    experts = sum(layer.moe.experts.w13.nbytes + layer.moe.experts.w2.nbytes for layer in narrow.layers)
    assert wider.weight_bytes() - narrow.weight_bytes() == 3 * experts
