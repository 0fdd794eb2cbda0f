"""512 streams at once for eight minutes on the model that ships: nothing fails, memory stays flat, every KV block comes back."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from statistics import mean

import pytest

from backend.serving.launch_client import RunningServer, running_server
from loadtest.clients import Clients
from loadtest.prompts import GeneratedPrompts
from loadtest.record import RequestRecord
from tests.server.observe import read_metric, resident_bytes, wait_idle

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(900)]

STREAMS = 512
LENGTH_S = 480.0
#: Memory is read every PERIOD_S, and counts once pools and buffers have reached their size.
SETTLED_S, PERIOD_S = 90.0, 5.0
#: That the last quarter's memory may have more than the first's.
MAX_GROWTH = 0.01
#: Less room than there are streams, so that some requests are refused.
ROOM = {"MOE_LLM_MAX_RUNNING": "128", "MOE_LLM_MAX_WAITING": "320"}


async def one_client(clients: Clients, client: int, until_s: float, records: list[RequestRecord]) -> None:
    """One stream after the other; a refused request is not repeated at once."""
    rng, prompts = random.Random(client), GeneratedPrompts(client)
    ask = clients.http_stream if client % 2 else clients.grpc_stream
    number = 0
    while time.monotonic() < until_s:
        number += 1
        sampling = {"max_tokens": rng.randint(1, 64), "temperature": 1, "seed": number, "ignore_eos": True}
        record = await ask(number, prompts.text(number, rng.randint(4, 160)), sampling)
        record.text = ""
        records.append(record)
        if record.outcome == "rejected":
            await asyncio.sleep(rng.uniform(0.5, 1.5))


async def watch_memory(server: RunningServer, found: list[dict[str, int]]) -> None:
    while True:
        await asyncio.sleep(PERIOD_S)
        found.append(await asyncio.to_thread(resident_bytes, server))


async def load(server: RunningServer, records: list[RequestRecord], memory: list[dict[str, int]]) -> None:
    start_s = time.monotonic()
    watch = asyncio.create_task(watch_memory(server, memory))
    async with Clients(server.http, server.grpc) as clients:
        try:
            await asyncio.gather(*(one_client(clients, c, start_s + LENGTH_S, records) for c in range(STREAMS)))
        finally:
            watch.cancel()


def test_512_streams_for_eight_minutes() -> None:
    records: list[RequestRecord] = []
    memory: list[dict[str, int]] = []
    with running_server(env=ROOM) as server:
        asyncio.run(load(server, records, memory))
        wait_idle(server)
        assert server.messages() == ""  # nothing was restarted
        counts = Counter(record.outcome for record in records)
        print(f"{dict(counts)}, {sum(r.output_tokens for r in records)} tokens")
        for part in memory[0]:
            print(f"MiB of {part}: {[found[part] >> 20 for found in memory]}")
        assert Counter(record.error for record in records if record.outcome == "failed") == Counter()
        assert counts["completed"] > 1000 and counts["rejected"] > 0
        for outcome in ("completed", "rejected"):
            assert read_metric(server, "moe_requests_total", outcome=outcome) == counts[outcome]
    settled = [sum(found.values()) for found in memory[int(SETTLED_S / PERIOD_S) :]]
    quarter = len(settled) // 4
    growth = mean(settled[-quarter:]) / mean(settled[:quarter]) - 1
    assert growth < MAX_GROWTH, f"grew by {growth:.1%}"
