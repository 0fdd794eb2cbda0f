"""Violations and summaries follow their definitions, on records small enough to count by hand."""

import json

import msgspec
import pytest

from loadtest.record import RequestRecord, Slo
from loadtest.results import RunInfo, RunSummary, summarize_run, summary_path, why_invalid, write_run
from loadtest.telemetry import Sample, mean_over_time, parse_metrics, recovery_s

SLO = Slo(ttft_s=0.5, itl_s=0.1)


def info(**overrides) -> RunInfo:
    values = {
        "name": "run",
        "arrivals": "poisson:rate=1",
        "seed": 0,
        "arrivals_sha256": "ab" * 32,
        "slo": SLO,
        "started_monotonic_s": 100.0,
        "started_at": "2030-01-01T00:00:00+00:00",
        "duration_s": 10.0,
        "planned_requests": 5,
    }
    return RunInfo(**values | overrides)


def stream(number: int, at_s: float, ttft_s: float, gaps: list[tuple[float, int]], **overrides) -> RequestRecord:
    """A completed stream that started on time; gaps: (seconds, tokens) of the responses after the first."""
    time, responses = 100 + at_s + ttft_s, [(100 + at_s + ttft_s, 1)]
    for gap, tokens in gaps:
        time += gap
        responses.append((time, tokens))
    values = {
        "id": number,
        "protocol": "grpc_stream",
        "intended_start_s": 100 + at_s,
        "start_s": 100 + at_s,
        "responses": responses,
        "end_s": time,
        "input_tokens": 10,
        "output_tokens": sum(tokens for _, tokens in responses),
    }
    return RequestRecord(**values | overrides)


def lost(number: int, at_s: float, outcome: str) -> RequestRecord:
    return stream(
        number, at_s, 0.1, [], responses=[], end_s=None, output_tokens=0, outcome=outcome, error="queue is full"
    )


def test_ratios_count_requests_tokens_and_seconds():
    records = [
        stream(0, 0.0, 0.2, [(0.1, 2), (0.5, 2)]),  # tokens at 0.05 and at 0.25 each
        stream(1, 1.0, 0.9, [(0.05, 1)]),  # late first token
        lost(2, 2.0, "rejected"),
        stream(3, 5.0, 0.1, [(0.1, 4)]),
    ]
    result = summarize_run(info(), records).result
    assert (result.requests, result.completed, result.rejected, result.failed) == (4, 3, 1, 0)
    assert result.ttft_violation_ratio == 2 / 4
    assert result.itl_violation_ratio == 2 / 9
    # Second 0: the slow tokens; 1: the late first token; 2: the refusal; 5: all in time.
    assert result.violating_seconds_ratio == 3 / 4


def test_a_client_with_a_promise_of_its_own_is_held_against_that():
    records = [stream(0, 0.0, 0.9, [(0.3, 1)], slo=Slo(ttft_s=1.0, itl_s=0.5)), stream(1, 0.0, 0.4, [])]
    result = summarize_run(info(), records).result
    assert (result.ttft_violation_ratio, result.itl_violation_ratio, result.violating_seconds_ratio) == (0, 0, 0)


def test_single_responses_have_no_first_token_of_their_own():
    result = summarize_run(info(), [stream(0, 0.0, 5.0, [], protocol="http_infer")]).result
    assert result.completed == 1
    assert result.ttft_violation_ratio is None and result.ttft_p50_s is None


def test_united_share_is_weighted_by_tokens():
    records = [stream(0, 0, 0.1, [(0.1, 19)], united_share=0.5), stream(1, 0, 0.1, [(0.1, 79)], united_share=0.0)]
    assert summarize_run(info(), records).result.united_share == pytest.approx(0.5 * 30 / 120)


@pytest.mark.parametrize(("late_s", "valid"), [(0.049, True), (0.051, False)])
def test_a_run_whose_generator_was_late_is_invalid(late_s, valid):
    records = [stream(i, float(i), 0.2, [], start_s=100 + i + late_s) for i in range(5)]
    summary = summarize_run(info(), records)
    assert summary.generator_lateness_p99_s == pytest.approx(late_s)
    assert summary.valid is valid


def test_a_run_that_was_stopped_early_is_invalid():
    summary = summarize_run(info(), [stream(0, 0.0, 0.2, [])])
    assert not summary.valid
    assert why_invalid(summary) == "only 1 of 5 planned requests were sent"


def test_an_empty_run_has_no_figures_and_is_plain_json(tmp_path):
    summary = summarize_run(info(), [])
    path = tmp_path / "run.jsonl"
    write_run(path, summary, [])
    assert msgspec.json.decode(summary_path(path).read_bytes(), type=RunSummary) == summary
    assert json.loads(summary_path(path).read_text())["result"]["itl_p99_s"] is None


def samples(*thresholds: float) -> list[Sample]:
    """One a second from 100 s on."""
    return [Sample(time_s=100.0 + i, threshold_prefill=1, threshold_decode=v) for i, v in enumerate(thresholds)]


def test_recovery_runs_to_the_first_lasting_return():
    course = samples(1, 0.5, 0.5, 1, 1, 0.9, 1, 1, 1, 1, 1, 1, 0.8)
    assert recovery_s(course, burst_end_s=102.0) == 4.0
    assert recovery_s(samples(*[1.0] * 9), burst_end_s=102.5) == 0.0
    assert recovery_s(samples(1, 0.5, 0.5, 0.5), burst_end_s=101.0) is None
    assert recovery_s([], burst_end_s=1.0) is None


def test_mean_over_time_weighs_by_duration():
    course = [Sample(time_s=0, threshold_decode=1.0), Sample(time_s=1), Sample(time_s=3, threshold_decode=0.0)]
    course.append(Sample(time_s=4, threshold_decode=0.0))
    assert mean_over_time(course, "threshold_decode") == pytest.approx(3 / 4)
    assert mean_over_time(course, "active_slots") is None


def test_telemetry_reads_the_metrics_page():
    page = """# TYPE moe_requests_waiting gauge
moe_requests_waiting{model="moe_llm",version="1"} 3
moe_requests_waiting{model="moe_llm_infer",version="1"} 2
# TYPE moe_brownout_threshold gauge
moe_brownout_threshold{model="moe_llm",phase="decode",version="1"} 0.4
# TYPE nv_gpu_power_usage gauge
nv_gpu_power_usage 3
"""
    assert parse_metrics(page, 7.0) == Sample(time_s=7.0, waiting=5, threshold_decode=0.4)
