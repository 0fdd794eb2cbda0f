"""Asynchronous clients of the server, one per interface; each sends one request and returns its RequestRecord.

http_stream   POST /v2/models/moe_llm/generate_stream (server-sent events)
grpc_stream   a gRPC stream on moe_llm
http_infer    POST /v2/models/moe_llm_infer/infer
grpc_infer    unary gRPC on moe_llm_infer
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping

import aiohttp
import grpc
import numpy as np
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http.aio as http_aio
from tritonclient.utils import InferenceServerException

from loadtest.record import RequestRecord
from loadtest.wire import (
    INFER_MODEL,
    RETURN,
    STREAM_MODEL,
    OnText,
    ServerError,
    generate_body,
    note_error,
    note_response,
    outputs_of,
)


class Clients:
    """Connections to one server, to be used as an async context manager.

    `on_text`, where given, sees each streamed piece of text as it comes.
    """

    def __init__(self, http: str, grpc: str) -> None:
        self._http_address = http
        self._grpc_address = grpc

    async def __aenter__(self) -> Clients:
        # Streams last as long as they last; the connection pool must not queue them either.
        timeout = aiohttp.ClientTimeout(total=None)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
        self._http = http_aio.InferenceServerClient(self._http_address, conn_limit=10_000, conn_timeout=3600)
        self._grpc = grpc_aio.InferenceServerClient(self._grpc_address)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        await self._http.close()
        await self._grpc.close()

    async def http_stream(
        self,
        number: int,
        prompt: str,
        sampling: Mapping,
        intended_s: float | None = None,
        on_text: OnText | None = None,
    ) -> RequestRecord:
        async def run(record: RequestRecord) -> None:
            url = f"http://{self._http_address}/v2/models/{STREAM_MODEL}/generate_stream"
            async with self._session.post(url, json=generate_body(prompt, sampling)) as response:
                async for line in response.content:
                    if line.startswith(b"data:"):
                        note_response(record, json.loads(line[5:]), on_text)
                    elif line.strip() and response.status != 200:
                        note_response(record, json.loads(line), on_text)

        return await _recorded("http_stream", number, intended_s, run)

    async def grpc_stream(
        self,
        number: int,
        prompt: str,
        sampling: Mapping,
        intended_s: float | None = None,
        on_text: OnText | None = None,
    ) -> RequestRecord:
        async def run(record: RequestRecord) -> None:
            inputs = _inputs(grpc_aio.InferInput, prompt, sampling)
            stream = grpc_aio.InferInput("stream", [1], "BOOL")
            stream.set_data_from_numpy(np.array([True]))

            async def requests():
                yield {
                    "model_name": STREAM_MODEL,
                    "inputs": [*inputs, stream],
                    "enable_empty_final_response": True,
                }

            async for result, error in self._grpc.stream_infer(requests()):
                if error is not None:
                    raise error
                response = result.get_response()
                if len(response.outputs):
                    note_response(record, outputs_of(result), on_text)
                if response.parameters["triton_final_response"].bool_param:
                    return

        return await _recorded("grpc_stream", number, intended_s, run)

    async def http_infer(
        self, number: int, prompt: str, sampling: Mapping, intended_s: float | None = None
    ) -> RequestRecord:
        async def run(record: RequestRecord) -> None:
            result = await self._http.infer(INFER_MODEL, _inputs(http_aio.InferInput, prompt, sampling))
            note_response(record, outputs_of(result))

        return await _recorded("http_infer", number, intended_s, run)

    async def grpc_infer(
        self, number: int, prompt: str, sampling: Mapping, intended_s: float | None = None
    ) -> RequestRecord:
        async def run(record: RequestRecord) -> None:
            result = await self._grpc.infer(INFER_MODEL, _inputs(grpc_aio.InferInput, prompt, sampling))
            note_response(record, outputs_of(result))

        return await _recorded("grpc_infer", number, intended_s, run)


async def _recorded(
    protocol: str, number: int, intended_s: float | None, run: Callable[[RequestRecord], Awaitable[None]]
) -> RequestRecord:
    """Run a request and file its outcome; an error of any transport ends up in the record."""
    now = time.monotonic()
    record = RequestRecord(
        id=number, protocol=protocol, intended_start_s=now if intended_s is None else intended_s, start_s=now
    )
    try:
        await run(record)
        if not record.responses:
            raise ServerError("the stream ended without a response")
        record.end_s = time.monotonic()
    except (InferenceServerException, grpc.RpcError, aiohttp.ClientError, OSError, ServerError) as error:
        note_error(record, error)
    return record


def _inputs(kind: type, prompt: str, sampling: Mapping) -> list:
    """Input tensors of one request; `kind` is the protocol's InferInput."""
    values = [("text_input", prompt), ("sampling_parameters", json.dumps(dict(sampling)))]
    inputs = []
    for name, value in values:
        tensor = kind(name, [1], "BYTES")
        tensor.set_data_from_numpy(np.array([value.encode("utf-8")], dtype=np.object_))
        inputs.append(tensor)
    for name in (*RETURN, "exclude_input_in_output"):
        tensor = kind(name, [1], "BOOL")
        tensor.set_data_from_numpy(np.array([True]))
        inputs.append(tensor)
    return inputs
