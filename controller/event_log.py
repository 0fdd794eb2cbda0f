"""What the controller saw and decided, one JSON line per reading, and the way back from it."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from backend.errors import ConfigError
from controller.reading import Reading

log = logging.getLogger("controller")


class Event(msgspec.Struct):
    """One turn of the loop. `resumed` are thresholds that the law was started from in this turn."""

    #: time.monotonic() of the controller's machine, and seconds since 1970.
    time_s: float
    unix_s: float
    dt_s: float
    mode: str
    reading: Reading | None = None
    resumed: tuple[float, float] | None = None
    threshold_prefill: float | None = None
    threshold_decode: float | None = None
    terms: dict[str, float | str | None] = {}
    settings_version: int | None = None
    #: Of the settings in force once they were set.
    mechanism: str | None = None
    way: int | None = None
    message: str = ""


class EventLog:
    """Appends events to a file; without a path it does nothing. Raises ConfigError if the file cannot be opened.

    What cannot be written later (a full disk) is left out: control goes on.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._failed = False
        self._file = None
        if path is not None:
            try:
                self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - held until close()
            except OSError as error:
                raise ConfigError(f"the event log {path} cannot be written: {error.strerror}") from None

    def write(self, event: Event) -> None:
        if self._file is None:
            return
        line = msgspec.json.encode(event) + b"\n"
        try:
            written = self._file.write(line)
            if written < len(line):
                self._file.truncate(os.fstat(self._file.fileno()).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("the event log %s cannot be written, its events are lost: %s", self._path, error.strerror)
            self._failed = True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_events(path: Path) -> Iterator[Event]:
    """The events of a log. Raises ConfigError, naming file and line; a last line that was cut off is left out."""
    decode = msgspec.json.Decoder(Event).decode
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"the event log {path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            yield decode(line)
        except msgspec.MsgspecError as error:
            if number == len(lines):
                return
            raise ConfigError(f"{path}, line {number}, is not an event: {error}") from None
