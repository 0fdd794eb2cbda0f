"""What is recorded of one request, and the latencies that follow from it.

Latency is defined once for the project: a response with m tokens that comes g seconds after the one before counts as m
inter-token latencies of g/m; the time to first token runs from the request's intended start.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """What a client was promised, in seconds: time to the first token, and between two tokens."""

    ttft_s: float
    itl_s: float


class RequestRecord(msgspec.Struct, kw_only=True):
    """One request of a load run. Times are in seconds on one monotonic clock; `responses` holds (time, tokens)."""

    id: int
    protocol: str
    intended_start_s: float
    start_s: float
    responses: list[tuple[float, int]] = []
    end_s: float | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    outcome: str = "completed"  # or rejected, failed
    error: str = ""
    error_s: float | None = None  # when the error came
    united_share: float = 0.0
    text: str = ""
    brownout: str = "auto"  # quality class: auto or never
    slo: Slo | None = None  # the client's own promise, where it differs from the run's

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, or None if none came."""
        return self.responses[0][0] - self.intended_start_s if self.responses else None

    @property
    def is_stream(self) -> bool:
        """Whether tokens come one by one; a single response has neither a first token nor gaps of its own."""
        return self.protocol.endswith("stream")

    @property
    def latency_s(self) -> float | None:
        """Intended start to the last response."""
        return None if self.end_s is None else self.end_s - self.intended_start_s

    @property
    def max_gap_s(self) -> float:
        """Longest time between two responses."""
        times = [time for time, _ in self.responses]
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)

    def inter_token_latencies(self) -> list[tuple[float, int]]:
        """(seconds per token, tokens) for each response but the first."""
        pairs = zip(self.responses, self.responses[1:], strict=False)
        return [((time - before) / tokens, tokens) for (before, _), (time, tokens) in pairs if tokens]


def weighted_percentile(values: list[tuple[float, int]], percent: float) -> float:
    """Percentile of values that count several times; nan if there are none."""
    if not values:
        return float("nan")
    ordered = np.array(sorted(values))
    cumulative = np.cumsum(ordered[:, 1])
    return float(ordered[np.searchsorted(cumulative, cumulative[-1] * percent / 100), 0])


class Summary(msgspec.Struct, kw_only=True):
    """Figures of a set of requests; times in seconds."""

    requests: int
    completed: int
    rejected: int
    failed: int
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    latency_p50_s: float
    latency_p99_s: float
    input_tokens: int
    output_tokens: int
    output_tokens_per_s: float


def summarize(records: Iterable[RequestRecord]) -> Summary:
    """Summary over records; throughput from the first start to the last response."""
    records = list(records)
    ended = [record for record in records if record.end_s is not None]
    start = min((record.start_s for record in records), default=0.0)
    span = max((record.end_s for record in ended), default=start) - start
    ttft = [(record.ttft_s, 1) for record in records if record.ttft_s is not None]
    itl = [pair for record in records for pair in record.inter_token_latencies()]
    latency = [(record.latency_s, 1) for record in ended]
    output_tokens = sum(record.output_tokens for record in records)

    def count(outcome: str) -> int:
        return sum(1 for record in records if record.outcome == outcome)

    return Summary(
        requests=len(records),
        completed=count("completed"),
        rejected=count("rejected"),
        failed=count("failed"),
        ttft_p50_s=weighted_percentile(ttft, 50),
        ttft_p99_s=weighted_percentile(ttft, 99),
        itl_p50_s=weighted_percentile(itl, 50),
        itl_p99_s=weighted_percentile(itl, 99),
        latency_p50_s=weighted_percentile(latency, 50),
        latency_p99_s=weighted_percentile(latency, 99),
        input_tokens=sum(record.input_tokens for record in records),
        output_tokens=output_tokens,
        output_tokens_per_s=output_tokens / span if span > 0 else 0.0,
    )


def write_records(path: Path, records: Iterable[RequestRecord]) -> None:
    """One JSON line per request."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for record in records:
            file.write(msgspec.json.encode(record) + b"\n")


def read_records(path: Path) -> list[RequestRecord]:
    with open(path, "rb") as file:
        return [msgspec.json.decode(line, type=RequestRecord) for line in file]
