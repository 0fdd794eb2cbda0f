"""Copies run beside the caller, in order, and say what went wrong."""

from __future__ import annotations

import threading

import pytest

from backend.experts.mover import AT_ONCE_BYTES, ThreadMover

LARGE = AT_ONCE_BYTES + 1


def test_what_is_sooner_copied_than_handed_over_is_copied_at_once() -> None:
    order: list[int] = []
    assert ThreadMover().start(lambda: order.append(1), AT_ONCE_BYTES).done() and order == [1]


def test_moves_end_in_the_order_of_their_start_and_beside_the_caller() -> None:
    mover, gate, order = ThreadMover(), threading.Event(), []
    moves = [mover.start(copy, LARGE) for copy in (gate.wait, *(lambda i=i: order.append(i) for i in range(3)))]
    assert not any(move.done() for move in moves)
    gate.set()
    for move in moves:
        move.wait()
    assert order == [0, 1, 2] and all(move.done() for move in moves)


@pytest.mark.parametrize("num_bytes", [0, LARGE])
def test_failure_reaches_who_waits_and_later_moves_go_on(num_bytes: int) -> None:
    mover = ThreadMover()
    failing, later = mover.start(lambda: 1 / 0, num_bytes), mover.start(lambda: None, num_bytes)
    with pytest.raises(ZeroDivisionError):
        failing.wait()
    later.wait()
