"""From a Triton request to a ParsedRequest. Pure: every refusal names the input or parameter and says what is allowed.

pb_utils is not needed: a request is anything with `inputs()`, `parameters()` and `timeout()`, so tests use a fake.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from typing import NoReturn, Protocol

import msgspec
import numpy as np

from backend.engine.sampling_params import SamplingParams
from backend.errors import InvalidRequestError, nearest_known
from backend.serving.triton_parameters import client_parameters

RETURN_FLAGS = (
    "return_finish_reason",
    "return_cumulative_logprob",
    "return_logprobs",
    "return_num_input_tokens",
    "return_num_output_tokens",
    "return_brownout",
)
INPUTS = ("text_input", "input_ids", "sampling_parameters", "stream", "exclude_input_in_output", *RETURN_FLAGS)

_INTEGER = re.compile(r"[+-]?[0-9]{1,40}")
_NUMBER = re.compile(r"[+-]?([0-9]{1,40}\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}
_SHOWN_CHARACTERS = 60


class InputTensor(Protocol):
    """The part of pb_utils.Tensor that is read."""

    def name(self) -> str: ...
    def as_numpy(self) -> np.ndarray: ...


class InferenceRequest(Protocol):
    """The part of pb_utils.InferenceRequest that is read; `parameters` is JSON, `timeout` in microseconds (0: none)."""

    def inputs(self) -> Iterable[InputTensor]: ...
    def parameters(self) -> str: ...
    def timeout(self) -> int: ...


class ParsedRequest(msgspec.Struct, frozen=True):
    """A checked request: exactly one of `text` and `input_ids` is set. Whether it fits the context is checked later."""

    text: str | None
    input_ids: list[int] | None
    params: SamplingParams
    stream: bool = False
    #: Put the prompt before the text; never when streaming.
    echo_prompt: bool = False
    return_finish_reason: bool = False
    return_cumulative_logprob: bool = False
    return_logprobs: bool = False
    return_num_input_tokens: bool = False
    return_num_output_tokens: bool = False
    return_brownout: bool = False

    @property
    def engine_params(self) -> SamplingParams:
        """`params`, asking for the tokens' own log-probabilities if an output needs them."""
        if self.params.logprobs is None and (self.return_cumulative_logprob or self.return_logprobs):
            return msgspec.structs.replace(self.params, logprobs=0)
        return self.params


def parse_request(request: InferenceRequest, decoupled: bool) -> ParsedRequest:
    """Check a request and take it apart; `decoupled` says whether the model can stream.

    Raises:
        InvalidRequestError: naming the input or parameter, and what is allowed.
    """
    tensors: dict[str, np.ndarray] = {}
    for tensor in request.inputs():
        name = tensor.name()
        if name not in INPUTS:
            raise InvalidRequestError(_unknown("input", name, INPUTS))
        tensors[name] = tensor.as_numpy()
    if ("text_input" in tensors) == ("input_ids" in tensors):
        given = "both" if "text_input" in tensors else "neither"
        raise InvalidRequestError(f"give exactly one of text_input and input_ids, got {given}")
    flags = {name: _bool_input(name, tensors[name]) for name in ("stream", *RETURN_FLAGS) if name in tensors}
    stream = flags.get("stream", False)
    if stream and not decoupled:
        raise InvalidRequestError(
            "stream must be false on this model, which sends one response; use the streaming model's generate_stream "
            "or a gRPC stream"
        )
    exclude = tensors.get("exclude_input_in_output")
    excludes = stream if exclude is None else _bool_input("exclude_input_in_output", exclude)
    if stream and not excludes:
        raise InvalidRequestError("exclude_input_in_output must be true (or absent) when stream is true")
    if "sampling_parameters" in tensors:
        source = "sampling_parameters"
        params = parse_sampling(_object(source, _text_input(source, tensors[source])))
    else:
        given = _object("the request's parameters", request.parameters() or "{}")
        params = parse_sampling(client_parameters(given, _CONVERTERS))
    if params.timeout_s is None and request.timeout() > 0:
        params = msgspec.structs.replace(params, timeout_s=request.timeout() / 1e6)
    return ParsedRequest(
        text=_prompt(tensors["text_input"]) if "text_input" in tensors else None,
        input_ids=_token_ids(tensors["input_ids"]) if "input_ids" in tensors else None,
        params=params,
        echo_prompt=not excludes,
        **flags,
    )


def parse_sampling(values: dict[str, object]) -> SamplingParams:
    """SamplingParams from JSON values; numbers may be numeric strings.

    Raises:
        InvalidRequestError: naming the key, and what is allowed.
    """
    known = {}
    for key, value in values.items():
        if key not in _CONVERTERS:
            raise InvalidRequestError(_unknown("sampling parameter", key, _CONVERTERS))
        if value is None and key in _NULLABLE:
            continue
        known[key] = _CONVERTERS[key](key, value)
    params = SamplingParams(**known)
    params.check_ranges()
    return params


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    return f"unknown {what} {_show(name)}: {nearest_known(name, known)}"


