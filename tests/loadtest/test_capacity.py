"""Capacity is the throughput of a closed loop while it is full; promises follow from a calm run."""

import asyncio

import pytest

from backend.errors import UnavailableError
from loadtest.capacity import capacity_rps, promise_of, send_closed_loop
from loadtest.record import RequestRecord
from loadtest.schedule import Arrival


def completed(number: int, start_s: float, tokens: int = 10, step_s: float = 0.1) -> RequestRecord:
    """One token every step_s."""
    responses = [(start_s + step_s * (i + 1), 1) for i in range(tokens)]
    return RequestRecord(
        id=number,
        protocol="http_stream",
        intended_start_s=start_s,
        start_s=start_s,
        responses=responses,
        end_s=responses[-1][0],
        output_tokens=tokens,
    )


def test_a_closed_loop_keeps_just_so_many_in_flight():
    in_flight, seen = set(), []

    async def send(number: int, arrival: Arrival, intended_s: float) -> RequestRecord:
        in_flight.add(number)
        seen.append(len(in_flight))
        for _ in range(1 + number % 3):
            await asyncio.sleep(0)
        in_flight.remove(number)
        return completed(number, intended_s)

    arrivals = [(number, Arrival(0.0, 1, 1)) for number in range(20)]
    records = asyncio.run(send_closed_loop(arrivals, send, concurrency=4))
    assert [record.id for record in records] == list(range(20))
    assert max(seen) == 4 and seen.count(4) >= 15


def test_capacity_counts_the_time_in_which_all_clients_were_busy():
    """Four clients whose requests take 1 s each: 4 requests/s, though filling and emptying the loop took time too."""
    records = [completed(number, start_s=100.0 + (number % 4) * 0.25 + number // 4) for number in range(40)]
    assert capacity_rps(records) == pytest.approx(4.0, rel=0.02)


def test_capacity_is_refused_where_requests_were_lost_or_too_few():
    lost = completed(1, 0.0)
    lost.outcome, lost.error = "rejected", "the queue is full"
    with pytest.raises(UnavailableError, match="1 of 2 requests ended with: the queue is full"):
        capacity_rps([completed(0, 0.0), lost])
    with pytest.raises(UnavailableError, match="send more than at once"):
        capacity_rps([completed(0, 0.0), completed(1, 0.0)])


def test_promises_are_twice_the_calm_latencies():
    slo = promise_of([completed(number, float(number), step_s=0.01 * (number + 1)) for number in range(10)])
    assert slo.ttft_s == pytest.approx(2 * 0.09)
    assert slo.itl_s == pytest.approx(2 * 0.09)
