"""Much at once on one server: 64 streams say what each says alone, and a round of all traffic leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from backend.serving.launch_client import RunningServer
from loadtest.clients import Clients
from loadtest.record import RequestRecord
from tests.server.observe import read_metric, resident_bytes, wait_idle
from tests.server.talk import ASK, STREAMS, ServerError, generate, sampling
from tests.waiting import wait_until

pytestmark = pytest.mark.server

NUM_PROMPTS = 32
#: Of varied length; the tokens of this checkpoint's tokenizer are bytes and made-up words.
PROMPTS = [" ".join(["the", "router", "sends", "every", "token"] * (1 + i % 7)) + f" {i}" for i in range(NUM_PROMPTS)]
LENGTHS = [16 + 3 * (i % 16) for i in range(NUM_PROMPTS)]
#: Memory that a second round may add to the first one's.
MAX_GROWTH = 0.02


def parameters(i: int) -> dict:
    return {"max_tokens": LENGTHS[i], "temperature": 0, "ignore_eos": True}


async def send_at_once(server: RunningServer, interfaces: list[str]) -> list[RequestRecord]:
    """Every prompt over each of the interfaces, all at the same time."""
    async with Clients(server.http, server.grpc) as clients:
        calls = [
            getattr(clients, interface)(i, PROMPTS[i], parameters(i))
            for i in range(NUM_PROMPTS)
            for interface in interfaces
        ]
        return await asyncio.gather(*calls)


@pytest.fixture(scope="module")
def alone(server: RunningServer) -> list[str]:
    """Each prompt's completion as the only request."""
    return [
        generate(
            server,
            {
                "text_input": PROMPTS[i],
                "sampling_parameters": json.dumps(parameters(i)),
                "exclude_input_in_output": True,
            },
        ).text
        for i in range(NUM_PROMPTS)
    ]


def test_64_streams_at_once_say_what_each_says_alone(server: RunningServer, alone: list[str]) -> None:
    """Over both protocols."""
    records = asyncio.run(send_at_once(server, ["http_stream", "grpc_stream"]))
    assert len(records) == 64
    assert [record.error for record in records if record.error] == []
    for record in records:
        assert record.text == alone[record.id], record.protocol
        assert record.output_tokens == LENGTHS[record.id]
    wait_idle(server)


def test_preempted_streams_say_what_each_says_alone(server: RunningServer) -> None:
    """Twelve streams that fit the KV cache when they start, and do not any more long before they end."""
    inputs = [{"input_ids": [65 + i], "sampling_parameters": sampling(max_tokens=320)} for i in range(12)]
    alone = [generate(server, {**one, "exclude_input_in_output": True}).text for one in inputs]
    preemptions = read_metric(server, "moe_preemptions_total")
    with ThreadPoolExecutor(len(inputs)) as pool:
        answers = list(pool.map(lambda one: ASK["grpc_stream"](server, one), inputs))
    assert [answer.text for answer in answers] == alone
    wait_until(lambda: read_metric(server, "moe_preemptions_total") > preemptions, 5, "preempted")
    wait_idle(server)


def test_single_responses_among_streams(server: RunningServer, alone: list[str]) -> None:
    records = asyncio.run(send_at_once(server, ["http_infer", "grpc_infer", "grpc_stream"]))
    assert [record.error for record in records if record.error] == []
    assert [record.text for record in records] == [text for text in alone for _ in range(3)]


def one_round(server: RunningServer) -> None:
    """Everything that clients do: streams, single responses, cancellations, clients that vanish, bad input, timeouts."""
    asyncio.run(send_at_once(server, ["http_stream", "grpc_stream"]))
    asyncio.run(send_at_once(server, ["http_infer", "grpc_infer"]))
    endless = {"text_input": "for ever", "sampling_parameters": sampling(max_tokens=10**6, n=2)}
    for _ in range(8):
        streams = [kind(server, endless) for kind in STREAMS.values()]
        for stream in streams:
            next(iter(stream))
            stream.cancel()
    for interface, ask in ASK.items():
        for bad in ("{", '{"n": -1}', '{"temperature": NaN}', '{"timeout_s": 0.05, "max_tokens": 1000}') * 5:
            with contextlib.suppress(ServerError):
                ask(server, {"text_input": f"bad {interface}", "sampling_parameters": bad})
        for seed in range(4):
            text = sampling(max_tokens=20, temperature=1, seed=seed, n=2, logprobs=5, stop=["never said"])
            ask(server, {"text_input": "all options", "sampling_parameters": text, "return_logprobs": True})
    wait_idle(server)


def test_a_second_round_of_all_traffic_leaves_nothing_behind(server: RunningServer) -> None:
    """All blocks are free after each round, and the stubs and the engine grow by less than 2 %."""
    one_round(server)
    first = sum(resident_bytes(server).values())
    one_round(server)
    growth = sum(resident_bytes(server).values()) / first - 1
    assert growth < MAX_GROWTH, f"{first / 2**20:.0f} MiB grew by {growth:.2%}"
