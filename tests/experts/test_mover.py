"""Copies run beside the caller, in order, and say what went wrong."""

from __future__ import annotations

import threading

import pytest

from backend.experts.mover import ThreadMover


def test_moves_end_in_the_order_of_their_start_and_beside_the_caller() -> None:
    mover, gate, order = ThreadMover(), threading.Event(), []
    moves = [mover.start(gate.wait), *(mover.start(lambda i=i: order.append(i)) for i in range(3))]
    assert not any(move.done() for move in moves)
    gate.set()
    for move in moves:
        move.wait()
    assert order == [0, 1, 2] and all(move.done() for move in moves)


def test_failure_reaches_who_waits_and_later_moves_go_on() -> None:
    mover = ThreadMover()
    failing, later = mover.start(lambda: 1 / 0), mover.start(lambda: None)
    with pytest.raises(ZeroDivisionError):
        failing.wait()
    later.wait()
