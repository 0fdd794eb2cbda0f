"""Plain clients of the running server for tests: one request over any of the five interfaces, and what came back.

generate          POST /v2/models/moe_llm/generate
generate_stream   POST /v2/models/moe_llm/generate_stream (server-sent events)
grpc_stream       a gRPC stream on moe_llm
http_infer        POST /v2/models/moe_llm_infer/infer
grpc_infer        unary gRPC on moe_llm_infer
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from backend.serving.launch_client import RunningServer

STREAM_MODEL = "moe_llm"
INFER_MODEL = "moe_llm_infer"
#: Longer than any request of the tests takes: one that hangs fails by itself.
WAIT_S = 60.0

_HTTP_CODES = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 499: "CANCELLED", 500: "INTERNAL", 503: "UNAVAILABLE"}
_DATATYPES = {np.bool_: "BOOL", np.int32: "INT32", np.int64: "INT64", np.float32: "FP32", np.object_: "BYTES"}

Inputs = Mapping[str, object]


class ServerError(Exception):
    """The server's refusal. `code` is gRPC's name of the status, or None where the interface carries none."""

    def __init__(self, code: str | None, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


def check_code(error: ServerError, interface: str, code: str) -> None:
    """The status of an error, where Triton lets it through: streams have messages only, and every
    refusal of generate and generate_stream is a 400.
    """
    if interface in ("http_infer", "grpc_infer"):
        assert error.code == code, error
    else:
        assert error.code in (None, "INVALID_ARGUMENT"), error


@dataclass
class Answer:
    """All responses to a request, each a dict from output name to its value or, with n > 1, list of values."""

    responses: list[dict] = field(default_factory=list)

    @property
    def last(self) -> dict:
        return self.responses[-1]

    @property
    def text(self) -> str:
        """The text of a request with one sequence."""
        return "".join(response["text_output"] for response in self.responses)

    @property
    def num_tokens(self) -> int:
        return sum(response["num_output_tokens"] for response in self.responses)


def sampling(**parameters: object) -> str:
    """sampling_parameters: greedy and without an end-of-text token unless told otherwise."""
    return json.dumps({"temperature": 0, "ignore_eos": True} | parameters)


# --- HTTP ---------------------------------------------------------------------------------------------------------------


def post(address: str, path: str, body: bytes | object) -> tuple[int, dict]:
    """POST JSON (or bytes as they are); the status and the decoded answer (a stream's, if it has only one)."""
    connection = http.client.HTTPConnection(address, timeout=WAIT_S)
    try:
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode())
        response = connection.getresponse()
        return response.status, json.loads(response.read().removeprefix(b"data: "))
    finally:
        connection.close()


