"""Lines of HTTP answers, however they are cut; a connection is used again only after an answer that came whole."""

from __future__ import annotations

import asyncio

import pytest

from loadtest.http_lines import HttpError, HttpLines

STREAM = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\ndata: a\r\n4\r\n\n\nda\r\n8\r\nta: bc\n\n\r\n0\r\n\r\n"
)
PLAIN = b'HTTP/1.1 404 Not Found\r\nContent-Length: 13\r\n\r\n{"error":"x"}'


async def answers(*replies: bytes, cut: int = 1000) -> tuple[list[list[bytes] | str], int]:
    """What is read of each reply, sent in pieces of `cut` bytes, and over how many connections."""
    pending, connections = list(replies), 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while pending and await reader.readuntil(b"{}"):
            reply = pending.pop(0)
            for at in range(0, len(reply), cut):
                writer.write(reply[at : at + cut])
                await writer.drain()
                await asyncio.sleep(0)
            if reply not in (STREAM, PLAIN):
                break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = HttpLines(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    seen: list[list[bytes] | str] = []
    for _ in replies:
        try:
            seen.append([line async for line in client.post("/path", b"{}")])
        except HttpError:
            seen.append("error")
    client.close()
    server.close()
    return seen, connections


@pytest.mark.parametrize("cut", [1, 5, 1000])
def test_lines_are_put_together_and_connections_used_again(cut: int) -> None:
    seen, connections = asyncio.run(answers(STREAM, PLAIN, STREAM, cut=cut))
    events = [b"data: a", b"", b"data: bc", b""]
    assert seen == [events, [b'{"error":"x"}'], events]
    assert connections == 1


@pytest.mark.parametrize("broken", [STREAM[:-9], b"HTTP/1.1 200 OK\r\n\r\n", PLAIN[:-3], b"", b"\r\n\r\n"])
def test_half_an_answer_is_an_error_and_its_connection_is_left(broken: bytes) -> None:
    seen, connections = asyncio.run(answers(broken, PLAIN))
    assert seen == ["error", [b'{"error":"x"}']]
    assert connections == 2
