"""Every interface understands every optional input, gives every optional output, and says the same text."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tritonclient.http as tritonhttp
from tritonclient.utils import np_to_triton_dtype

from backend.serving.launch_client import RunningServer
from tests.server.conftest import TINY_CONTEXT, TINY_VOCAB
from tests.server.observe import read_metric
from tests.server.talk import (
    ASK,
    ONE_RESPONSE,
    STREAMING,
    ServerError,
    ask_in_one_stream,
    check_code,
    generate,
    post,
    sampling,
    to_array,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.server

PROMPT = "The rain of hé 🎉"
NUM_PROMPT_TOKENS = len(PROMPT.encode())  # the tokenizer of this checkpoint has one token per byte here
OPTIONAL_OUTPUTS = {
    "return_finish_reason": "finish_reason",
    "return_cumulative_logprob": "cumulative_logprob",
    "return_logprobs": "logprobs",
    "return_num_input_tokens": "num_input_tokens",
    "return_num_output_tokens": "num_output_tokens",
    "return_brownout": "brownout",
}
ALL_OUTPUTS = dict.fromkeys(OPTIONAL_OUTPUTS, True)
WITHOUT_PROMPT = {"exclude_input_in_output": True}

interface = pytest.mark.parametrize("interface", ASK)


@pytest.fixture(scope="module")
def completion(server: RunningServer) -> str:
    """What the model says greedily to PROMPT in 32 tokens."""
    return generate(
        server, {"text_input": PROMPT, "sampling_parameters": sampling(max_tokens=32), **WITHOUT_PROMPT}
    ).text


@interface
def test_greedy_text_is_the_same_over_every_interface(server: RunningServer, completion: str, interface: str) -> None:
    inputs = {"text_input": PROMPT, "sampling_parameters": sampling(max_tokens=32), **WITHOUT_PROMPT}
    assert len(completion) > 32
    assert ASK[interface](server, inputs).text == completion


@interface
def test_every_optional_output(server: RunningServer, completion: str, interface: str) -> None:
    inputs = {"text_input": PROMPT, "sampling_parameters": sampling(max_tokens=32, logprobs=2), **WITHOUT_PROMPT}
    answer = ASK[interface](server, {**inputs, **ALL_OUTPUTS})
    assert answer.text == completion
    assert [r["finish_reason"] for r in answer.responses] == [""] * (len(answer.responses) - 1) + ["length"]
    assert {r["num_input_tokens"] for r in answer.responses} == {NUM_PROMPT_TOKENS}
    assert answer.num_tokens == 32
    assert [json.loads(r["brownout"])["united_share"] for r in answer.responses] == [0] * len(answer.responses)
    entries = []
    for response in answer.responses:
        entries_here = json.loads(response["logprobs"])
        assert len(entries_here) == response["num_output_tokens"]
        entries += entries_here
    chosen = [next(iter(entry.values())) for entry in entries]
    assert all(len(entry) == 2 for entry in entries)
    assert {token["rank"] for token in chosen} == {1}
    total = sum(token["logprob"] for token in chosen)
    assert answer.last["cumulative_logprob"] == pytest.approx(total, rel=1e-4)


@interface
@pytest.mark.parametrize("flag", OPTIONAL_OUTPUTS)
def test_an_output_comes_only_when_asked_for(server: RunningServer, interface: str, flag: str) -> None:
    inputs = {
        "text_input": "Hi",
        "sampling_parameters": sampling(max_tokens=2),
        **dict.fromkeys(OPTIONAL_OUTPUTS, False),
    }
    answer = ASK[interface](server, {**inputs, flag: True})
    for response in answer.responses:
        assert set(response) - {"model_name", "model_version"} == {"text_output", OPTIONAL_OUTPUTS[flag]}


@interface
@pytest.mark.parametrize("as_text", [False, True], ids=["numbers", "numeric strings"])
def test_request_parameters_do_instead_of_sampling_parameters(
    server: RunningServer, completion: str, interface: str, as_text: bool
) -> None:
    # Triton's parameters over gRPC are strings, whole numbers and booleans.
    given = {"max_tokens": 32, "temperature": 0, "ignore_eos": True, "top_k": 5, "seed": 7}
    parameters = {key: str(value).lower() for key, value in given.items()} if as_text else given
    answer = ASK[interface](server, {"text_input": PROMPT, **WITHOUT_PROMPT}, parameters)
    assert answer.text == completion


@interface
def test_a_prompt_as_token_ids(server: RunningServer, interface: str) -> None:
    text = {"text_input": "Hello", "sampling_parameters": sampling(max_tokens=8)}
    ids = {"input_ids": list(b"Hello"), "sampling_parameters": sampling(max_tokens=8)}
    assert ASK[interface](server, ids).text == ASK[interface](server, text).text


@interface
def test_several_sequences(server: RunningServer, completion: str, interface: str) -> None:
    parameters = sampling(max_tokens=32, n=3)
    answer = ASK[interface](
        server, {"text_input": PROMPT, "sampling_parameters": parameters, **WITHOUT_PROMPT, **ALL_OUTPUTS}
    )
    texts = ["".join(response["text_output"][i] for response in answer.responses) for i in range(3)]
    tokens = [sum(response["num_output_tokens"][i] for response in answer.responses) for i in range(3)]
    assert texts == [completion] * 3
    assert tokens == [32] * 3
    assert answer.last["finish_reason"] == ["length"] * 3
    assert answer.last["num_input_tokens"] == NUM_PROMPT_TOKENS


@interface
def test_sampled_sequences_differ_and_a_seed_repeats_them(server: RunningServer, interface: str) -> None:
    parameters = sampling(max_tokens=12, n=2, temperature=1, seed=3)
    first, second = (ASK[interface](server, {"text_input": "Hi", "sampling_parameters": parameters}) for _ in range(2))
    texts = [["".join(r["text_output"][i] for r in answer.responses) for i in range(2)] for answer in (first, second)]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


@pytest.mark.parametrize("interface", ONE_RESPONSE)
@pytest.mark.parametrize(
    ("inputs", "echoes"), [({}, True), ({"exclude_input_in_output": False}, True), (WITHOUT_PROMPT, False)]
)
def test_one_response_starts_with_the_prompt_unless_told_otherwise(
    server: RunningServer, completion: str, interface: str, inputs: dict, echoes: bool
) -> None:
    answer = ASK[interface](server, {"text_input": PROMPT, "sampling_parameters": sampling(max_tokens=32), **inputs})
    assert answer.text == (PROMPT if echoes else "") + completion


@pytest.mark.parametrize("interface", STREAMING)
def test_streaming_leaves_the_prompt_out_and_cannot_be_told_otherwise(
    server: RunningServer, completion: str, interface: str
) -> None:
    inputs = {"text_input": PROMPT, "sampling_parameters": sampling(max_tokens=32)}
    assert ASK[interface](server, inputs).text == completion
    with pytest.raises(ServerError, match="exclude_input_in_output must be true") as refusal:
        ASK[interface](server, {**inputs, "exclude_input_in_output": False})
    check_code(refusal.value, interface, "INVALID_ARGUMENT")


@pytest.mark.parametrize("interface", STREAMING)
def test_a_stream_may_be_one_response(server: RunningServer, completion: str, interface: str) -> None:
    inputs = {"text_input": PROMPT, "sampling_parameters": sampling(max_tokens=32), "stream": False}
    answer = ASK[interface](server, inputs)
    assert [response["text_output"] for response in answer.responses] == [PROMPT + completion]


@pytest.mark.parametrize("interface", STREAMING)
def test_tokens_come_as_they_are_made(server: RunningServer, interface: str) -> None:
    inputs = {"text_input": PROMPT, "sampling_parameters": sampling(max_tokens=100), "return_num_output_tokens": True}
    answer = ASK[interface](server, inputs)
    assert len(answer.responses) > 5
    assert answer.num_tokens == 100


@pytest.mark.parametrize("interface", ["http_infer", "grpc_infer"])
def test_the_one_response_model_does_not_stream(server: RunningServer, interface: str) -> None:
    with pytest.raises(ServerError, match="stream") as refusal:
        ASK[interface](server, {"text_input": PROMPT, "stream": True})
    check_code(refusal.value, interface, "INVALID_ARGUMENT")


@interface
def test_max_tokens_beyond_the_context_ends_with_length(server: RunningServer, interface: str) -> None:
    prompt = [65] * (TINY_CONTEXT - 20)
    inputs = {"input_ids": prompt, "sampling_parameters": sampling(max_tokens=10**9), **ALL_OUTPUTS}
    answer = ASK[interface](server, inputs)
    assert (answer.last["finish_reason"], answer.num_tokens) == ("length", 20)


@interface
def test_a_prompt_too_long_is_refused_with_both_lengths(server: RunningServer, interface: str) -> None:
    with pytest.raises(ServerError, match=f"{TINY_CONTEXT + 5} tokens.* {TINY_CONTEXT} tokens") as refusal:
        ASK[interface](server, {"text_input": "x" * (TINY_CONTEXT + 5)})
    check_code(refusal.value, interface, "INVALID_ARGUMENT")


@interface
def test_stop_strings_end_the_text_before_them(server: RunningServer, completion: str, interface: str) -> None:
    stop = completion[14:19]  # across token borders
    inputs = {"text_input": PROMPT, "sampling_parameters": sampling(max_tokens=32, stop=["\x00never", stop])}
    answer = ASK[interface](server, {**inputs, **WITHOUT_PROMPT, **ALL_OUTPUTS})
    assert answer.text == completion[: completion.index(stop)]
    assert answer.last["finish_reason"] == "stop"


@interface
def test_stop_tokens_end_the_text(server: RunningServer, interface: str) -> None:
    inputs = {
        "text_input": PROMPT,
        "sampling_parameters": sampling(max_tokens=32, stop_token_ids=list(range(TINY_VOCAB // 2))),
    }
    answer = ASK[interface](server, {**inputs, **WITHOUT_PROMPT, **ALL_OUTPUTS})
    assert answer.last["finish_reason"] == "stop"
    assert answer.num_tokens < 32


@interface
def test_min_tokens_holds_the_end_back(server: RunningServer, interface: str) -> None:
    every_token = {"stop_token_ids": list(range(0, TINY_VOCAB, 2)), "min_tokens": 10, "max_tokens": 40}
    answer = ASK[interface](
        server, {"text_input": PROMPT, "sampling_parameters": sampling(**every_token), **ALL_OUTPUTS}
    )
    assert answer.num_tokens >= 10


@interface
def test_brownout_never_is_accepted_and_the_united_share_is_zero(
    server: RunningServer, completion: str, interface: str
) -> None:
    inputs = {"text_input": PROMPT, "sampling_parameters": sampling(max_tokens=32, brownout="never"), **WITHOUT_PROMPT}
    answer = ASK[interface](server, {**inputs, "return_brownout": True})
    assert answer.text == completion
    brownout = json.loads(answer.last["brownout"])
    assert brownout == {"settings_version": brownout["settings_version"], "united_share": 0}
    assert isinstance(brownout["settings_version"], int)


def test_binary_tensors_over_http(server: RunningServer, completion: str) -> None:
    """The HTTP protocol's binary extension, as NVIDIA's client uses it by default."""
    client = tritonhttp.InferenceServerClient(server.http)
    tensors = []
    for name, value in {"text_input": PROMPT, "sampling_parameters": sampling(max_tokens=32), **WITHOUT_PROMPT}.items():
        array = to_array(value)
        tensor = tritonhttp.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    result = client.infer("moe_llm_infer", tensors)
    client.close()
    assert result.as_numpy("text_output").tolist() == [completion.encode()]


def test_several_requests_in_one_grpc_stream_keep_their_ids(server: RunningServer) -> None:
    """Responses of one stream interleave; the request id tells them apart."""
    prompts = {str(i): f"prompt {i}" for i in range(8)}
    alone = {
        key: generate(
            server, {"text_input": text, "sampling_parameters": sampling(max_tokens=20), **WITHOUT_PROMPT}
        ).text
        for key, text in prompts.items()
    }
    requests = {
        key: {"text_input": text, "sampling_parameters": sampling(max_tokens=20)} for key, text in prompts.items()
    }
    assert ask_in_one_stream(server, requests) == alone


def test_a_decoupled_model_refuses_plain_infer_and_goes_on(server: RunningServer) -> None:
    body = {"inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["Hi"]}]}
    status, answer = post(server.http, "/v2/models/moe_llm/infer", body)
    assert status == 501
    assert "decoupled" in answer["error"]
    assert generate(server, {"text_input": "Hi", "sampling_parameters": sampling(max_tokens=2)}).text


def test_repeated_prompts_are_found_in_the_prefix_cache(server: RunningServer) -> None:
    inputs = {"input_ids": np.arange(100, dtype=np.int64).tolist(), "sampling_parameters": sampling(max_tokens=2)}
    first = generate(server, inputs).text
    before = read_metric(server, "moe_prefix_cache_hits_total")
    assert generate(server, inputs).text == first
    wait_until(
        lambda: read_metric(server, "moe_prefix_cache_hits_total") >= before + 96, 5, "96 tokens found in the cache"
    )
