"""A recorded run and its course over time, as the charts need it. Times here are seconds from the run's start."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from backend.brownout.profile import Profile
from backend.errors import ConfigError
from loadtest.control_log import read_course
from loadtest.quality import curve_of_run, quality_of_run, read_run_profile
from loadtest.record import RequestRecord, Slo, read_records, weighted_percentile
from loadtest.results import Latency, RunSummary, itl_latencies, summary_path, ttft_latencies
from loadtest.telemetry import Sample, with_thresholds

#: (times, values) of a line; rates and readings hold from their time until the next.
Line = tuple[list[float], list[float]]
#: Windows are 2 s long as in BrownoutServe, or longer where a run would have more than so many.
_MIN_WINDOW_S = 2.0
_MAX_WINDOWS = 150


class RunData:
    """Everything known about one run."""

    def __init__(
        self,
        name: str,
        summary: RunSummary,
        records: Sequence[RequestRecord],
        samples: Sequence[Sample] = (),
        profile: Profile | None = None,
    ) -> None:
        """`profile` tells the quality lost over time."""
        self.name = name
        self.summary = summary
        self._start_s = summary.run.started_monotonic_s
        self._records = records
        self._samples = samples
        self._profile = profile
        self.quality = quality_of_run(records, samples, profile) if profile else None
        ends = [r.end_s - self._start_s for r in records if r.end_s is not None]
        self.length_s = max([summary.run.duration_s, *ends])
        self.window_s = max(_MIN_WINDOW_S, summary.run.duration_s / _MAX_WINDOWS)

    @property
    def slo(self) -> Slo:
        return self.summary.run.slo

    def arrivals(self) -> Line:
        """Requests per second, by intended start."""
        return self._rate(((r.intended_start_s, 1) for r in self._records), self.summary.run.duration_s)

    def lost(self) -> Line:
        """Rejected and failed requests per second, by intended start."""
        lost = ((r.intended_start_s, r.outcome != "completed") for r in self._records)
        return self._rate(lost, self.summary.run.duration_s)

    def throughput(self) -> Line:
        """Output tokens per second, by arrival."""
        return self._rate((response for r in self._records for response in r.responses), self.length_s)

    def first_token_s(self, percent: float) -> Line:
        """Percentile of the times to the first token, by intended start; inf where too many never got one."""
        return self._percentile(ttft_latencies(self._records), percent)

    def between_tokens_s(self, percent: float) -> Line:
        """Percentile of inter-token latencies, by arrival."""
        return self._percentile(itl_latencies(self._records), percent)

    def telemetry(self, name: str) -> Line:
        """A field of the server's readings, as far as it is known, while the run lasted."""
        known = [s for s in self._while_running() if getattr(s, name) is not None]
        return [s.time_s - self._start_s for s in known], [getattr(s, name) for s in known]

    def quality_loss(self) -> Line:
        """Loss in percent at the thresholds of each reading; nothing without a profile."""
        if self._profile is None:
            return [], []
        curve = curve_of_run(self._samples, self._profile)
        known = with_thresholds(self._while_running())
        return [s.time_s - self._start_s for s in known], [
            curve.losses(s.threshold_prefill, s.threshold_decode)[curve.measure] for s in known
        ]

    def _while_running(self) -> list[Sample]:
        return [s for s in self._samples if -1 <= s.time_s - self._start_s <= self.length_s + 1]

    def _window(self, at_s: float) -> int:
        return int((at_s - self._start_s) // self.window_s)

    def _rate(self, events: Iterable[tuple[float, int]], length_s: float) -> Line:
        """Events (time, weight) per second in windows over `length_s`, from each window's start; the last may be short."""
        edges = np.append(np.arange(0.0, length_s, self.window_s), length_s)
        times, weights = np.array([(at_s - self._start_s, weight) for at_s, weight in events] or [(0.0, 0)]).T
        counts, _ = np.histogram(np.clip(times, 0.0, length_s), edges, weights=weights)
        rates = counts / np.diff(edges)
        return edges.tolist(), [*rates.tolist(), float(rates[-1])]

    def _percentile(self, latencies: Sequence[Latency], percent: float) -> Line:
        windows: dict[int, list[tuple[float, int]]] = defaultdict(list)
        for x in latencies:
            windows[self._window(x.at_s)].append((x.seconds, x.count))
        numbers = sorted(windows)
        middles = [(n + 0.5) * self.window_s for n in numbers]
        return middles, [weighted_percentile(windows[n], percent) for n in numbers]


def load_run(text: str, profile: Path | None = None) -> RunData:
    """A run named on the command line: [NAME=]PATH of its records, or of a folder with the records of one run.

    What dimming cost in quality follows from `profile`, or from the profile in the run's folder.

    Raises:
        ConfigError: nothing usable is there; the message says what is missing.
    """
    name, _, location = ("", "", text) if Path(text).exists() else text.rpartition("=")
    path = _records_file(Path(location))
    try:
        summary = msgspec.json.decode(summary_path(path).read_bytes(), type=RunSummary)
        records = read_records(path)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"run {path}: its records or what lies beside them ({path.stem}.*) are unusable: {error}"
        ) from None
    return RunData(name or summary.run.name, summary, records, read_course(path), read_run_profile(path, profile))


def _records_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    suffix = ".summary.json"
    found = sorted(path.glob(f"*{suffix}"))
    if len(found) != 1:
        raise ConfigError(f"run {path}: the folder has {len(found)} files *{suffix}; name the records file of one run")
    return found[0].with_name(found[0].name.removesuffix(suffix) + ".jsonl")


def common(runs: Sequence[RunData], of: Callable[[RunData], object]) -> bool:
    """Whether all runs agree on something."""
    return len({repr(of(run)) for run in runs}) == 1
