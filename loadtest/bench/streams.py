"""All streams of a workload at once through a server, over HTTP or gRPC, with as little work in the client as each allows."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable

import numpy as np

from backend.serving.launch_client import RunningServer
from loadtest.wire import STREAM_PATH, event_of


def _sampling(new_tokens: int) -> str:
    return json.dumps({"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True})


async def http_streams(server: RunningServer, prompts: list[list[int]], new_tokens: int) -> float:
    """Seconds from the first request to the last of all server-sent events."""
    # Not at the top, here and below: the other benchmarks run where no client is installed.
    from loadtest.clients import open_session

    body = {"sampling_parameters": _sampling(new_tokens), "stream": True, "return_num_output_tokens": True}

    async def tokens(prompt: list[int]) -> AsyncIterator[int]:
        async with session.post(f"http://{server.http}{STREAM_PATH}", json=body | {"input_ids": prompt}) as response:
            async for line in response.content:
                if (answer := event_of(line)) is not None:
                    if "error" in answer:
                        raise RuntimeError(f"a stream ended with: {answer['error']}")
                    yield answer["num_output_tokens"]

    async with open_session() as session:
        return await _all_at_once(tokens, prompts, new_tokens)


async def grpc_streams(server: RunningServer, prompts: list[list[int]], new_tokens: int) -> float:
    """Seconds from the first request to the last response of all gRPC streams."""
    import tritonclient.grpc.aio as grpc_aio

    from loadtest.clients import grpc_responses, tensor

    async def tokens(prompt: list[int]) -> AsyncIterator[int]:
        ids = grpc_aio.InferInput("input_ids", [len(prompt)], "INT64")
        ids.set_data_from_numpy(np.array(prompt, np.int64))
        parameters = tensor(grpc_aio.InferInput, "sampling_parameters", "BYTES", _sampling(new_tokens))
        flags = [tensor(grpc_aio.InferInput, name, "BOOL", True) for name in ("stream", "return_num_output_tokens")]
        async for result in grpc_responses(client, [ids, parameters, *flags]):
            yield int(result.as_numpy("num_output_tokens")[0])

    async with grpc_aio.InferenceServerClient(server.grpc) as client:
        return await _all_at_once(tokens, prompts, new_tokens)


#: By protocol.
STREAMS = {"http": http_streams, "grpc": grpc_streams}


async def _all_at_once(
    tokens: Callable[[list[int]], AsyncIterator[int]], prompts: list[list[int]], new_tokens: int
) -> float:
    """`tokens(prompt)` yields how many tokens each response brings."""

    async def count(prompt: list[int]) -> int:
        return sum([number async for number in tokens(prompt)])

    started = time.perf_counter()
    counts = await asyncio.gather(*map(count, prompts))
    elapsed = time.perf_counter() - started
    if counts != [new_tokens] * len(prompts):
        raise RuntimeError(f"streams brought {counts} tokens instead of {new_tokens} each")
    return elapsed
