"""What a server and its processes write: passed on to a file or to stderr, and the last of it kept for the reason of an end."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import IO

from backend.errors import ConfigError

_CHUNK_BYTES = 1 << 16
#: A start that failed has written less; of a server that ran, its last words matter.
_KEPT_BYTES = 1 << 18
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
_JOIN_S = 2.0


class ServerLog:
    """One launch's log, for one server after the other. Without a path it goes to stderr, where containers expect it."""

    def __init__(self, path: Path | None) -> None:
        """Raises ConfigError if the file cannot be written."""
        self._path = path
        try:
            self._sink = sys.stderr.fileno() if path is None else os.open(path, _APPEND, 0o644)
        except OSError as error:
            raise ConfigError(f"the log file {path} cannot be written: {error.strerror} (--log)") from None
        self._thread: threading.Thread | None = None
        self._kept = bytearray()
        self._complained = False

    @property
    def place(self) -> str:
        """Where to look, as the end of a sentence."""
        return "its log is above" if self._path is None else f"its log is {self._path.absolute()}"

    def follow(self, output: IO[bytes]) -> None:
        """Pass on what a new server writes; `output` is the unbuffered end of its pipe."""
        self._kept = bytearray()
        self._thread = threading.Thread(target=self._pump, args=(output, self._kept), name="server-log", daemon=True)
        self._thread.start()

    def last(self) -> str:
        """The last that the present server's processes wrote. Complete once all of them have ended."""
        self.finish()
        return self._kept.decode(errors="replace")

    def finish(self) -> None:
        """Wait until all is passed on that was written, by processes that have ended."""
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    def _pump(self, output: IO[bytes], kept: bytearray) -> None:
        with output:
            while data := output.read(_CHUNK_BYTES):
                kept += data
                del kept[:-_KEPT_BYTES]
                try:
                    while data:
                        data = data[os.write(self._sink, data) :]
                except OSError as error:  # a full disk, say: the server goes on, and would wait if nobody read on
                    self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._complained and self._path is not None:
            self._complained = True
            print(f"launch: the log file {self._path} cannot be written: {error.strerror}", file=sys.stderr, flush=True)
