"""HTTP/1.1 by hand, as little of it as a load generator needs of Triton: POST, and the answer's lines as they come.

The generator shares its processors with what it measures; a request costs it half of what a general client library takes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)

_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class HttpError(Exception):
    """The answer ended too early, or is none."""


class HttpLines:
    """Connections to one server, any number at once, each used again after an answer that came whole."""

    def __init__(self, address: str) -> None:
        """`address`: HOST:PORT."""
        host, _, self._port = address.rpartition(":")
        self._address, self._host = address, host.strip("[]")
        self._idle: list[_Streams] = []

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()

    async def post(self, path: str, body: bytes) -> AsyncIterator[bytes]:
        """The lines of the answer to a JSON body, without their ends; an answer of any status.

        Raises OSError or HttpError.
        """
        reader, writer = await self._connection()
        whole = False
        try:
            head = f"POST {path} HTTP/1.1\r\nHost: {self._address}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            rest = b""
            async for data in _body(reader):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    yield line
            whole = True
            if rest:
                yield rest
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
            raise HttpError(f"the answer cannot be read: {error}") from None
        finally:
            if whole:
                self._idle.append((reader, writer))
            else:
                writer.close()

    async def _connection(self) -> _Streams:
        while self._idle:
            streams = self._idle.pop()
            if not streams[0].at_eof():
                return streams
            streams[1].close()
        return await asyncio.open_connection(self._host, int(self._port))


async def _body(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The parts of the next answer's body."""
    head = await reader.readuntil(b"\r\n\r\n")
    if _CHUNKED.search(head):
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\r\n")
    elif length := _LENGTH.search(head):
        yield await reader.readexactly(int(length[1]))
    else:
        raise ValueError("neither chunks nor a length")
