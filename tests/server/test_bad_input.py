"""Bad input of every kind gets the error that names it, over every interface, while a neighbour's stream runs on unchanged."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from backend.serving.launch_client import RunningServer
from tests.server.conftest import TINY_CONTEXT, TINY_VOCAB
from tests.server.talk import ASK, HttpStream, ServerError, check_code, generate, post, sampling
from tests.waiting import wait_until

pytestmark = pytest.mark.server

NAN, INFINITY = float("nan"), float("inf")


class Neighbour(threading.Thread):
    """Streams the same greedy request again and again, and compares every piece with what it says alone."""

    def __init__(self, server: RunningServer) -> None:
        super().__init__(name="neighbour", daemon=True)
        self._server = server
        self._inputs = {"text_input": "I live next door", "sampling_parameters": sampling(max_tokens=900)}
        self._alone = generate(server, {**self._inputs, "exclude_input_in_output": True}).text
        self._stopping = threading.Event()
        self.num_responses = 0
        self.num_completed = 0
        self.fault = ""

    def run(self) -> None:
        try:
            while not self._stopping.is_set() and not self.fault:
                self._stream_once()
        except Exception as error:
            self.fault = repr(error)

    def stop(self) -> None:
        self._stopping.set()
        self.join()

    def _stream_once(self) -> None:
        stream = HttpStream(self._server, self._inputs)
        text = ""
        for response in stream:
            text += response["text_output"]
            self.num_responses += 1
            if not self._alone.startswith(text):
                self.fault = f"got {text!r}, alone it is {self._alone!r}"
                return
        stream.close()
        if text != self._alone:
            self.fault = f"ended after {len(text)} of {len(self._alone)} characters"
        self.num_completed += 1


@pytest.fixture(scope="module")
def running_neighbour(server: RunningServer) -> Iterator[Neighbour]:
    neighbour = Neighbour(server)
    neighbour.start()
    yield neighbour
    neighbour.stop()
    assert not neighbour.fault
    assert neighbour.num_completed > 0


@pytest.fixture(autouse=True)
def neighbour(running_neighbour: Neighbour) -> Iterator[None]:
    """Checks after each test that the neighbour still gets its text."""
    yield
    seen = running_neighbour.num_responses
    wait_until(lambda: running_neighbour.fault or running_neighbour.num_responses > seen + 1, 10, "more text next door")
    assert not running_neighbour.fault


# Sampling parameters: JSON text or what becomes it, and the error.
BAD_SAMPLING = {
    "not JSON": ("{max_tokens: 5}", "sampling_parameters must be a JSON object"),
    "an empty string": ("", "sampling_parameters must be a JSON object"),
    "half an object": ('{"max_tokens": 5', "sampling_parameters must be a JSON object"),
    "a list": ("[1, 2]", r"sampling_parameters must be a JSON object, got \[1, 2\]"),
    "a number": ("7", "sampling_parameters must be a JSON object, got 7"),
    "null": ("null", "sampling_parameters must be a JSON object, got null"),
    "deeply nested": ("[" * 50_000, "sampling_parameters must be a JSON object"),
    "a key twice": ('{"top_k": 5, "top_k": 6}', 'the key "top_k" appears twice'),
    "an unknown key": ({"max_token": 5}, 'unknown sampling parameter "max_token": did you mean max_tokens'),
    "a key in the wrong case": ({"Temperature": 1}, "did you mean temperature"),
    "NaN": ({"temperature": NAN}, "NaN is not allowed"),
    "infinity": ({"top_p": INFINITY}, "Infinity is not allowed"),
    "NaN as text": ({"temperature": "nan"}, "temperature must be a finite number"),
    "overflowing exponent": ('{"temperature": 1e999}', "temperature must be a finite number"),
    "a huge number": ({"max_tokens": 10**30}, "max_tokens must be a number of at most 64 bits"),
    "a number of thousands of digits": ('{"max_tokens": ' + "9" * 5000 + "}", "max_tokens|sampling_parameters"),
    "zero max_tokens": ({"max_tokens": 0}, "max_tokens must be between 1 and"),
    "negative max_tokens": ({"max_tokens": -3}, "max_tokens must be between 1 and"),
    "fractional max_tokens": ({"max_tokens": 1.5}, "max_tokens must be a whole number"),
    "max_tokens in words": ({"max_tokens": "many"}, 'max_tokens must be a whole number, got "many"'),
    "a boolean for a number": ({"max_tokens": True}, "max_tokens must be a whole number, got true"),
    "a list for a number": ({"max_tokens": [5]}, "max_tokens must be a whole number"),
    "min_tokens above max_tokens": (
        {"min_tokens": 20, "max_tokens": 10},
        "min_tokens must be between 0 and max_tokens",
    ),
    "negative temperature": ({"temperature": -0.1}, "temperature must be between 0 and 100"),
    "top_p above one": ({"top_p": 1.01}, "top_p must be greater than 0 and at most 1"),
    "top_p zero": ({"top_p": 0}, "top_p must be greater than 0"),
    "top_k below minus one": ({"top_k": -2}, "top_k must be"),
    "min_p above one": ({"min_p": 2}, "min_p must be between 0 and 1"),
    "zero repetition_penalty": ({"repetition_penalty": 0}, "repetition_penalty must be greater than 0"),
    "presence_penalty too high": ({"presence_penalty": 2.1}, "presence_penalty must be between -2 and 2"),
    "frequency_penalty too low": ({"frequency_penalty": -2.1}, "frequency_penalty must be between -2 and 2"),
    "negative seed": ({"seed": -1}, "seed must be between 0 and"),
    "a number as stop string": ({"stop": 5}, "stop must be a string or a list of strings"),
    "an empty stop string": ({"stop": ["a", ""]}, "stop must be made of non-empty strings"),
    "too many stop strings": ({"stop": ["a"] * 17}, "stop must be at most 16 strings"),
    "half a character as stop string": ('{"stop": "\\ud800"}', "stop must be made of Unicode text"),
    "a negative stop token": ({"stop_token_ids": [-1]}, "stop_token_ids must be made of ids up to"),
    "a word for a boolean": ({"ignore_eos": "perhaps"}, "ignore_eos must be true or false"),
    "too many logprobs": ({"logprobs": 65}, "logprobs must be between 0 and 64"),
    "n zero": ({"n": 0}, "n must be between 1 and 64"),
    "n too large": ({"n": 10**6}, "n must be between 1 and 64"),
    "priority too large": ({"priority": 2**31}, "priority must be"),
    "an unknown brownout mode": ({"brownout": "always"}, "brownout.*always"),
    "zero timeout": ({"timeout_s": 0}, "timeout_s must be greater than 0"),
}

# Inputs, and the error.
BAD_INPUTS = {
    "no prompt": ({}, "exactly one of text_input and input_ids, got neither|expected .* inputs but got 0"),
    "two prompts": ({"text_input": "a", "input_ids": [1]}, "exactly one of text_input and input_ids, got both"),
    "an empty prompt": ({"text_input": ""}, "text_input must not be empty"),
    "a prompt too long": ({"text_input": "x" * TINY_CONTEXT}, f"{TINY_CONTEXT} tokens"),
    "an enormous prompt": ({"text_input": "x" * 300_000}, f"300000 tokens.*{TINY_CONTEXT} tokens"),
    "a token id beyond the vocabulary": (
        {"input_ids": [5, TINY_VOCAB]},
        f"input_ids must be between 0 and {TINY_VOCAB - 1}",
    ),
    "a huge token id": ({"input_ids": [2**62]}, f"input_ids must be between 0 and {TINY_VOCAB - 1}"),
    "a negative token id": ({"input_ids": [5, -1]}, "input_ids must not be negative, got -1"),
    "no token ids": ({"input_ids": []}, "input_ids must be a list of at least one"),
}

# Tensors of another type or shape than the model's, which only the tensor protocols can carry.
BAD_TENSORS = {
    "token ids of 32 bits": ({"input_ids": np.array([1], np.int32)}, "input_ids.*INT64"),
    "token ids as floats": ({"input_ids": np.array([1], np.float32)}, "input_ids.*INT64"),
    "token ids in a matrix": ({"input_ids": np.array([[1]])}, "shape.*input_ids"),
    "a number as prompt": ({"text_input": np.array([1])}, "text_input.*INT64.*BYTES"),
    "two prompts in one tensor": ({"text_input": np.array([b"a", b"b"], np.object_)}, "shape.*text_input"),
    "a prompt in a matrix": ({"text_input": np.array([[b"a"]], np.object_)}, "shape.*text_input"),
    "a flag as number": ({"text_input": "a", "return_logprobs": np.array([1])}, "return_logprobs.*BOOL"),
    "two flags": ({"text_input": "a", "return_logprobs": np.array([True, True])}, "shape.*return_logprobs"),
    "an unknown input": ({"text_input": "a", "return_logprob": True}, "return_logprob"),
}

interface = pytest.mark.parametrize("interface", ASK)


def check_refused(
    server: RunningServer, interface: str, inputs: dict, message: str, parameters: dict | None = None
) -> None:
    with pytest.raises(ServerError, match=message) as refusal:
        ASK[interface](server, inputs, parameters)
    check_code(refusal.value, interface, "INVALID_ARGUMENT")
    assert len(refusal.value.message) < 500


@interface
@pytest.mark.parametrize("case", BAD_SAMPLING)
def test_bad_sampling_parameters(server: RunningServer, interface: str, case: str) -> None:
    value, message = BAD_SAMPLING[case]
    text = value if isinstance(value, str) else json.dumps(value)
    check_refused(server, interface, {"text_input": "Hi", "sampling_parameters": text}, message)


@interface
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs(server: RunningServer, interface: str, case: str) -> None:
    inputs, message = BAD_INPUTS[case]
    check_refused(server, interface, inputs, message)


@pytest.mark.parametrize("interface", ["grpc_stream", "http_infer", "grpc_infer"])
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(server: RunningServer, interface: str, case: str) -> None:
    inputs, message = BAD_TENSORS[case]
    check_refused(server, interface, inputs, message)


@interface
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_token": 3}, 'unknown sampling parameter "max_token"'),
        ({"max_tokens": -3}, "max_tokens must be between 1 and"),
        ({"temperature": "hot"}, "temperature must be a finite number"),
        ({"n": "2.5"}, "n must be a whole number"),
    ],
)
def test_bad_request_parameters(server: RunningServer, interface: str, parameters: dict, message: str) -> None:
    check_refused(server, interface, {"text_input": "Hi"}, message, parameters)


@pytest.mark.parametrize("interface", ["grpc_stream", "grpc_infer"])
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text_input": b"ab\xff"}, "text_input must be valid UTF-8; byte 2 of 3"),
        ({"text_input": b"\xf0\x9f"}, "text_input must be valid UTF-8"),
        ({"text_input": "a", "sampling_parameters": b"\xff{}"}, "sampling_parameters must be valid UTF-8"),
    ],
)
def test_invalid_utf8_in_tensors(server: RunningServer, interface: str, inputs: dict, message: str) -> None:
    check_refused(server, interface, inputs, message)


# Bodies that HTTP clients get wrong, and the error. Triton itself refuses most of them, with its own words and status.
BAD_BODIES = {
    "nothing": (b"", "document is empty"),
    "no JSON": (b"hello", "parse the request JSON"),
    "half an object": (b'{"text_input": "a"', "parse the request JSON"),
    "a list": (b'["text_input"]', "non-object"),
    "NaN": (b'{"text_input": "a", "temperature": NaN}', "the request's parameters: NaN is not allowed"),
    "invalid UTF-8": (b'{"text_input": "a\xff"}', "text_input must be valid UTF-8; byte 1 of 2"),
    "a number as prompt": (b'{"text_input": 5}', "non-string"),
    "null as prompt": (b'{"text_input": null}', "non-string"),
    "a word as flag": (b'{"text_input": "a", "return_logprobs": "yes"}', "non-boolean"),
    "an object as sampling_parameters": (b'{"text_input": "a", "sampling_parameters": {"n": 1}}', "non-string"),
    "a list as parameter": (b'{"text_input": "a", "stop": ["x"]}', "parameter 'stop' has invalid type"),
    "text as token ids": (b'{"input_ids": "abc"}', "non-signed-integer"),
    "fractions as token ids": (b'{"input_ids": [1.5]}', "non-signed-integer"),
}


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
@pytest.mark.parametrize("case", BAD_BODIES)
def test_bad_http_bodies(server: RunningServer, endpoint: str, case: str) -> None:
    body, message = BAD_BODIES[case]
    status, answer = post(server.http, f"/v2/models/moe_llm/{endpoint}", body)
    assert status in (400, 500)
    assert re.search(message, answer["error"])