def get(address: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(address, timeout=WAIT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def http_error(status: int, answer: Mapping) -> ServerError:
    return ServerError(_HTTP_CODES.get(status, str(status)), answer.get("error", str(answer)))


def generate(server: RunningServer, inputs: Inputs, parameters: Mapping | None = None) -> Answer:
    body = {**inputs, **(parameters or {})}
    status, answer = post(server.http, f"/v2/models/{STREAM_MODEL}/generate", body)
    if status != 200 or "error" in answer:
        raise http_error(status, answer)
    return Answer([answer])


def http_infer(server: RunningServer, inputs: Inputs, parameters: Mapping | None = None) -> Answer:
    body = {
        "inputs": [_json_tensor(name, value) for name, value in inputs.items()],
        "parameters": dict(parameters or {}),
    }
    status, answer = post(server.http, f"/v2/models/{INFER_MODEL}/infer", body)
    if status != 200:
        raise http_error(status, answer)
    outputs = answer["outputs"]
    return Answer([{output["name"]: _only(output["data"]) for output in outputs}])


def _json_tensor(name: str, value: object) -> dict:
    array = to_array(value)
    data = [v.decode() if isinstance(v, bytes) else v for v in array.ravel().tolist()]
    return {"name": name, "shape": list(array.shape), "datatype": _datatype(array), "data": data}


# --- gRPC ---------------------------------------------------------------------------------------------------------------


def to_array(value: object) -> np.ndarray:
    """The tensor of an input given as a str, bytes, bool, list of token ids, or as an array already."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, bool):
        return np.array([value])
    if isinstance(value, str | bytes):
        return np.array([value.encode() if isinstance(value, str) else value], dtype=np.object_)
    return np.array(value, dtype=np.int64)


def _datatype(array: np.ndarray) -> str:
    return _DATATYPES[array.dtype.type]


def _grpc_inputs(inputs: Inputs) -> list[grpc.InferInput]:
    tensors = []
    for name, value in inputs.items():
        array = to_array(value)
        tensor = grpc.InferInput(name, list(array.shape), _datatype(array))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return tensors


def _grpc_outputs(result: grpc.InferResult) -> dict:
    outputs = {}
    for output in result.get_response().outputs:
        values = result.as_numpy(output.name).tolist()
        outputs[output.name] = _only([v.decode() if isinstance(v, bytes) else v for v in values])
    return outputs


def _only(values: list) -> object:
    return values[0] if len(values) == 1 else values


def _grpc_error(error: InferenceServerException) -> ServerError:
    status = error.status()
    return ServerError(None if status is None else status.removeprefix("StatusCode."), error.message())


def grpc_infer(server: RunningServer, inputs: Inputs, parameters: Mapping | None = None, **options: object) -> Answer:
    with grpc.InferenceServerClient(server.grpc) as client:
        try:
            result = client.infer(
                INFER_MODEL, _grpc_inputs(inputs), parameters=dict(parameters or {}), client_timeout=WAIT_S, **options
            )
        except InferenceServerException as error:
            raise _grpc_error(error) from None
        return Answer([_grpc_outputs(result)])


# --- streams ------------------------------------------------------------------------------------------------------------


class HttpStream:
    """A generate_stream request, sent when made. Iterating gives its responses; `vanish` is a client that dies."""

    def __init__(self, server: RunningServer, inputs: Inputs, parameters: Mapping | None = None) -> None:
        body = json.dumps({"stream": True, **inputs, **(parameters or {})}).encode()
        self._connection = http.client.HTTPConnection(server.http, timeout=WAIT_S)
        self._connection.request("POST", f"/v2/models/{STREAM_MODEL}/generate_stream", body)
        # Kept here: http.client lets go of it when the server says that it will close the connection.
        self._socket = self._connection.sock
        self._response: http.client.HTTPResponse | None = None

    def __iter__(self) -> Iterator[dict]:
        try:
            if self._response is None:
                self._response = self._connection.getresponse()
            status = self._response.status
            while line := self._response.readline():
                if line.startswith(b"data:"):
                    line = line[5:]
                elif status == 200 or not line.strip():
                    continue
                answer = json.loads(line)
                if "error" in answer:
                    raise http_error(status, answer) if status != 200 else ServerError(None, answer["error"])
                yield answer
        except (http.client.HTTPException, ConnectionError) as error:
            raise ServerError("UNAVAILABLE", f"the connection broke: {error!r}") from None

    def vanish(self) -> None:
        """Close the socket in mid-stream, as the kernel does for a client that died."""
        with contextlib.suppress(OSError):  # it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)
        self.close()

    cancel = vanish

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
        self._connection.close()


class GrpcStream:
    """A request on a gRPC stream of its own, sent when made. Iterating gives its responses."""

    def __init__(self, server: RunningServer, inputs: Inputs, parameters: Mapping | None = None) -> None:
        self._arrived: queue.Queue = queue.Queue()
        self._client = grpc.InferenceServerClient(server.grpc)
        # Errors come as messages without a status. With the header triton_grpc_error they would have one, but this release
        # of Triton (24.10) then crashes now and then.
        self._client.start_stream(lambda result, error: self._arrived.put((result, error)))
        self._client.async_stream_infer(
            STREAM_MODEL,
            _grpc_inputs({"stream": True, **inputs}),
            parameters=dict(parameters or {}),
            enable_empty_final_response=True,
        )

    def __iter__(self) -> Iterator[dict]:
        while True:
            result, error = self._arrived.get(timeout=WAIT_S)
            if error is not None:
                raise _grpc_error(error)
            if result.get_response().outputs:
                yield _grpc_outputs(result)
            if result.get_response().parameters["triton_final_response"].bool_param:
                return

    def cancel(self) -> None:
        self._client.stop_stream(cancel_requests=True)

    def close(self) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()


STREAMS: dict[str, type[HttpStream] | type[GrpcStream]] = {"generate_stream": HttpStream, "grpc_stream": GrpcStream}


def _streamed(kind: type[HttpStream] | type[GrpcStream]) -> Callable[..., Answer]:
    def ask(server: RunningServer, inputs: Inputs, parameters: Mapping | None = None) -> Answer:
        stream = kind(server, inputs, parameters)
        try:
            return Answer(list(stream))
        finally:
            stream.close()

    return ask


ASK: dict[str, Callable[..., Answer]] = {
    "generate": generate,
    "generate_stream": _streamed(HttpStream),
    "grpc_stream": _streamed(GrpcStream),
    "http_infer": http_infer,
    "grpc_infer": grpc_infer,
}
STREAMING = tuple(STREAMS)
ONE_RESPONSE = ("generate", "http_infer", "grpc_infer")


def ask_in_one_stream(server: RunningServer, requests: Mapping[str, Inputs]) -> dict[str, str]:
    """Send several requests through one gRPC stream; the texts by request id."""
    arrived: queue.Queue = queue.Queue()
    texts = dict.fromkeys(requests, "")
    with grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: arrived.put((result, error)))
        for request_id, inputs in requests.items():
            tensors = _grpc_inputs({"stream": True, **inputs})
            client.async_stream_infer(STREAM_MODEL, tensors, request_id=request_id, enable_empty_final_response=True)
        num_final = 0
        while num_final < len(requests):
            result, error = arrived.get(timeout=WAIT_S)
            if error is not None:
                raise _grpc_error(error)
            response = result.get_response()
            if response.outputs:
                texts[response.id] += _grpc_outputs(result)["text_output"]
            num_final += response.parameters["triton_final_response"].bool_param
    return texts
