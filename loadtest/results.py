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
from typing import NamedTuple

import msgspec

from loadtest.open_loop import MAX_LATENESS_P99_S, lateness_p99_s
from loadtest.record import RequestRecord, Slo, summarize, weighted_percentile, write_records
from loadtest.schedule import Schedule
from loadtest.telemetry import Sample, mean_over_time, recovery_s

#: Percentile of a second's latencies that decides whether the second violates.
SECOND_PERCENTILE = 90


class Latency(NamedTuple):
    """So many tokens (a first token: 1) that came after so many seconds each; inf if the answer never came."""

    #: When it counts: an intended start or an arrival.
    at_s: float
    seconds: float
    count: int
    record: RequestRecord


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

    @classmethod
    def of(cls, schedule: Schedule, *, name: str, arrivals: str, seed: int, slo: Slo) -> RunInfo:
        """Of a schedule that the specification `arrivals` has made; who sends it fills in when it starts."""
        return cls(
            name=name,
            arrivals=arrivals,
            seed=seed,
            arrivals_sha256=schedule.sha256(),
            slo=slo,
            started_monotonic_s=0.0,
            started_at="",
            duration_s=schedule.duration_s,
            planned_requests=len(schedule.arrivals),
            bursts=schedule.bursts,
        )


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
    finite_ttft = [(x.seconds, x.count) for x in ttft if math.isfinite(x.seconds)]
    all_itl = [(x.seconds, x.count) for x in itl]
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


def ttft_latencies(records: Sequence[RequestRecord]) -> list[Latency]:
    """Times to the first token of all streams, at their intended starts."""
    return [
        Latency(r.intended_start_s, math.inf if r.ttft_s is None or r.outcome != "completed" else r.ttft_s, 1, r)
        for r in records
        if r.is_stream
    ]


def itl_latencies(records: Sequence[RequestRecord]) -> list[Latency]:
    """Inter-token latencies of every response but a stream's first, at their arrivals."""
    return [
        Latency(at_s, seconds, tokens, r)
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
        by_second: dict[int, list[tuple[float, int]]] = defaultdict(list)
        for x in latencies:
            # Relative to the client's own promise, so that clients with different ones can be counted together.
            by_second[int(x.at_s - started_s)].append((x.seconds / getattr(x.record.slo or slo, name), x.count))
        for second, values in by_second.items():
            late = weighted_percentile(values, SECOND_PERCENTILE) > 1
            seconds[second] = seconds.get(second, False) or late
    return sum(seconds.values()) / len(seconds) if seconds else None


def _violating(latencies: Sequence[Latency], slo: Slo, name: str) -> float | None:
    """Weighted share of latencies above the client's promise, or the run's."""
    total = sum(x.count for x in latencies)
    late = sum(x.count for x in latencies if x.seconds > getattr(x.record.slo or slo, name))
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
