"""What went wrong with a request ends up in its record, told apart by whether the server declined it."""

import asyncio
import socket

import pytest

from loadtest.clients import Clients
from loadtest.wire import event_of, is_rejection


@pytest.mark.parametrize("interface", ["http_stream", "grpc_stream", "http_infer", "grpc_infer"])
def test_a_server_that_is_not_there_is_a_failure_not_a_rejection(interface):
    """And no exception, which would end the whole run."""

    async def ask():
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # bound but not listening: nobody else takes it, and connections are refused
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            async with Clients(address, address) as clients:
                return await getattr(clients, interface)(3, "hello", {"max_tokens": 1}, 5.0)

    record = asyncio.run(ask())
    assert (record.id, record.outcome, record.responses, record.end_s) == (3, "failed", [], None)
    assert record.error


@pytest.mark.parametrize(
    ("message", "rejected"),
    [
        ("the queue is full: 3 requests wait (max_waiting); retry in about 2 s", True),
        ("[StatusCode.UNAVAILABLE] the server is shutting down", True),
        ("[StatusCode.UNAVAILABLE] failed to connect to all addresses", False),
        ("timeout_s: not finished after 0.05 s", False),
    ],
)
def test_only_the_servers_own_refusals_are_rejections(message, rejected):
    assert is_rejection(message) is rejected


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'data: {"text_output": "a"}\n', {"text_output": "a"}),
        (b'{"error": "the queue is full"}', {"error": "the queue is full"}),  # a refusal comes without events
        (b"\n", None),
        (b"<html>of a proxy</html>\n", None),
    ],
)
def test_streams_of_events_are_read_line_by_line(line, found):
    assert event_of(line) == found
