"""Responses carry each token once, in order, with what was asked for; and each request ends once."""

import json

import msgspec

from backend.engine.request import TokenOutput
from backend.engine.sampling_params import SamplingParams
from backend.serving.live_request import LiveRequest
from backend.serving.parse import ParsedRequest
from backend.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("dummy:tiny", 512)


def make(params=None, prompt="Hi", **flags) -> LiveRequest:
    parsed = ParsedRequest(text=prompt, input_ids=None, params=params or SamplingParams(), **flags)
    return LiveRequest(1, parsed, prompt, 2, TOKENIZER, arrival=0.0)


def feed(live, text_or_ids, index=0, finish="length", **more):
    ids = TOKENIZER.encode(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
    results = []
    for i, token_id in enumerate(ids):
        reason = finish if i == len(ids) - 1 else None
        results.append(live.add(TokenOutput(1, index, token_id, reason, **more), settings_version=4))
    return results


def texts(reply):
    return [value.decode() for value in reply.outputs["text_output"]]


def test_streaming_coalesces_and_loses_nothing():
    live = make(stream=True, return_num_output_tokens=True, return_finish_reason=True)
    assert feed(live, "ab", finish=None) == [(True, False), (False, False)], "the first token is urgent"
    first = live.take()
    assert texts(first) == ["ab"] and not first.final
    assert first.outputs["num_output_tokens"].tolist() == [2] and first.outputs["finish_reason"][0] == b""
    assert live.take() is None, "nothing new"
    assert feed(live, "cde")[-1] == (True, False), "the end is urgent"
    last = live.take()
    assert texts(last) == ["cde"] and last.outcome == "completed" and last.num_tokens == 3
    assert last.outputs["finish_reason"][0] == b"length"
    assert live.take() is None and live.ended


def test_one_response_carries_prompt_and_everything():
    live = make(prompt="Hello", echo_prompt=True, return_num_input_tokens=True, return_brownout=True)
    assert not any(urgent for urgent, _ in feed(live, " wor", finish=None))
    assert live.take() is None
    feed(live, "ld")
    reply = live.take()
    assert texts(reply) == ["Hello world"]
    assert reply.outputs["num_input_tokens"].tolist() == [2]
    assert json.loads(reply.outputs["brownout"][0]) == {"settings_version": 4, "united_share": 0.0}
    assert set(reply.outputs) == {"text_output", "num_input_tokens", "brownout"}, "only what was asked for"


def test_several_sequences_end_together():
    live = make(SamplingParams(n=2), stream=True, return_finish_reason=True)
    feed(live, "one", index=0)
    reply = live.take()
    assert texts(reply) == ["one", ""] and not reply.final
    assert list(reply.outputs["finish_reason"]) == [b"length", b""]
    feed(live, "two", index=1, finish="stop")
    reply = live.take()
    assert texts(reply) == ["", "two"] and reply.final
    assert list(reply.outputs["finish_reason"]) == [b"length", b"stop"]


def test_stop_string_cuts_the_text_and_aborts_the_sequence():
    live = make(SamplingParams(stop=("END",)), stream=True, return_num_output_tokens=True, return_finish_reason=True)
    results = feed(live, "so ENDless", finish=None)
    stopped = [abort for _, abort in results]
    assert stopped.count(True) == 1
    reply = live.take()
    assert texts(reply) == ["so "] and reply.final and reply.outputs["finish_reason"][0] == b"stop"
    assert reply.outputs["num_output_tokens"][0] == stopped.index(True) + 1


def test_part_of_a_stop_string_is_held_back_until_it_is_decided():
    live = make(SamplingParams(stop=("END",)), stream=True)
    feed(live, "so EN", finish=None)
    assert texts(live.take()) == ["so "]
    feed(live, "D", finish=None)
    reply = live.take()
    assert texts(reply) == [""] and reply.final


def test_logprobs_follow_the_tokens():
    live = make(stream=True, return_logprobs=True, return_cumulative_logprob=True)
    token = TOKENIZER.encode("a")[0]
    other = TOKENIZER.encode("b")[0]
    live.add(TokenOutput(1, 0, token, None, -0.5, 2, [(other, -0.1), (token, -0.5)]), 0)
    reply = live.take()
    assert reply.outputs["cumulative_logprob"].tolist() == [-0.5]
    (entry,) = json.loads(reply.outputs["logprobs"][0])
    assert entry == {
        str(token): {"logprob": -0.5, "rank": 2, "decoded_token": "a"},
        str(other): {"logprob": -0.1, "rank": 1, "decoded_token": "b"},
    }
    live.add(TokenOutput(1, 0, token, "length", -0.25, 1, []), 0)
    reply = live.take()
    assert reply.outputs["cumulative_logprob"].tolist() == [-0.75]
    assert len(json.loads(reply.outputs["logprobs"][0])) == 1, "only this response's tokens"


def test_an_error_ends_it_once():
    live = make(stream=True)
    feed(live, "ab", finish=None)
    live.fail("lost", "the engine died")
    live.fail("cancelled", "too late")
    reply = live.take()
    assert reply.error == "the engine died" and reply.outcome == "lost"
    assert live.take() is None


def test_an_error_after_the_last_token_changes_nothing():
    live = make()
    feed(live, "done")
    live.fail("cancelled", "too late")
    reply = live.take()
    assert reply.error is None and texts(reply) == ["done"]


def test_half_a_character_waits_for_its_other_half():
    live = make(stream=True)
    ids = TOKENIZER.encode("é")
    assert len(ids) == 2
    live.add(TokenOutput(1, 0, ids[0]), 0)
    assert texts(live.take()) == [""]
    live.add(TokenOutput(1, 0, ids[1], "length"), 0)
    assert texts(live.take()) == ["é"]


def test_token_outputs_survive_the_wire():
    token = TokenOutput(3, 1, 42, "stop", -1.5, 7, [(1, -0.5)], 0.25)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(token), type=TokenOutput) == token
