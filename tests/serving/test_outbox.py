"""Urgent responses never wait; the others share a bounded rate fairly; nothing is lost."""

import itertools
import threading
import time

from backend.serving.outbox import Outbox


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def never(item):
    return 0.0


def make(rate=100.0, last_served=never):
    clock = Clock()
    return Outbox(lambda item: None, rate, last_served, clock), clock


def drain(outbox):
    items = []
    while (item := outbox.next_item()[0]) is not None:
        items.append(item)
    return items


def test_rate_is_bounded_and_turns_are_fair():
    times, served = itertools.count(), dict.fromkeys("abcdefgh", 0.0)
    outbox, clock = make(rate=100.0, last_served=served.get)  # a burst of 5
    sent = []
    for _ in range(100):
        for item in "abcdefgh":
            outbox.mark(item, urgent=False)
        items = drain(outbox)
        served.update(zip(items, times, strict=False))
        sent += items
        clock.now += 0.01
    assert 100 <= len(sent) <= 106
    counts = [sent.count(item) for item in "abcdefgh"]
    assert max(counts) - min(counts) <= 1


def test_the_wait_is_stated():
    outbox, clock = make(rate=10.0)
    assert outbox.next_item() == (None, None)
    outbox.mark("a", urgent=False)
    assert drain(outbox) == ["a"]
    outbox.mark("b", urgent=False)
    item, wait_s = outbox.next_item()
    assert item is None and 0 < wait_s <= 0.1
    clock.now += wait_s + 1e-9
    assert drain(outbox) == ["b"]


def test_turns_come_in_bunches():
    outbox, clock = make(rate=100.0)  # a burst of 5, bunches of 3
    sizes = []
    for _ in range(1000):
        for item in "abcd":
            outbox.mark(item, urgent=False)
        sizes.append(len(drain(outbox)))
        clock.now += 0.001
    # After the first burst; a bunch may be complete a moment before or after a tick of this clock.
    later = [size for size in sizes[10:] if size]
    assert min(later) > 1 and 100 <= sum(sizes) <= 106


def test_what_is_urgent_goes_between_bunches_and_takes_nobody_along():
    outbox, clock = make(rate=100.0)
    for item in range(30):
        outbox.mark(item, urgent=False)
    assert len(drain(outbox)) == 5
    clock.now += 0.02  # two could go, but their bunch is not complete
    outbox.mark("x", urgent=True)
    assert drain(outbox) == ["x"]
    clock.now += 0.02
    assert len(drain(outbox)) == 3  # of four, one went to the urgent one


def test_urgent_items_go_first_and_at_once():
    outbox, _ = make(rate=10.0)
    for number in range(30):
        outbox.mark(number, urgent=False)
    drain(outbox)
    outbox.mark("x", urgent=False)
    for number in range(50):
        outbox.mark(f"urgent {number}", urgent=True)
    assert drain(outbox) == [f"urgent {number}" for number in range(50)]


def test_urgent_items_use_up_the_allowance_of_the_others_but_not_for_ever():
    outbox, clock = make(rate=10.0)
    for number in range(1000):
        outbox.mark(number, urgent=True)
    assert len(drain(outbox)) == 1000
    outbox.mark("a", urgent=False)
    assert drain(outbox) == []
    clock.now += 1.2
    assert drain(outbox) == ["a"]


def test_a_waiting_item_that_becomes_urgent_is_sent_once():
    outbox, _ = make()
    outbox.mark("a", urgent=False)
    outbox.mark("a", urgent=False)
    outbox.mark("a", urgent=True)
    assert drain(outbox) == ["a"]


def test_thread_delivers_everything_and_survives_a_failing_item():
    delivered, done = [], threading.Event()

    def deliver(item):
        if item == 3:
            raise RuntimeError("the client is gone")
        delivered.append(item)
        if len(delivered) == 9:
            done.set()

    outbox = Outbox(deliver, 10_000, never)
    outbox.start()
    for number in range(10):
        outbox.mark(number, urgent=number % 2 == 0)
    assert done.wait(5)
    outbox.close()
    assert sorted(delivered) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_close_sends_what_is_urgent():
    delivered = []
    outbox = Outbox(lambda item: (time.sleep(0.01), delivered.append(item)), 10, never)
    outbox.start()
    for number in range(20):
        outbox.mark(number, urgent=True)
    outbox.close()
    assert delivered == list(range(20))
