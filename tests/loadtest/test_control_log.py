"""The controller's log gives the thresholds; telemetry gives the rest."""

from loadtest.control_log import control_log_path, read_course
from loadtest.results import telemetry_path
from loadtest.telemetry import Sample


def test_thresholds_are_those_in_force(tmp_path):
    records = tmp_path / "run.jsonl"
    telemetry_path(records).write_text('{"time_s": 2.0, "threshold_prefill": 1, "threshold_decode": 1, "waiting": 7}\n')
    assert read_course(records) == [Sample(time_s=2.0, threshold_prefill=1, threshold_decode=1, waiting=7)]
    decided, in_force = (
        '"threshold_prefill": 0.9, "threshold_decode": 0.6',
        '"threshold_prefill": 1, "threshold_decode": 1',
    )
    lines = [
        f'{{"time_s": 1.5, "mode": "control", {decided}, "reading": {{"time_s": 1.4, {in_force}}}, "terms": {{}}}}',
        '{"time_s": 0.5, "mode": "unreachable", "reading": null, "threshold_prefill": null, "threshold_decode": null}',
        f'{{"time_s": 3.5, "mode": "dry_run", {decided}, "reading": {{"time_s": 3.4, {in_force}}}}}',
        "[1]",
        '{"time_s": 4.5, "threshold_pre',
    ]
    control_log_path(records).write_text("\n".join(lines))
    assert read_course(records) == [
        Sample(time_s=1.5, threshold_prefill=0.9, threshold_decode=0.6),
        Sample(time_s=2.0, waiting=7),
        Sample(time_s=3.5, threshold_prefill=1, threshold_decode=1),
    ]


def test_a_run_without_either_has_no_course(tmp_path):
    assert read_course(tmp_path / "run.jsonl") == []
