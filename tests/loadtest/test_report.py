"""The report stands alone, says what the records say, and says so when they cannot be trusted."""

import itertools
import re

import msgspec
import pytest

from backend.brownout.profile import Level, Profile, write_profile
from loadtest.record import RequestRecord, Slo
from loadtest.report.__main__ import main
from loadtest.report.run_data import load_run
from loadtest.report.words import verdict, warnings
from loadtest.results import RunInfo, summarize_run, telemetry_path, write_run
from loadtest.telemetry import Sample


def write(folder, name: str, ttft_s: float, sha: str = "ab", late_s: float = 0.0, lost: int = 0):
    """A run of 30 requests, one a second, with telemetry; the records' path."""
    records = []
    for i in range(30):
        start = 50.0 + i
        responses = [(start + ttft_s + 0.05 * j, 1) for j in range(5)]
        record = RequestRecord(id=i, protocol="http_stream", intended_start_s=start, start_s=start + late_s)
        if i < lost:
            record.outcome = "rejected"
        else:
            record.responses, record.end_s, record.output_tokens = responses, responses[-1][0], 5
            record.united_share = 0.25
        records.append(record)
    info = RunInfo(
        name=name,
        arrivals="step:base=1",
        seed=0,
        arrivals_sha256=sha * 32,
        slo=Slo(ttft_s=0.5, itl_s=0.1),
        started_monotonic_s=50.0,
        started_at="2030-01-01T00:00:00+00:00",
        duration_s=30.0,
        planned_requests=30,
        bursts=[(10.0, 20.0)],
    )
    path = folder / f"{name}.jsonl"
    samples = [
        Sample(time_s=50.0 + i, threshold_prefill=1, threshold_decode=0.5, active_slots=9, waiting=i, united_share=0.3)
        for i in range(30)
    ]
    write_run(path, summarize_run(info, records, samples), records)
    telemetry_path(path).write_bytes(b"".join(msgspec.json.encode(sample) + b"\n" for sample in samples))
    return path


def test_a_page_of_two_runs_stands_alone(tmp_path, capsys):
    slow, quick = write(tmp_path, "off", 0.9, lost=3), write(tmp_path, "on", 0.2)
    assert main([f"dark<1>={slow}", str(quick), "--output", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "report.html" in capsys.readouterr().out
    # Nothing is fetched: no scripts, and no addresses but names of XML dialects and places in the page itself.
    assert "<script" not in page and "<link" not in page and "@import" not in page
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', page.replace("xlink:", ""))
    assert "dark&lt;1&gt;" in page and "dark<1>" not in page
    assert "100.0% of requests with “dark&lt;1&gt;”, 0.0% with “on”: 100% fewer" in page
    assert "Turned away: 3 of 30" in page and "Take care" not in page
    assert "<span>100.0% → </span>0.0%" in page
    assert "“dark&lt;1&gt;” and “on” dimmed while it was needed." in page
    pictures = {path.stem for path in (tmp_path / "report").glob("*.png")}
    assert {"arrivals", "first_token", "between_tokens", "violations", "thresholds", "lost", "throughput"} <= pictures
    assert page.count("<svg ") == len(pictures)


def test_runs_that_do_not_compare_are_warned_about(tmp_path):
    runs = [load_run(str(write(tmp_path, "a", 0.2, late_s=0.1))), load_run(str(write(tmp_path, "b", 0.2, sha="cd")))]
    late, different = warnings(runs)
    assert "“a” is invalid: the load generator started requests 100 ms late" in late
    assert "The runs did not get the same requests" in different
    assert warnings(runs[1:]) == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["off", "on"], "100% fewer broken promises with “on” than with “off”"),
        (["on", "off"], "“on” broke no promise"),
        (["off"], "At least 0.0% of requests"),
    ],
)
def test_the_verdict_follows_from_the_figures(tmp_path, names, expected):
    paths = {"off": write(tmp_path, "off", 0.9), "on": write(tmp_path, "on", 0.2)}
    assert verdict([load_run(str(paths[name])) for name in names]).startswith(expected)


def test_a_folder_names_its_only_run(tmp_path):
    write(tmp_path, "only", 0.2)
    assert load_run(str(tmp_path)).name == "only"
    assert load_run(f"other={tmp_path}").name == "other"


def test_the_price_in_quality_is_said_and_drawn(tmp_path):
    """From a profile beside the run."""
    path = write(tmp_path, "on", 0.2)
    assert main([str(path), "--output", str(tmp_path / "without")]) == 0
    assert "answers lost" not in (tmp_path / "without" / "report.html").read_text()
    assert not (tmp_path / "without" / "quality.png").exists()
    levels = (Level("united", 0, 1.0, 1.0, 0.0, 9, 4, 1.0), Level("united", 8, 0.0, 0.0, 3.0, 9, 4, 0.7))
    write_profile(tmp_path / "brownout-profile.json", Profile("ck", "f" * 32, 32, "letter", levels))
    assert main([str(path), "--output", str(tmp_path / "report")]) == 0
    assert "1.5% of right multiple-choice answers lost" in (tmp_path / "report" / "report.html").read_text()
    assert (tmp_path / "report" / "quality.png").is_file()


def test_rates_hold_every_request_and_token(tmp_path):
    run = load_run(str(write(tmp_path, "run", 0.2, lost=4)))
    for (times, rates), total in [(run.arrivals(), 30), (run.lost(), 4), (run.throughput(), 26 * 5)]:
        widths = [b - a for a, b in itertools.pairwise(times)]
        assert sum(rate * width for rate, width in zip(rates, widths, strict=False)) == pytest.approx(total)
        assert times[0] == 0 and min(widths) > 0


@pytest.mark.parametrize("make", ["nothing", "two"])
def test_what_is_no_run_is_named(tmp_path, capsys, make):
    if make == "two":
        write(tmp_path, "a", 0.2)
        write(tmp_path, "b", 0.2)
    target = tmp_path if make == "two" else tmp_path / "absent.jsonl"
    assert main([str(target)]) == 1
    assert str(target) in capsys.readouterr().err
