"""What every client of the server sends and reads, whatever its transport: inputs, outputs, and how outcomes are told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping

from loadtest.record import RequestRecord
from loadtest.schedule import Arrival

STREAM_MODEL = "moe_llm"
INFER_MODEL = "moe_llm_infer"
#: Path of a request whose responses come as server-sent events.
STREAM_PATH = f"/v2/models/{STREAM_MODEL}/generate_stream"

#: Asked for with every request: what the record needs.
RETURN = ("return_num_input_tokens", "return_num_output_tokens", "return_brownout")

OnText = Callable[[str], None]


class ServerError(Exception):
    """An error inside a response's body."""


#: Parts of the messages with which the server refuses for lack of room. On streams only the message tells, and the code
#: UNAVAILABLE also stands for timeouts and for a server that is not there.
_REFUSALS = ("queue is full", "retry in", "shutting down")


def is_rejection(message: str) -> bool:
    """Whether the server declined a request that it could have served with more room."""
    return any(part in message for part in _REFUSALS)


def note_error(record: RequestRecord, error: Exception) -> None:
    """File an outcome: rejected when the server declined, failed for every other error."""
    record.error_s = time.monotonic()
    record.error = str(error) or type(error).__name__
    record.outcome = "rejected" if is_rejection(record.error) else "failed"


def note_response(record: RequestRecord, outputs: Mapping, on_text: OnText | None = None) -> None:
    """Enter one response into the record. Raises ServerError if it is an error."""
    if "error" in outputs:
        raise ServerError(outputs["error"])
    tokens = int(outputs["num_output_tokens"])
    record.responses.append((time.monotonic(), tokens))
    record.output_tokens += tokens
    record.input_tokens = int(outputs["num_input_tokens"])
    record.united_share = json.loads(outputs["brownout"])["united_share"]
    record.text += outputs["text_output"]
    if on_text is not None:
        on_text(outputs["text_output"])


def note_end(record: RequestRecord) -> None:
    """No further response comes. Raises ServerError if there was none."""
    if not record.responses:
        raise ServerError("the stream ended without a response")
    record.end_s = time.monotonic()


def inputs_of(prompt: str, sampling: Mapping) -> list[tuple[str, str, str | bool]]:
    """(name, datatype, value) of the input tensors that every model takes."""
    texts = [("text_input", "BYTES", prompt), ("sampling_parameters", "BYTES", json.dumps(dict(sampling)))]
    return [*texts, *((name, "BOOL", True) for name in (*RETURN, "exclude_input_in_output"))]


def generate_body(prompt: str, sampling: Mapping) -> dict[str, object]:
    """JSON body of a request to STREAM_PATH."""
    body = {"text_input": prompt, "stream": True, "sampling_parameters": json.dumps(dict(sampling))}
    return body | dict.fromkeys(RETURN, True)


def event_of(line: bytes) -> dict[str, object] | None:
    """The response in a line of a STREAM_PATH body, None if it has none. An error may come without being an event."""
    return json.loads(line.removeprefix(b"data:")) if line.startswith((b"data:", b"{")) else None


def sampling_of(number: int, arrival: Arrival, seed: int) -> dict[str, object]:
    """Sampling parameters of a request: exactly the scheduled number of tokens, seeded."""
    return {
        "max_tokens": arrival.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "seed": seed * 1_000_003 + number,
        "brownout": arrival.brownout,
    }


def outputs_of(result) -> dict[str, object]:
    """The first entry of each output of a tritonclient InferResult (HTTP or gRPC)."""
    names = ("num_output_tokens", "num_input_tokens", "brownout", "text_output")
    outputs = {name: result.as_numpy(name)[0] for name in names}
    for name in ("brownout", "text_output"):
        outputs[name] = outputs[name].decode("utf-8")
    return outputs
