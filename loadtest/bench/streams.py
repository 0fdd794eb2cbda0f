"""All streams of a workload at once through a server, over HTTP or gRPC, with as little work in the client as each allows."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable

import numpy as np

from backend.serving.launch_client import RunningServer


def _sampling(new_tokens: int) -> str:
    return json.dumps({"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True})


async def http_streams(server: RunningServer, prompts: list[list[int]], new_tokens: int) -> float:
    """Seconds from the first request to the last of all server-sent events."""
    # Not at the top, here and below: the other benchmarks run where no client is installed.
    import aiohttp

    from loadtest.clients import STREAM_MODEL

    body = {"sampling_parameters": _sampling(new_tokens), "stream": True, "return_num_output_tokens": True}
    url = f"http://{server.http}/v2/models/{STREAM_MODEL}/generate_stream"

    async def tokens(prompt: list[int]) -> AsyncIterator[int]:
        async with session.post(url, json=body | {"input_ids": prompt}) as response:
            async for line in response.content:
                if line.startswith((b"data:", b"{")):  # an error may come without being an event
                    answer = json.loads(line.removeprefix(b"data:"))
                    if "error" in answer:
                        raise RuntimeError(f"a stream ended with: {answer['error']}")
                    yield answer["num_output_tokens"]

    # No limits: streams last as long as they last, all at once.
    timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        return await _all_at_once(tokens, prompts, new_tokens)


async def grpc_streams(server: RunningServer, prompts: list[list[int]], new_tokens: int) -> float:
    """Seconds from the first request to the last response of all gRPC streams."""
    import tritonclient.grpc.aio as grpc_aio

    from loadtest.clients import STREAM_MODEL

    async def tokens(prompt: list[int]) -> AsyncIterator[int]:
        ids = grpc_aio.InferInput("input_ids", [len(prompt)], "INT64")
        ids.set_data_from_numpy(np.array(prompt, np.int64))
        parameters = grpc_aio.InferInput("sampling_parameters", [1], "BYTES")
        parameters.set_data_from_numpy(np.array([_sampling(new_tokens).encode()], np.object_))
        flags = []
        for name in ("stream", "return_num_output_tokens"):
            flags.append(grpc_aio.InferInput(name, [1], "BOOL"))
            flags[-1].set_data_from_numpy(np.array([True]))

        async def requests() -> AsyncIterator[dict]:
            yield {
                "model_name": STREAM_MODEL,
                "inputs": [ids, parameters, *flags],
                "enable_empty_final_response": True,
            }

        async for result, error in client.stream_infer(requests()):
            if error is not None:
                raise error
            if len(result.get_response().outputs):
                yield int(result.as_numpy("num_output_tokens")[0])
            if result.get_response().parameters["triton_final_response"].bool_param:
                break

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
