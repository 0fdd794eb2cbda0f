"""summary.json has the agreed form, and the verdict counts what was lost."""

import json

import msgspec
import pytest
from rich.console import Console

from loadtest.demo.burst import Ground
from loadtest.demo.comparison import Comparison
from loadtest.quality import Quality
from loadtest.record import RequestRecord, Slo
from loadtest.results import RunInfo, RunSummary, summarize_run

SLO = Slo(ttft_s=0.5, itl_s=0.1)


def _run(name: str, ttft_s: float, outcome: str = "completed", planned: int = 4) -> RunSummary:
    info = RunInfo(
        name=name, arrivals="step:base=1", seed=0, arrivals_sha256="abc", slo=SLO, started_monotonic_s=0.0,
        started_at="", duration_s=4.0, planned_requests=planned, bursts=[(1.0, 2.0)],
    )  # fmt: skip
    records = [
        RequestRecord(
            id=i, protocol="http_stream", intended_start_s=float(i), start_s=float(i), outcome=outcome,
            responses=[(i + ttft_s, 1), (i + ttft_s + 0.05, 1)], end_s=i + ttft_s + 0.05, output_tokens=2,
        )
        for i in range(4)
    ]  # fmt: skip
    return summarize_run(info, records)


def _comparison(on: RunSummary) -> Comparison:
    return Comparison(
        ground=Ground(10.0, 1000.0, SLO), base_rps=7.0, burst_rps=14.0, off=_run("off", 0.9), on=on,
        quality=Quality(mean_loss_percent=1.25, max_loss_percent=4.0, measure="letter"),
    )  # fmt: skip


def test_the_summary_is_as_documented():
    summary = json.loads(json.dumps(_comparison(_run("on", 0.1)).summary()))
    assert set(summary) == {
        "capacity_rps", "base_rps", "burst_rps", "slo", "arrivals_sha256", "generator_lateness_p99_s", "off", "on", "quality",
    }  # fmt: skip
    assert summary["slo"] == {"ttft_s": 0.5, "itl_s": 0.1}
    assert summary["off"]["ttft_violation_ratio"] == 1.0 and summary["on"]["ttft_violation_ratio"] == 0.0
    assert {"requests", "completed", "rejected", "failed", "recovery_s", "united_share"} <= set(summary["on"])
    assert summary["quality"]["mean_loss_percent"] == 1.25 and summary["quality"]["measure"] == "letter"


@pytest.mark.parametrize(
    ("on", "valid"),
    [(_run("on", 0.1), True), (_run("on", 0.1, "rejected"), True), (_run("on", 0.1, "failed"), False), (_run("on", 0.1, planned=5), False)],
)  # fmt: skip
def test_a_failed_or_cut_off_run_is_not_valid(on, valid):
    assert _comparison(on).valid is valid


def test_the_table_says_how_much_fewer():
    console = Console(width=120, record=True)
    console.print(_comparison(_run("on", 0.1)).table())
    text = console.export_text()
    assert "-100%" in text and "1.2%" in text and "never" in text
    assert msgspec.to_builtins(_comparison(_run("on", 0.1)).off)["run"]["name"] == "off"