def _show(value: object) -> str:
    """A value in an error message, of bounded length."""
    try:
        text = json.dumps(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a very long number"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}… ({len(text)} characters)"


# --- input tensors --------------------------------------------------------------------------------------------------


def _one(name: str, tensor: np.ndarray, kind: str) -> object:
    """The value of a tensor of shape [1]."""
    if tensor.shape != (1,):
        raise InvalidRequestError(f"{name} must be one {kind} (shape [1]), got shape {list(tensor.shape)}")
    return tensor[0]


def _bool_input(name: str, tensor: np.ndarray) -> bool:
    if tensor.dtype.kind != "b":  # many times as fast as a comparison with np.bool_
        raise InvalidRequestError(f"{name} must be of type BOOL, got {tensor.dtype}")
    return bool(_one(name, tensor, "BOOL"))


def _text_input(name: str, tensor: np.ndarray) -> str:
    value = _one(name, tensor, "STRING")
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")
    if not isinstance(value, bytes):
        raise InvalidRequestError(f"{name} must be of type STRING, got {tensor.dtype}")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{name} must be valid UTF-8; byte {error.start} of {len(value)} is not ({error.reason})"
        ) from None


def _prompt(tensor: np.ndarray) -> str:
    text = _text_input("text_input", tensor)
    if not text:
        raise InvalidRequestError("text_input must not be empty")
    return text


def _token_ids(tensor: np.ndarray) -> list[int]:
    if tensor.dtype != np.int64:
        raise InvalidRequestError(f"input_ids must be of type INT64, got {tensor.dtype}")
    if tensor.ndim != 1 or tensor.size == 0:
        raise InvalidRequestError(f"input_ids must be a list of at least one token id, got shape {list(tensor.shape)}")
    if tensor.min() < 0:
        raise InvalidRequestError(f"input_ids must not be negative, got {tensor.min()}")
    return tensor.tolist()


# --- sampling parameters --------------------------------------------------------------------------------------------


def _object(source: str, text: str) -> dict[str, object]:
    """A JSON object; duplicate keys, NaN and infinities are refused, which Python's parser would let pass."""
    try:
        value = _DECODER.decode(text)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{source}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{source} must be a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{source} must be a JSON object, got {_show(value)}")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InvalidRequestError(f"the key {_show(twice)} appears twice")
    return result


def _constant(name: str) -> NoReturn:
    raise InvalidRequestError(f"{name} is not allowed, numbers must be finite")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)


def _refuse(key: str, allowed: str, value: object) -> NoReturn:
    raise InvalidRequestError(f"{key} must be {allowed}, got {_show(value)}")


def _integer(key: str, value: object) -> int:
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        number = int(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    else:
        real = _finite(value)
        if real is None or not real.is_integer():
            _refuse(key, "a whole number", value)
        number = int(real)
    if not -(2**63) <= number < 2**63:
        _refuse(key, "a number of at most 64 bits", value)
    return number


def _number(key: str, value: object) -> float:
    number = _finite(value)
    if number is None:
        _refuse(key, "a finite number", value)
    return number


def _finite(value: object) -> float | None:
    """A number or numeric string as a float, or None if it is none or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _boolean(key: str, value: object) -> bool:
    result = value if isinstance(value, bool) else _BOOLEANS.get(str(value).lower())
    if result is None or not isinstance(value, bool | int | str):
        _refuse(key, "true or false", value)
    return result


def _string(key: str, value: object) -> str:
    if not isinstance(value, str):
        _refuse(key, "a string", value)
    return value


def _strings(key: str, value: object) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(entry, str) for entry in values):
        _refuse(key, "a string or a list of strings", value)
    if any("\ud800" <= char <= "\udfff" for entry in values for char in entry):
        _refuse(key, "made of Unicode text without lone surrogates", value)
    return tuple(values)


def _integers(key: str, value: object) -> tuple[int, ...]:
    """A list of ids, or such a list as a string: Triton's own request parameters cannot be lists."""
    values = value
    if isinstance(value, str):
        try:
            values = json.loads(value)
        except (ValueError, RecursionError):
            values = None
    if not isinstance(values, list):
        _refuse(key, "a list of token ids", value)
    return tuple(_integer(key, entry) for entry in values)


_CONVERTERS: dict[str, Callable[[str, object], object]] = {
    "max_tokens": _integer,
    "min_tokens": _integer,
    "temperature": _number,
    "top_p": _number,
    "top_k": _integer,
    "min_p": _number,
    "repetition_penalty": _number,
    "presence_penalty": _number,
    "frequency_penalty": _number,
    "seed": _integer,
    "stop": _strings,
    "stop_token_ids": _integers,
    "ignore_eos": _boolean,
    "logprobs": _integer,
    "n": _integer,
    "priority": _integer,
    "brownout": _string,
    "timeout_s": _number,
}
#: Parameters for which null is the default.
_NULLABLE = ("seed", "logprobs", "timeout_s")
