"""The figures of a load run against its latency promises, and the files that a run leaves.

Violation ratios: of requests (a stream whose first token came too late or never: rejected and failed ones count), of
tokens (inter-token latencies above the promise, by the project's one definition), and of seconds, as in BrownoutServe: a
second violates if the 90th percentile of either latency in it is above its promise; first tokens belong to the second of
the intended start, other tokens to that of their arrival.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import msgspec

from loadtest.open_loop import MAX_LATENESS_P99_S, lateness_p99_s
from loadtest.record import RequestRecord, Slo, summarize, weighted_percentile, write_records
from loadtest.telemetry import Sample, mean_over_time, recovery_s

#: Percentile of a second's latencies that decides whether the second violates.
SECOND_PERCENTILE = 90

#: (seconds, how often) of latencies; an answer that never came is infinitely late.
Weighted = list[tuple[float, int]]


class RunInfo(msgspec.Struct, kw_only=True):
    """What was run. Monotonic times are those of the records."""

    name: str
    arrivals: str
    seed: int
    arrivals_sha256: str
    slo: Slo
    started_monotonic_s: float
    started_at: str
    duration_s: float
    planned_requests: int
    bursts: list[tuple[float, float]] = []


class RunResult(msgspec.Struct, kw_only=True):
    """What came of it. Times in seconds; None where there was nothing to measure."""

    requests: int
    completed: int
    rejected: int
    failed: int
    ttft_violation_ratio: float | None
    itl_violation_ratio: float | None
    violating_seconds_ratio: float | None
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None
    output_tokens_per_s: float
    mean_threshold_prefill: float | None
    mean_threshold_decode: float | None
    united_share: float | None
    recovery_s: float | None


class RunSummary(msgspec.Struct, kw_only=True):
    """The summary file of a run. A run is invalid when the load generator itself was late, or was stopped early."""

    run: RunInfo
    generator_lateness_p99_s: float
    valid: bool
    result: RunResult


def summarize_run(info: RunInfo, records: Sequence[RequestRecord], samples: Sequence[Sample] = ()) -> RunSummary:
    """All figures of a run; those about brownout need telemetry samples."""
    base = summarize(records)
    ttft, itl = ttft_latencies(records), itl_latencies(records)
    lateness_s = lateness_p99_s(records)
    served = [(r.united_share, r.input_tokens + r.output_tokens) for r in records if r.output_tokens]
    weight = sum(tokens for _, tokens in served)
    finite_ttft = [(s, n) for _, s, n, _ in ttft if math.isfinite(s)]
    all_itl = [(s, n) for _, s, n, _ in itl]
    result = RunResult(
        requests=base.requests,
        completed=base.completed,
        rejected=base.rejected,
        failed=base.failed,
        ttft_violation_ratio=_violating(ttft, info.slo, "ttft_s"),
        itl_violation_ratio=_violating(itl, info.slo, "itl_s"),
        violating_seconds_ratio=violating_seconds_ratio(records, info.slo, info.started_monotonic_s),
        ttft_p50_s=_known(weighted_percentile(finite_ttft, 50)),
        ttft_p99_s=_known(weighted_percentile(finite_ttft, 99)),
        itl_p50_s=_known(weighted_percentile(all_itl, 50)),
        itl_p99_s=_known(weighted_percentile(all_itl, 99)),
        output_tokens_per_s=base.output_tokens_per_s,
        mean_threshold_prefill=mean_over_time(samples, "threshold_prefill"),
        mean_threshold_decode=mean_over_time(samples, "threshold_decode"),
        united_share=sum(share * tokens for share, tokens in served) / weight if weight else None,
        recovery_s=recovery_s(samples, info.started_monotonic_s + info.bursts[-1][1]) if info.bursts else None,
    )
    return RunSummary(
        run=info,
        generator_lateness_p99_s=lateness_s,
        valid=lateness_s <= MAX_LATENESS_P99_S and len(records) == info.planned_requests,
        result=result,
    )


def why_invalid(summary: RunSummary) -> str:
    """What makes the figures of a run worthless; empty for a valid one."""
    if summary.valid:
        return ""
    if summary.result.requests < summary.run.planned_requests:
        return f"only {summary.result.requests} of {summary.run.planned_requests} planned requests were sent"
    return (
        f"the load generator started requests {summary.generator_lateness_p99_s * 1e3:.0f} ms late (p99; allowed "
        f"{MAX_LATENESS_P99_S * 1e3:.0f} ms), so the figures measure the generator"
    )


def ttft_latencies(records: Sequence[RequestRecord]) -> list[tuple[float, float, int, RequestRecord]]:
    """(intended start, seconds to the first token, 1, record) of every stream; inf where none came."""
    return [
        (r.intended_start_s, math.inf if r.ttft_s is None or r.outcome != "completed" else r.ttft_s, 1, r)
        for r in records
        if r.is_stream
    ]


def itl_latencies(records: Sequence[RequestRecord]) -> list[tuple[float, float, int, RequestRecord]]:
    """(arrival, seconds per token, tokens, record) of every response but a stream's first."""
    return [
        (at_s, seconds, tokens, r)
        for r in records
        if r.is_stream
        for (at_s, _), (seconds, tokens) in zip(
            [response for response in r.responses[1:] if response[1]], r.inter_token_latencies(), strict=True
        )
    ]


def violating_seconds_ratio(records: Sequence[RequestRecord], slo: Slo, started_s: float) -> float | None:
    """Share of seconds that violate, among those in which a latency was measured."""
    seconds: dict[int, bool] = {}
    for latencies, name in ((ttft_latencies(records), "ttft_s"), (itl_latencies(records), "itl_s")):
        by_second: dict[int, Weighted] = defaultdict(list)
        for at_s, value, weight, record in latencies:
            # Relative to the client's own promise, so that clients with different ones can be counted together.
            by_second[int(at_s - started_s)].append((value / getattr(record.slo or slo, name), weight))
        for second, values in by_second.items():
            late = weighted_percentile(values, SECOND_PERCENTILE) > 1
            seconds[second] = seconds.get(second, False) or late
    return sum(seconds.values()) / len(seconds) if seconds else None


def _violating(latencies: list[tuple[float, float, int, RequestRecord]], slo: Slo, name: str) -> float | None:
    """Weighted share of latencies above the client's promise, or the run's."""
    total = sum(weight for _, _, weight, _ in latencies)
    late = sum(weight for _, value, weight, record in latencies if value > getattr(record.slo or slo, name))
    return late / total if total else None


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def summary_path(records_path: Path) -> Path:
    return records_path.with_suffix(".summary.json")


def telemetry_path(records_path: Path) -> Path:
    return records_path.with_suffix(".telemetry.jsonl")


def write_run(path: Path, summary: RunSummary, records: Sequence[RequestRecord]) -> None:
    """The records to `path` and the summary beside it."""
    write_records(path, records)
    summary_path(path).write_text(json.dumps(msgspec.to_builtins(summary), indent=2) + "\n")
