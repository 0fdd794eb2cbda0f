"""Asynchronous clients of the server, one per interface; each sends one request and returns its RequestRecord.

http_stream   POST /v2/models/moe_llm/generate_stream (server-sent events)
grpc_stream   a gRPC stream on moe_llm
http_infer    POST /v2/models/moe_llm_infer/infer
grpc_infer    unary gRPC on moe_llm_infer
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import aiohttp
import grpc
import numpy as np
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http.aio as http_aio
from tritonclient.utils import InferenceServerException

from loadtest.record import RequestRecord
from loadtest.wire import (
    INFER_MODEL,
    STREAM_MODEL,
    STREAM_PATH,
    OnText,
    ServerError,
    event_of,
    generate_body,
    inputs_of,
    note_end,
    note_error,
    note_response,
    outputs_of,
)

INTERFACES = ("http_stream", "grpc_stream", "http_infer", "grpc_infer")


class Clients:
    """Connections to one server, to be used as an async context manager.

    `on_text`, where given, sees each streamed piece of text as it comes.
    """

    def __init__(self, http: str, grpc: str) -> None:
        """HOST:PORT of both services; nothing is connected before the first request of a kind, so one that is not used may
        be any."""
        self._http_address = http
        self._grpc_address = grpc

    async def __aenter__(self) -> Clients:
        self._session = open_session()
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
            url = f"http://{self._http_address}{STREAM_PATH}"
            async with self._session.post(url, json=generate_body(prompt, sampling)) as response:
                async for line in response.content:
                    if (outputs := event_of(line)) is not None:
                        note_response(record, outputs, on_text)

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
            inputs = [*inputs_of(prompt, sampling), ("stream", "BOOL", True)]
            tensors = [tensor(grpc_aio.InferInput, *given) for given in inputs]
            async for result in grpc_responses(self._grpc, tensors):
                note_response(record, outputs_of(result), on_text)

        return await _recorded("grpc_stream", number, intended_s, run)

    async def http_infer(
        self, number: int, prompt: str, sampling: Mapping, intended_s: float | None = None
    ) -> RequestRecord:
        return await _infer("http_infer", self._http, http_aio.InferInput, number, prompt, sampling, intended_s)

    async def grpc_infer(
        self, number: int, prompt: str, sampling: Mapping, intended_s: float | None = None
    ) -> RequestRecord:
        return await _infer("grpc_infer", self._grpc, grpc_aio.InferInput, number, prompt, sampling, intended_s)


def open_session() -> aiohttp.ClientSession:
    """A session without limits: streams last as long as they last, and the connection pool must not queue them either."""
    timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(timeout=timeout, connector=connector)


async def grpc_responses(
    client: grpc_aio.InferenceServerClient, inputs: list[grpc_aio.InferInput]
) -> AsyncIterator[grpc_aio.InferResult]:
    """The responses to one request on a gRPC stream of its own, but for the empty one that may come last."""

    async def requests() -> AsyncIterator[dict]:
        yield {"model_name": STREAM_MODEL, "inputs": inputs, "enable_empty_final_response": True}

    async for result, error in client.stream_infer(requests()):
        if error is not None:
            raise error
        response = result.get_response()
        if len(response.outputs):
            yield result
        if response.parameters["triton_final_response"].bool_param:
            return


def tensor(kind: type, name: str, datatype: str, value: str | bool):
    """An input of one value; `kind` is the protocol's InferInput."""
    made = kind(name, [1], datatype)
    made.set_data_from_numpy(np.array([value.encode()], np.object_) if isinstance(value, str) else np.array([value]))
    return made


async def _infer(
    protocol: str,
    client: http_aio.InferenceServerClient | grpc_aio.InferenceServerClient,
    kind: type,
    number: int,
    prompt: str,
    sampling: Mapping,
    intended_s: float | None,
) -> RequestRecord:
    """A request with one response; `kind` is the protocol's InferInput."""

    async def run(record: RequestRecord) -> None:
        tensors = [tensor(kind, *given) for given in inputs_of(prompt, sampling)]
        note_response(record, outputs_of(await client.infer(INFER_MODEL, tensors)))

    return await _recorded(protocol, number, intended_s, run)


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
        note_end(record)
    except (InferenceServerException, grpc.RpcError, aiohttp.ClientError, OSError, ServerError) as error:
        note_error(record, error)
    return record
