"""Latencies follow the project's one definition; summaries and files keep them."""

import math

import pytest

from loadtest.record import RequestRecord, read_records, summarize, weighted_percentile, write_records


def make(number=0, **overrides) -> RequestRecord:
    values = {
        "id": number,
        "protocol": "http_stream",
        "intended_start_s": 10.0,
        "start_s": 10.5,
        "responses": [(11.0, 1), (11.3, 3), (12.3, 2)],
        "end_s": 12.3,
        "input_tokens": 4,
        "output_tokens": 6,
    }
    return RequestRecord(**{**values, **overrides})


def test_first_token_counts_from_the_intended_start():
    assert make().ttft_s == pytest.approx(1.0)
    assert make(responses=[]).ttft_s is None


def test_a_response_with_m_tokens_counts_as_m_latencies():
    assert make().inter_token_latencies() == [(pytest.approx(0.1), 3), (pytest.approx(0.5), 2)]
    assert make().max_gap_s == pytest.approx(1.0)


def test_weighted_percentile_counts_weights():
    values = [(0.1, 98), (5.0, 1), (9.0, 1)]
    assert weighted_percentile(values, 50) == 0.1
    assert weighted_percentile(values, 99) == 5.0
    assert weighted_percentile(values, 100) == 9.0
    assert math.isnan(weighted_percentile([], 50))


def test_summary_counts_outcomes_and_throughput():
    records = [make(0), make(1, outcome="failed", responses=[], end_s=None, output_tokens=0, error="gone")]
    summary = summarize(records)
    assert (summary.requests, summary.completed, summary.failed, summary.rejected) == (2, 1, 1, 0)
    assert summary.output_tokens_per_s == pytest.approx(6 / 1.8)
    assert summary.itl_p50_s == pytest.approx(0.1)


def test_records_survive_a_file(tmp_path):
    records = [make(0), make(1, text="é\n", error="x")]
    write_records(tmp_path / "runs" / "records.jsonl", records)
    assert read_records(tmp_path / "runs" / "records.jsonl") == records
