"""What the server did during a run: its thresholds, active slots and queue, read from Triton's metrics port."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from backend.errors import ConfigError

#: The server writes its metrics once a second; reading twice as often loses nothing of that.
PERIOD_S = 0.5

#: Full quality has to last this long to count as restored.
HOLD_S = 5.0

_FIELDS = {
    "moe_requests_running": "running",
    "moe_requests_waiting": "waiting",
    "moe_kv_cache_usage_ratio": "kv_usage",
    "moe_active_slots": "active_slots",
    "moe_united_assignment_ratio": "united_share",
}


class Sample(msgspec.Struct, kw_only=True):
    """One reading; None is unknown. time_s is time.monotonic."""

    time_s: float
    threshold_prefill: float | None = None
    threshold_decode: float | None = None
    #: What is done below the thresholds, as a controller's log says.
    mechanism: str | None = None
    way: int | None = None
    active_slots: float | None = None
    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    united_share: float | None = None


def parse_metrics(text: str, time_s: float) -> Sample:
    """A reading of Triton's metrics page, summed over models."""
    sample = Sample(time_s=time_s)
    for family in text_string_to_metric_families(text):
        for point in family.samples:
            name = _FIELDS.get(point.name)
            if name:
                setattr(sample, name, (getattr(sample, name) or 0.0) + point.value)
            elif point.name == "moe_brownout_threshold":
                setattr(sample, f"threshold_{point.labels['phase']}", point.value)
    return sample


async def record_telemetry(metrics: str, path: Path) -> None:
    """Append a reading of HOST:PORT to a file of JSON lines every PERIOD_S, until cancelled; an unreadable page is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    timeout = aiohttp.ClientTimeout(total=5)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        with open(path, "wb") as file:
            while True:
                now = time.monotonic()
                try:
                    async with session.get(f"http://{metrics}/metrics") as response:
                        sample = parse_metrics(await response.text(), now)
                except (aiohttp.ClientError, TimeoutError, OSError):
                    pass
                else:
                    file.write(msgspec.json.encode(sample) + b"\n")
                    file.flush()
                await asyncio.sleep(max(0.0, now + PERIOD_S - time.monotonic()))


def read_telemetry(path: Path) -> list[Sample]:
    """Readings of a file, by time; none if there is no file. Raises ConfigError for a line that is no reading."""
    if not path.is_file():
        return []
    samples = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            samples.append(msgspec.json.decode(line, type=Sample))
        except msgspec.DecodeError as error:
            raise ConfigError(f"telemetry {path}, line {number}: {error}") from None
    return sorted(samples, key=lambda sample: sample.time_s)


def mean_over_time(samples: Sequence[Sample], name: str) -> float | None:
    """Mean of a field, each reading holding until the next; None without two readings."""
    known = [(s.time_s, getattr(s, name)) for s in samples if getattr(s, name) is not None]
    span = known[-1][0] - known[0][0] if known else 0.0
    if span <= 0:
        return None
    return sum(value * (then - now) for (now, value), (then, _) in itertools.pairwise(known)) / span


def with_thresholds(samples: Sequence[Sample]) -> list[Sample]:
    """The readings that know both thresholds."""
    return [s for s in samples if s.threshold_prefill is not None and s.threshold_decode is not None]


def recovery_s(samples: Sequence[Sample], burst_end_s: float) -> float | None:
    """Seconds from a burst's end until both thresholds are back at 1 for at least HOLD_S; None if unknown or never."""
    known = with_thresholds(samples)
    dimmed = [s.time_s for s in known if s.threshold_prefill < 1 or s.threshold_decode < 1]
    # The reading in force at the burst's end comes first: it may be at full quality already.
    begin = max((i for i, s in enumerate(known) if s.time_s <= burst_end_s), default=0)
    for s in known[begin:]:
        from_s = max(s.time_s, burst_end_s)
        if from_s + HOLD_S <= known[-1].time_s and not any(s.time_s <= t <= from_s + HOLD_S for t in dimmed):
            return from_s - burst_end_s
    return None
