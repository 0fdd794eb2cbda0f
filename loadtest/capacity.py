"""What a machine can do, as the ground for rates and promises: closed-loop throughput, and latencies at a calm load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

from backend.errors import UnavailableError
from loadtest.open_loop import Send
from loadtest.record import RequestRecord, Slo, weighted_percentile
from loadtest.results import itl_latencies, ttft_latencies
from loadtest.schedule import Arrival

#: Percentile of the latencies at a calm load, and what the promise allows beyond it.
_PERCENT = 90
_SLACK = 2.0


async def send_closed_loop(
    arrivals: Iterable[tuple[int, Arrival]], send: Send, concurrency: int
) -> list[RequestRecord]:
    """Send requests with `concurrency` of them in flight as long as there are enough; their times do not apply."""
    waiting = iter(list(arrivals))
    records: list[RequestRecord] = []

    async def client() -> None:
        for number, arrival in waiting:
            records.append(await send(number, arrival, time.monotonic()))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return sorted(records, key=lambda record: record.id)


def capacity_rps(records: Sequence[RequestRecord]) -> float:
    """Requests per second of a closed loop, while all its clients were busy.

    From the first end to the last start; by output tokens, of which a window cuts fewer in two than of requests.

    Raises:
        UnavailableError: a request was not completed, or there are too few to tell.
    """
    lost = [record for record in records if record.outcome != "completed"]
    if lost:
        raise UnavailableError(
            f"capacity cannot be measured: {len(lost)} of {len(records)} requests ended with: {lost[0].error}"
        )
    start, end = min(r.end_s for r in records), max(r.start_s for r in records)
    if end <= start:
        raise UnavailableError(f"capacity cannot be measured with {len(records)} requests: send more than at once")
    tokens = sum(count for r in records for at_s, count in r.responses if start < at_s <= end)
    tokens_per_request = sum(r.output_tokens for r in records) / len(records)
    return tokens / (end - start) / tokens_per_request


def promise_of(records: Sequence[RequestRecord]) -> Slo:
    """Twice the 90th percentiles of a calm run's latencies."""
    ttft, itl = ([(x.seconds, x.count) for x in of(records)] for of in (ttft_latencies, itl_latencies))
    return Slo(ttft_s=_SLACK * weighted_percentile(ttft, _PERCENT), itl_s=_SLACK * weighted_percentile(itl, _PERCENT))
