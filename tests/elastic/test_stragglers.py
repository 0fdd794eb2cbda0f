"""A worker is slow only if the engine waits for it much longer than for the others, and for long."""

from __future__ import annotations

from backend.elastic.stragglers import Stragglers


def verdicts(times: dict[int, float], layers: int = 200, least_s: float = 0.01) -> set[int]:
    """Workers found slow if each takes this long for every layer, and another one is waited for first each time."""
    stragglers, found = Stragglers(least_s), set()
    for layer in range(layers):
        order = list(times)[layer % len(times) :] + list(times)[: layer % len(times)]
        now, waited = 0.0, {}
        for worker in order:
            waited[worker] = max(0.0, times[worker] - now)
            now = max(now, times[worker])
        found.add(stragglers.observe(waited))
    return found - {None}


def test_worker_that_takes_many_times_as_long_is_found() -> None:
    assert verdicts({0: 0.02, 1: 0.3}) == {1}
    assert verdicts({0: 0.02, 1: 0.03, 2: 0.5, 3: 0.02}) == {2}


def test_small_differences_short_waits_and_a_single_worker_are_not() -> None:
    assert verdicts({0: 0.02, 1: 0.05}) == set()
    assert verdicts({0: 0.0001, 1: 0.005}) == set()
    assert verdicts({0: 3.0}) == set()


def test_one_long_wait_is_not_slowness() -> None:
    stragglers = Stragglers(0.01)
    assert [stragglers.observe({0: 0.02, 1: 0.02}) for _ in range(30)] == [None] * 30
    stragglers.forget()
    waits = [{0: 0.02, 1: 0.4 if layer == 9 else 0.02} for layer in range(100)]
    assert {stragglers.observe(wait) for wait in waits} == {None}
