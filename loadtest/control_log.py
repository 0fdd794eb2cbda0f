"""The course of a run on the server's side: telemetry readings, and the controller's event log where there is one.

The log is JSON lines. Of each line the time (`time_s`, monotonic) and the thresholds are used: those decided on if the
controller was in charge (`mode` is `control`), else those in force (`reading`). Lines without are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from loadtest.results import telemetry_path
from loadtest.telemetry import Sample, read_telemetry

_THRESHOLDS = ("threshold_prefill", "threshold_decode")


def control_log_path(records_path: Path) -> Path:
    return records_path.with_suffix(".control.jsonl")


def read_control_log(path: Path) -> list[Sample]:
    """The thresholds that a controller set, by time; none if there is no log. A half-written last line is passed over."""
    if not path.is_file():
        return []
    samples = []
    for line in path.read_bytes().splitlines():
        try:
            row = msgspec.json.decode(line)
        except msgspec.DecodeError:
            continue
        if isinstance(row, dict):
            source = row if row.get("mode", "control") == "control" else row.get("reading") or {}
            time_s, *thresholds = _number(row, "time_s"), *(_number(source, name) for name in _THRESHOLDS)
            if time_s is not None and None not in thresholds:
                how = {name: row.get(name) for name in ("mechanism", "way")}
                samples.append(Sample(time_s=time_s, **dict(zip(_THRESHOLDS, thresholds, strict=True)), **how))
    return sorted(samples, key=lambda sample: sample.time_s)


def read_course(records_path: Path) -> list[Sample]:
    """What lies beside a run's records: telemetry, with thresholds from the controller's log if it has any.

    The log knows a change at once, the server's metrics only after up to a second.
    """
    telemetry, log = read_telemetry(telemetry_path(records_path)), read_control_log(control_log_path(records_path))
    if not log:
        return telemetry
    return sorted([*_without_thresholds(telemetry), *log], key=lambda sample: sample.time_s)


def _without_thresholds(samples: Sequence[Sample]) -> list[Sample]:
    return [msgspec.structs.replace(sample, threshold_prefill=None, threshold_decode=None) for sample in samples]


def _number(row: Mapping, name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else None
