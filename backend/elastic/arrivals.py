"""Arrivals for the simulator: from a trace file, or Poisson."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backend.errors import ConfigError

_PLAIN = ("arrival_s", "input_tokens", "output_tokens")
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class Arrivals:
    """Requests in order of arrival: seconds from the start, prompt tokens, generated tokens (both at least 1), [R] each."""

    arrival_s: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    source: str

    def __len__(self) -> int:
        return len(self.arrival_s)

    def window(self, seconds: float, rate_scale: float = 1.0, start: float = 0.0) -> Arrivals:
        """`seconds` from `start` on, after arrivals have been compressed `rate_scale` times; they count from the window's start.

        Raises ConfigError if none is left.
        """
        if not (seconds > 0 and rate_scale > 0 and start >= 0):
            raise ConfigError(
                f"seconds and rate scale must be positive and the start not negative, got {seconds}, {rate_scale}, {start}"
            )
        times = self.arrival_s / rate_scale - start
        kept = (times >= 0) & (times < seconds)
        if not kept.any():
            first, last = start * rate_scale, (start + seconds) * rate_scale
            raise ConfigError(f"{self.source} has no request between {first:g} and {last:g} s")
        return Arrivals(times[kept], self.input_tokens[kept], self.output_tokens[kept], self.source)


def read_trace(path: Path) -> Arrivals:
    """CSV with the columns arrival_s, input_tokens, output_tokens, or those of the Azure LLM traces. Errors name the line."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if set(_PLAIN) <= set(columns):
                names, parse = _PLAIN, float
            elif set(_AZURE) <= set(columns):
                names, parse = _AZURE, _timestamp
            else:
                raise ConfigError(
                    f"trace {path} has columns {', '.join(columns)}; needed are {', '.join(_PLAIN)} or {', '.join(_AZURE)}"
                )
            rows = []
            for row in reader:
                try:
                    rows.append((parse(row[names[0]]), int(row[names[1]]), int(row[names[2]])))
                except (TypeError, ValueError):
                    raise ConfigError(
                        f"trace {path}, line {reader.line_num}: {list(row.values())} is no request"
                    ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {path} cannot be read: {error}") from None
    if not rows:
        raise ConfigError(f"trace {path} has no requests")
    rows.sort(key=lambda row: row[0])
    times, inputs, outputs = zip(*rows, strict=True)
    # An Azure trace starts with its first request; plain arrivals count from the start of the window.
    origin = times[0] if names is _AZURE else 0.0
    return Arrivals(
        np.array(times) - origin, np.maximum(1, np.array(inputs)), np.maximum(1, np.array(outputs)), path.name
    )


def poisson(rate: float, seconds: float, input_tokens: int, output_tokens: int, seed: int) -> Arrivals:
    """Poisson arrivals at `rate` per second; token numbers are exponential with the given means."""
    if not (rate > 0 and seconds > 0 and input_tokens >= 1 and output_tokens >= 1):
        raise ConfigError("rate, seconds and token numbers must be positive")
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, max(1, int(2 * rate * seconds) + 20)))
    times = times[times < seconds] if (times < seconds).any() else times[:1] * 0
    sizes = [
        1 + rng.exponential(mean - 1 + 1e-9, len(times)).astype(np.int64) for mean in (input_tokens, output_tokens)
    ]
    return Arrivals(times, sizes[0], sizes[1], f"Poisson, {rate:g} requests/s")


def _timestamp(text: str) -> float:
    """Seconds of `2023-11-16 18:15:46.6805900` (the trace has seven digits) or with an offset, as in 2024."""
    head, _, rest = text.strip().partition(".")
    digits = "".join(c for c in rest.split("+")[0] if c.isdigit())
    return datetime.fromisoformat(head.split("+")[0]).timestamp() + float(f"0.{digits or 0}")
