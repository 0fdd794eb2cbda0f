"""Recorded arrivals: Azure LLM 2023 and 2024 (CSV), Mooncake (JSON lines), BurstGPT (CSV), and plain CSV.

The format is told by the header (or by JSON). Times come back relative to the first request, sorted.
"""

from __future__ import annotations

import csv
import datetime
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from backend.errors import ConfigError
from loadtest.schedule import Arrival, Schedule, draw_class


class TraceRow(NamedTuple):
    """One recorded request; at_s relative to the trace's first."""

    at_s: float
    input_tokens: int
    output_tokens: int


class Scaling(msgspec.Struct, frozen=True, kw_only=True):
    """How to fit a trace to a machine.

    Cut first: `start` and `duration` in seconds of the trace. Then `rate` (keep each request with this probability; above
    1 the whole part is copies, each shifted at random by less than a mean gap), `time` (2: everything takes twice as long) and
    `tokens` (lengths times this, at least 1, at most `max_input` and `max_output`).
    """

    start: float = 0.0
    duration: float = math.inf
    time: float = 1.0
    rate: float = 1.0
    tokens: float = 1.0
    max_input: int = 1_000_000
    max_output: int = 1_000_000

    def __post_init__(self) -> None:
        if not 0 <= self.start < math.inf:
            raise ConfigError(f"trace: start must be at least 0 s, got {self.start:g}")
        for name in ("duration", "time", "rate", "tokens", "max_input", "max_output"):
            value = getattr(self, name)
            if not (value > 0 and (name == "duration" or math.isfinite(value))):
                raise ConfigError(f"trace: {name} must be more than 0, got {value:g}")


def read_trace(path: Path) -> list[TraceRow]:
    """All requests of a trace file.

    Raises:
        ConfigError: no such file, unknown format, a wrong line (named by its number), or no request at all.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            read = _mooncake if first.lstrip().startswith("{") else _csv
            rows = sorted(read(path, file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {path} cannot be read: {error}") from None
    if not rows:
        raise ConfigError(f"trace {path} has no request")
    return [TraceRow(row.at_s - rows[0].at_s, row.input_tokens, row.output_tokens) for row in rows]


def scale_trace(rows: list[TraceRow], scaling: Scaling, *, seed: int, never_share: float = 0.0) -> Schedule:
    """The schedule that replays a trace; the same for the same seed."""
    rng = random.Random(f"trace {seed}")
    length = min(scaling.duration, max(0.0, rows[-1].at_s - scaling.start) + 1e-6)
    cut = [row for row in rows if scaling.start <= row.at_s < scaling.start + length]
    if not cut:
        raise ConfigError(
            f"trace: no request in {length:g} s from {scaling.start:g} s on; it ends at {rows[-1].at_s:g} s"
        )
    mean_gap = length / len(cut)
    whole, part = divmod(scaling.rate, 1)
    arrivals = []
    for row in cut:
        copies = int(whole) + (rng.random() < part)
        for copy in range(copies):
            at_s = row.at_s - scaling.start + (rng.random() * mean_gap if copy else 0.0)
            arrivals.append(
                Arrival(
                    round(min(at_s, length) * scaling.time, 6),
                    min(scaling.max_input, max(1, round(row.input_tokens * scaling.tokens))),
                    min(scaling.max_output, max(1, round(row.output_tokens * scaling.tokens))),
                    draw_class(rng, never_share),
                )
            )
    if not arrivals:
        raise ConfigError(f"trace: rate {scaling.rate:g} leaves none of {len(cut)} requests")
    return Schedule(sorted(arrivals, key=lambda a: a.at_s), length * scaling.time)


def _csv(path: Path, file) -> Iterator[TraceRow]:
    reader = csv.DictReader(file)
    header = [(name or "").strip() for name in reader.fieldnames or []]
    reader.fieldnames = header
    row_of = next((row_of for columns, row_of in _CSV_FORMATS.items() if set(columns) <= set(header)), None)
    if row_of is None:
        known = "; ".join(",".join(columns) for columns in _CSV_FORMATS)
        raise ConfigError(f"trace {path}: the header {','.join(header)!r} is of no known format; known: {known}")
    for values in reader:
        row = _checked(path, reader.line_num, lambda values=values: row_of(values))
        if row is not None:
            yield row


def _mooncake(path: Path, file) -> Iterator[TraceRow]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield _checked(path, number, lambda line=line: _mooncake_row(msgspec.json.decode(line)))


def _checked(path: Path, number: int, read: Callable[[], TraceRow | None]) -> TraceRow | None:
    """The row of a line; whatever is wrong with it becomes an error that names the line."""
    try:
        row = read()
        if row is not None and not (math.isfinite(row.at_s) and row.input_tokens >= 0 and row.output_tokens >= 0):
            raise ValueError("times must be finite and token counts at least 0")
    except KeyError as error:
        raise ConfigError(f"trace {path}, line {number}: {error.args[0]} is missing") from None
    except (ValueError, TypeError, AttributeError, msgspec.DecodeError) as error:
        raise ConfigError(f"trace {path}, line {number}: {error}") from None
    return row


def _azure(values: Mapping[str, str]) -> TraceRow:
    time = datetime.datetime.fromisoformat(values["TIMESTAMP"])
    if time.tzinfo is None:
        time = time.replace(tzinfo=datetime.UTC)
    return TraceRow(time.timestamp(), int(values["ContextTokens"]), int(values["GeneratedTokens"]))


def _burstgpt(values: Mapping[str, str]) -> TraceRow | None:
    """None for a request that failed when the trace was taken: it has no response tokens."""
    tokens = int(values["Response tokens"])
    return TraceRow(float(values["Timestamp"]), int(values["Request tokens"]), tokens) if tokens else None


def _plain(values: Mapping[str, str]) -> TraceRow:
    return TraceRow(float(values["arrival_s"]), int(values["input_tokens"]), int(values["output_tokens"]))


def _mooncake_row(values: Mapping) -> TraceRow:
    return TraceRow(values["timestamp"] / 1000, int(values["input_length"]), int(values["output_length"]))


_CSV_FORMATS: dict[tuple[str, ...], Callable[[Mapping[str, str]], TraceRow | None]] = {
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"): _azure,
    ("Timestamp", "Model", "Request tokens", "Response tokens"): _burstgpt,
    ("arrival_s", "input_tokens", "output_tokens"): _plain,
}
