"""Requests of an engine from the first to the last moment."""

import time

import pytest

from backend.engine.request import Request
from backend.engine.request_book import RequestBook
from backend.engine.sampling_params import SamplingParams
from backend.errors import InvalidRequestError, UnavailableError


def request(name: str, tokens: int = 3, timeout_s: float | None = None, age_s: float = 0.0) -> Request:
    params = SamplingParams(timeout_s=timeout_s)
    return Request(name, list(range(tokens)), params, arrival=time.monotonic() - age_s)


def end(book: RequestBook, ended: Request) -> None:
    for sequence in ended.sequences:
        sequence.finish_reason = "abort"
    book.ended(ended)


def test_waiting_tokens_are_those_of_requests_that_have_not_started():
    book = RequestBook(max_waiting=4)
    first, second = request("a", 3), request("b", 5)
    book.add(first)
    book.add(second)
    assert book.waiting_tokens == 8
    book.started(first)
    book.started(first)
    assert book.waiting_tokens == 5 and list(book.waiting) == ["b"] and "a" in book
    end(book, second)
    end(book, second)
    assert book.waiting_tokens == 0 and len(book) == 1 and "b" not in book


def test_ids_in_use_and_full_queues_are_refused_with_a_hint_once_requests_have_ended():
    book = RequestBook(max_waiting=1)
    for name in "abc":
        book.add(done := request(name))
        end(book, done)
    book.add(request("d"))
    with pytest.raises(InvalidRequestError, match="'d' is already in use"):
        book.check_new(request("d"))
    with pytest.raises(UnavailableError, match=r"1 requests wait \(max_waiting\); retry in about 1 s"):
        book.add(request("e"))
    assert len(book) == 1


def test_requests_expire_in_the_order_of_their_deadlines_and_only_those_that_are_there():
    book = RequestBook(max_waiting=9)
    late, later, ended = (
        request("a", timeout_s=1, age_s=3),
        request("b", timeout_s=2, age_s=3),
        request("c", timeout_s=1),
    )
    for added in (later, ended, late, request("d", timeout_s=60), request("e")):
        book.add(added)
    end(book, ended)
    expired = []
    for passed in book.expired():
        expired.append(passed.request_id)
        end(book, passed)
    assert expired == ["a", "b"] and len(book) == 2


def test_the_oldest_waiting_request_is_the_first_that_has_not_started():
    book = RequestBook(max_waiting=9)
    assert book.oldest_waiting_s == 0
    book.add(first := request("a", age_s=1000))
    book.add(request("b", age_s=500))
    assert book.oldest_waiting_s >= 1000
    book.started(first)
    assert 500 <= book.oldest_waiting_s < 1000
