"""Goodput under overload: what counts as good, and the whole measurement against a real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.overload import is_good, main, median_goodput, result_of
from loadtest.record import RequestRecord, Slo

SLO = Slo(ttft_s=0.5, itl_s=0.1)


def served(at_s: float, ttft_s: float = 0.2, itl_s: float = 0.05) -> RequestRecord:
    first_s = at_s + ttft_s
    responses = [(first_s, 1), (first_s + 2 * itl_s, 2), (first_s + 4 * itl_s, 2)]
    return RequestRecord(
        id=0,
        protocol="http_stream",
        intended_start_s=at_s,
        start_s=at_s,
        responses=responses,
        end_s=responses[-1][0],
    )


def refused(at_s: float, after_s: float) -> RequestRecord:
    record = RequestRecord(id=0, protocol="http_stream", intended_start_s=at_s, start_s=at_s, outcome="rejected")
    record.error_s = at_s + after_s
    return record


def test_good_is_completed_with_both_latencies_kept() -> None:
    assert is_good(served(0), SLO)
    assert not is_good(served(0, ttft_s=0.6), SLO)
    assert not is_good(served(0, itl_s=0.11), SLO)
    assert not is_good(refused(0, 0.01), SLO)


def test_a_load_is_summed_up_and_what_came_after_it_is_recovery() -> None:
    records = [served(100), refused(101, 0.02), refused(102, 0.06), served(103, ttft_s=2.0), served(104)]
    records += [served(110), refused(111.5, 0.01), served(113)]
    result = result_of(records, SLO, 3.0, 1.0, end_s=110.0)
    assert (result.requests, result.completed, result.rejected, result.failed) == (5, 3, 2, 0)
    assert result.goodput_rps == pytest.approx(0.2)
    assert (result.refusal_p50_s, result.refusal_max_s) == (pytest.approx(0.04), pytest.approx(0.06))
    assert result.recovery_s == pytest.approx(1.5)


def test_a_load_counts_by_the_median_of_its_rounds() -> None:
    results = [
        result_of([served(100 + number / 10) for number in range(count)], SLO, load, 1.0, 110.0, round_)
        for round_, counts in enumerate([(10, 40), (30, 20), (20, 30)], 1)
        for load, count in zip((1.0, 3.0), counts, strict=True)
    ]
    assert [result.round for result in results] == [1, 1, 2, 2, 3, 3]
    assert median_goodput(results) == {1.0: pytest.approx(2.0), 3.0: pytest.approx(3.0)}


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(1200)
def test_far_beyond_capacity_the_service_stays_useful(tmp_path: Path) -> None:
    """Goodput at three times the capacity, refusals at once, every request ended once, and soon all is well again."""
    file = tmp_path / "overload.json"
    assert main(["--output", str(tmp_path), "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["goodput_of_last_load_to_best"] >= 0.9
    for load in result["loads"]:
        assert load["failed"] == 0
        assert load["completed"] + load["rejected"] == load["requests"]
        assert load["refusal_p99_s"] is None or load["refusal_p99_s"] < 0.1
    far_beyond = [load for load in result["loads"] if load["load"] == 3]
    assert len(far_beyond) == 3
    for load in far_beyond:
        assert load["seconds"] >= 59
        assert load["rejected"] > load["requests"] / 3
        assert load["recovery_s"] < 10
