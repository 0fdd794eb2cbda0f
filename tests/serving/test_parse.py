"""Request parsing: what is accepted, and that everything else is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.engine.sampling_params import SamplingParams
from backend.errors import InvalidRequestError
from backend.serving.parse import RETURN_FLAGS, ParsedRequest, parse_request
from tests.serving.fake_pb_utils import InferenceRequest, Tensor, request, strings


def parse(*args, decoupled: bool = True, **kwargs) -> ParsedRequest:
    return parse_request(request(*args, **kwargs), decoupled)


def test_a_bare_prompt_gets_the_defaults() -> None:
    parsed = parse("Hé 🎉")
    assert parsed == ParsedRequest(text="Hé 🎉", input_ids=None, params=SamplingParams(), echo_prompt=True)


def test_a_prompt_as_token_ids() -> None:
    parsed = parse(None, input_ids=np.array([5, 0, 2**40]))
    assert (parsed.text, parsed.input_ids) == (None, [5, 0, 2**40])


def test_streaming_leaves_the_prompt_out() -> None:
    assert parse(stream=True) == ParsedRequest("Hello", None, SamplingParams(), stream=True, echo_prompt=False)
    assert not parse(stream=True, exclude_input_in_output=True).echo_prompt


@pytest.mark.parametrize("exclude", [True, False])
def test_one_response_has_the_prompt_unless_told_otherwise(exclude: bool) -> None:
    assert parse(stream=False, exclude_input_in_output=exclude).echo_prompt is not exclude
    assert parse(decoupled=False, exclude_input_in_output=exclude).echo_prompt is not exclude


def test_return_flags() -> None:
    for flag in RETURN_FLAGS:
        parsed = parse(**{flag: True})
        assert [name for name in RETURN_FLAGS if getattr(parsed, name)] == [flag]
    assert not parse(return_logprobs=False).return_logprobs


def test_outputs_that_need_logprobs_make_the_engine_compute_them() -> None:
    assert parse(return_cumulative_logprob=True).engine_params.logprobs == 0
    assert parse(return_logprobs=True).engine_params.logprobs == 0
    assert parse(return_logprobs=True, sampling={"logprobs": 3}).engine_params.logprobs == 3
    assert parse().engine_params.logprobs is None


ALL = {
    "max_tokens": 7,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.25,
    "seed": 2**63 - 1,
    "logprobs": 3,
    "n": 2,
    "priority": -4,
    "timeout_s": 2.5,
}
REST = {"stop": ["a", "bc"], "stop_token_ids": [1, 2], "ignore_eos": True, "brownout": "never"}
EXPECTED = SamplingParams(**ALL, **{**REST, "stop": ("a", "bc"), "stop_token_ids": (1, 2)})


def test_every_sampling_parameter() -> None:
    assert parse(sampling={**ALL, **REST}).params == EXPECTED


def test_numbers_may_be_strings() -> None:
    as_strings = {key: str(value) for key, value in ALL.items()}
    rest = {**REST, "stop_token_ids": "[1, 2]", "ignore_eos": "true"}
    assert parse(sampling={**as_strings, **rest}).params == EXPECTED


def test_triton_parameters_are_used_if_there_are_no_sampling_parameters() -> None:
    parameters = {**ALL, "stop": "a", "stop_token_ids": "[1, 2]", "ignore_eos": True, "brownout": "never"}
    assert parse(parameters=parameters).params == SamplingParams(
        **{**ALL, "stop": ("a",), "stop_token_ids": (1, 2), "ignore_eos": True, "brownout": "never"}
    )
    assert parse(parameters={"temperature": 0.5, "nonsense": 1}, sampling={"top_k": 3}).params == SamplingParams(
        top_k=3
    )


def test_tritons_own_parameters_are_no_sampling_parameters() -> None:
    own = {
        "sequence_id": 3,
        "sequence_start": True,
        "sequence_end": True,
        "timeout": 5,
        "headers": "x",
        "binary_data_output": True,
        "triton_enable_empty_final_response": True,
    }
    assert parse(parameters=own).params == SamplingParams()
    with pytest.raises(InvalidRequestError, match="unknown sampling parameter"):
        parse(sampling={"sequence_id": 3})


@pytest.mark.parametrize("header", ["x-request-id", "X-Forwarded-For", "user-agent", "traceparent", "Authorization"])
def test_headers_that_triton_forwards_are_no_sampling_parameters(header: str) -> None:
    assert parse(parameters={header: "1", "top_k": 3}).params == SamplingParams(top_k=3)
    with pytest.raises(InvalidRequestError, match="unknown sampling parameter"):
        parse(sampling={header: "1"})


def test_a_sampling_parameter_with_a_hyphen_is_no_header() -> None:
    with pytest.raises(InvalidRequestError, match="did you mean max_tokens"):
        parse(parameters={"max-tokens": 3})


def test_tritons_request_timeout_is_honoured() -> None:
    assert parse(timeout_us=2_500_000).params.timeout_s == 2.5
    assert parse(timeout_us=2_500_000, sampling={"timeout_s": 9}).params.timeout_s == 9


@pytest.mark.parametrize(
    ("given_value", "meant"),
    [
        ({"max_tokens": 5.0}, SamplingParams(max_tokens=5)),
        ({"max_tokens": "5.0"}, SamplingParams(max_tokens=5)),
        ({"max_tokens": 1e3}, SamplingParams(max_tokens=1000)),
        ({"max_tokens": 2**31 - 1}, SamplingParams(max_tokens=2**31 - 1)),
        ({"seed": "9223372036854775807"}, SamplingParams(seed=2**63 - 1)),
        ({"temperature": 0}, SamplingParams(temperature=0.0)),
        ({"temperature": "+1e-1"}, SamplingParams(temperature=0.1)),
        ({"temperature": ".5"}, SamplingParams(temperature=0.5)),
        ({"top_k": -1}, SamplingParams(top_k=-1)),
        ({"ignore_eos": "0"}, SamplingParams()),
        ({"ignore_eos": "True"}, SamplingParams(ignore_eos=True)),
        ({"ignore_eos": 1}, SamplingParams(ignore_eos=True)),
        ({"stop": "x"}, SamplingParams(stop=("x",))),
        ({"stop": "[x"}, SamplingParams(stop=("[x",))),
        ({"stop": []}, SamplingParams()),
        ({"stop_token_ids": ["7", 8.0]}, SamplingParams(stop_token_ids=(7, 8))),
        ({"seed": None, "logprobs": None, "timeout_s": None}, SamplingParams()),
        ({}, SamplingParams()),
    ],
    ids=str,
)
def test_accepted_spellings(given_value: dict, meant: SamplingParams) -> None:
    assert parse(sampling=given_value).params == meant


NAN, INFINITY = float("nan"), float("inf")
BAD_SAMPLING = [
    ({"max_token": 5}, "max_token.*did you mean max_tokens"),
    ({"Temperature": 1}, "did you mean temperature"),
    ({"xyzzy": 1}, "xyzzy.*known are max_tokens"),
    ({"max_tokens": 0}, "max_tokens must be between 1 and"),
    ({"max_tokens": -3}, "max_tokens must be between 1 and"),
    ({"max_tokens": 2**31}, "max_tokens must be between 1 and"),
    ({"max_tokens": 10**30}, "max_tokens must be a number of at most 64 bits"),
    ({"max_tokens": "9" * 39}, "max_tokens must be a number of at most 64 bits"),
    ({"max_tokens": "9" * 5000}, "max_tokens must be a whole number.*5002 characters"),
    ({"max_tokens": 1e300}, "max_tokens must be a number of at most 64 bits"),
    ({"max_tokens": 1.5}, "max_tokens must be a whole number"),
    ({"max_tokens": "many"}, 'max_tokens must be a whole number, got "many"'),
    ({"max_tokens": ""}, "max_tokens must be a whole number"),
    ({"max_tokens": True}, "max_tokens must be a whole number, got true"),
    ({"max_tokens": None}, "max_tokens must be a whole number, got null"),
    ({"max_tokens": [5]}, "max_tokens must be a whole number"),
    ({"max_tokens": {"a": 1}}, "max_tokens must be a whole number"),
    ({"max_tokens": "1_000"}, "max_tokens must be a whole number"),
    ({"max_tokens": "٣"}, "max_tokens must be a whole number"),
    ({"min_tokens": 20}, r"min_tokens must be between 0 and max_tokens \(16\)"),
    ({"min_tokens": -1}, "min_tokens must be"),
    ({"temperature": -0.1}, "temperature must be between 0 and 100"),
    ({"temperature": "warm"}, "temperature must be a finite number"),
    ({"temperature": "nan"}, "temperature must be a finite number"),
    ({"temperature": "inf"}, "temperature must be a finite number"),
    ({"temperature": "1e999"}, "temperature must be a finite number"),
    ({"temperature": NAN}, "NaN is not allowed"),
    ({"temperature": INFINITY}, "Infinity is not allowed"),
    ({"temperature": False}, "temperature must be a finite number"),
    ({"temperature": []}, "temperature must be a finite number"),
    ({"temperature": 10**400}, "temperature must be a finite number"),
    ('{"temperature": 1e999}', "temperature must be a finite number"),
    ({"top_p": 0}, "top_p must be greater than 0"),
    ({"top_p": 1.01}, "top_p must be greater than 0 and at most 1"),
    ({"top_k": -2}, "top_k must be -1 or 0"),
    ({"min_p": -0.1}, "min_p must be between 0 and 1"),
    ({"min_p": 1.1}, "min_p must be between 0 and 1"),
    ({"repetition_penalty": 0}, "repetition_penalty must be greater than 0"),
    ({"presence_penalty": 2.1}, "presence_penalty must be between -2 and 2"),
    ({"frequency_penalty": -2.1}, "frequency_penalty must be between -2 and 2"),
    ({"seed": -1}, "seed must be between 0 and"),
    ({"seed": 2**63}, "seed must be a number of at most 64 bits"),
    ({"stop": ""}, "stop must be made of non-empty strings"),
    ({"stop": ["a", ""]}, "stop must be made of non-empty strings"),
    ({"stop": ["a"] * 17}, "stop must be at most 16 strings"),
    ({"stop": 5}, "stop must be a string or a list of strings"),
    ({"stop": ["a", 5]}, "stop must be a string or a list of strings"),
    ({"stop": None}, "stop must be a string or a list of strings"),
    ({"stop": "\ud800"}, "stop must be made of Unicode text"),
    ({"stop_token_ids": [-1]}, "stop_token_ids must be made of ids up to"),
    ({"stop_token_ids": [2**31]}, "stop_token_ids must be made of ids up to"),
    ({"stop_token_ids": ["x"]}, "stop_token_ids must be a whole number"),
    ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids"),
    ({"stop_token_ids": "5"}, "stop_token_ids must be a list of token ids"),
    ({"stop_token_ids": "[5"}, "stop_token_ids must be a list of token ids"),
    ({"stop_token_ids": list(range(257))}, "stop_token_ids must be at most 256 ids"),
    ({"ignore_eos": "yes"}, "ignore_eos must be true or false"),
    ({"ignore_eos": 2}, "ignore_eos must be true or false"),
    ({"ignore_eos": 1.0}, "ignore_eos must be true or false"),
    ({"ignore_eos": []}, "ignore_eos must be true or false"),
    ({"logprobs": -1}, "logprobs must be between 0 and 64"),
    ({"logprobs": 65}, "logprobs must be between 0 and 64"),
    ({"n": 0}, "n must be between 1 and 64"),
    ({"n": 65}, "n must be between 1 and 64"),
    ({"priority": 101}, "priority must be between -100 and 100"),
    ({"brownout": "always"}, 'brownout must be "auto" or "never"'),
    ({"brownout": True}, "brownout must be a string"),
    ({"timeout_s": 0}, "timeout_s must be greater than 0"),
    ({"timeout_s": -1}, "timeout_s must be greater than 0"),
    ('{"top_k": 5, "top_k": 6}', 'the key "top_k" appears twice'),
    ("[]", "sampling_parameters must be a JSON object, got"),
    ("5", "sampling_parameters must be a JSON object, got 5"),
    ("null", "sampling_parameters must be a JSON object"),
    ("", "sampling_parameters must be a JSON object"),
    ("{", "sampling_parameters must be a JSON object"),
    ("{'top_k': 5}", "sampling_parameters must be a JSON object"),
    ('{"max_tokens": ' + "9" * 5000 + "}", "sampling_parameters must be a JSON object|64 bits"),
    ("[" * 100_000, "sampling_parameters must be a JSON object"),
    (b"\xff{}", "sampling_parameters must be valid UTF-8"),
]


@pytest.mark.parametrize(("sampling", "message"), BAD_SAMPLING, ids=range(len(BAD_SAMPLING)))
def test_bad_sampling_parameters_are_refused_by_name(sampling: object, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        parse(sampling=sampling)
    assert len(str(caught.value)) < 500


BAD_REQUESTS = [
    (request(None), "exactly one of text_input and input_ids, got neither"),
    (request("a", input_ids=np.array([1])), "exactly one of text_input and input_ids, got both"),
    (request(""), "text_input must not be empty"),
    (request(b"ab\xff"), "text_input must be valid UTF-8; byte 2 of 3"),
    (request(b"\xed\xa0\x80"), "text_input must be valid UTF-8"),
    (request(b"\xf0\x9f"), "text_input must be valid UTF-8"),
    (InferenceRequest([Tensor("text_input", strings("\ud800".encode("utf-8", "surrogatepass")))]), "valid UTF-8"),
    (InferenceRequest([Tensor("text_input", np.array(["\ud800"], dtype=np.object_))]), "valid UTF-8"),
    (InferenceRequest([Tensor("text_input", strings("a", "b"))]), r"text_input must be one STRING .* shape \[2\]"),
    (InferenceRequest([Tensor("text_input", strings())]), r"text_input must be one STRING .* shape \[0\]"),
    (InferenceRequest([Tensor("text_input", strings("a")[None])]), r"shape \[1, 1\]"),
    (InferenceRequest([Tensor("text_input", np.array([5]))]), "text_input must be of type STRING"),
    (request(None, input_ids=np.array([], dtype=np.int64)), "input_ids must be a list of at least one"),
    (request(None, input_ids=np.array([[1]])), "input_ids must be a list of at least one"),
    (request(None, input_ids=np.array([1, -1])), "input_ids must not be negative, got -1"),
    (request(None, input_ids=np.array([1], dtype=np.int32)), "input_ids must be of type INT64"),
    (request(None, input_ids=np.array([1.0])), "input_ids must be of type INT64"),
    (request(stream=np.array([1])), "stream must be of type BOOL"),
    (request(stream=np.array([True, False])), "stream must be one BOOL"),
    (request(return_logprobs=strings("true")), "return_logprobs must be of type BOOL"),
    (request(stream=True, exclude_input_in_output=False), "exclude_input_in_output must be true"),
    (request(return_logprob=True), "unknown input .*return_logprob.*did you mean return_logprobs"),
    (request(prompt=strings("x")), "unknown input"),
    (request(parameters={"max_token": 3}), "unknown sampling parameter.*did you mean max_tokens"),
    (request(parameters={"stream": True}), "unknown sampling parameter"),
    (request(parameters="{"), "the request's parameters must be a JSON object"),
    (request(parameters='{"temperature": nan}'), "the request's parameters must be a JSON object"),
    (request(sampling_parameters=np.array([7])), "sampling_parameters must be of type STRING"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_REQUESTS, ids=range(len(BAD_REQUESTS)))
def test_bad_requests_are_refused_by_name(bad: InferenceRequest, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        parse_request(bad, decoupled=True)


def test_a_model_with_one_response_does_not_stream() -> None:
    with pytest.raises(InvalidRequestError, match="stream must be false on this model"):
        parse(stream=True, decoupled=False)
    assert not parse(stream=False, decoupled=False).stream


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(values=st.dictionaries(st.sampled_from([*ALL, *REST]), json_values, max_size=4))
def test_any_json_is_parsed_or_refused(values: dict) -> None:
    try:
        params = parse(sampling=json.dumps(values)).params
    except InvalidRequestError:
        return
    assert params.validate() == params


@settings(max_examples=200, deadline=None)
@given(text=st.binary(min_size=1, max_size=30))
def test_any_bytes_are_a_prompt_or_refused(text: bytes) -> None:
    try:
        parsed = parse(text)
    except InvalidRequestError:
        return
    assert parsed.text.encode() == text


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(temperature="1"), "temperature: Expected"),
        (SamplingParams(max_tokens=1.5), "max_tokens: Expected"),
        (SamplingParams(stop="ab"), "stop: Expected"),
        (SamplingParams(ignore_eos=1), "ignore_eos: Expected"),
        (SamplingParams(temperature=NAN), "temperature must be a finite number"),
    ],
    ids=str,
)
def test_parameters_made_in_python_are_checked_too(params: SamplingParams, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        params.validate()


def test_parameters_made_in_python_get_their_exact_types() -> None:
    assert SamplingParams(stop=["a"], temperature=1).validate() == SamplingParams(stop=("a",), temperature=1.0)
