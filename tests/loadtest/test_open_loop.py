"""Requests start at their times, whatever became of those before them."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from loadtest.open_loop import Pacer, lateness_p99_s, send_open_loop
from loadtest.record import RequestRecord
from loadtest.schedule import Arrival


@given(times=st.lists(st.floats(0, 100), max_size=30).map(sorted), pauses=st.lists(st.floats(0, 20), max_size=60))
def test_a_pacer_hands_out_each_request_once_never_early_and_at_the_first_look_after_its_time(times, pauses):
    """The clock also moves by other people's pauses between two looks, as it does on a busy machine."""
    now = 1000.0
    arrivals = [(number, Arrival(t, 1, 1)) for number, t in enumerate(times)]
    pacer = Pacer(arrivals, start_s=1000.0, clock=lambda: now)
    pauses, handed, looked = iter(pauses), [], 999.0
    while (wait_s := pacer.wait_s()) is not None:
        assert wait_s >= 0
        now += wait_s + next(pauses, 1e-6)
        due = pacer.due()
        assert all(looked < intended_s <= now for _, _, intended_s in due)
        handed += [number for number, _, _ in due]
        looked = now
    assert handed == list(range(len(times)))


def record_of(number: int, intended_s: float, start_s: float) -> RequestRecord:
    return RequestRecord(id=number, protocol="http_stream", intended_start_s=intended_s, start_s=start_s)


def test_no_request_waits_for_an_answer():
    """No answer comes before every request was sent: a closed loop would hang here."""

    async def load() -> list[RequestRecord]:
        all_sent = asyncio.Event()

        async def send(number: int, arrival: Arrival, intended_s: float) -> RequestRecord:
            if number == 19:
                all_sent.set()
            await all_sent.wait()
            return record_of(number, intended_s, intended_s)

        arrivals = [(number, Arrival(0.001 * number, 1, 1)) for number in range(20)]
        return await asyncio.wait_for(send_open_loop(arrivals, send, start_s=50.0), timeout=30)

    records = asyncio.run(load())
    assert [record.id for record in records] == list(range(20))
    assert [record.intended_start_s for record in records] == [50.0 + 0.001 * number for number in range(20)]


def test_lateness_is_that_of_the_starts():
    records = [record_of(i, float(i), i + 0.001 * i) for i in range(101)]
    assert abs(lateness_p99_s(records) - 0.099) < 1e-9
    assert lateness_p99_s([]) == 0
