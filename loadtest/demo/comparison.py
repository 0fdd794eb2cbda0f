"""The two runs side by side: a table for the terminal and summary.json."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from rich import box
from rich.table import Table

from loadtest.demo.burst import Ground
from loadtest.options import ms, percent
from loadtest.quality import Quality
from loadtest.results import RunSummary


class Comparison(msgspec.Struct, kw_only=True):
    """What the demo found. Rates in requests per second; `on` with the quality that its thresholds cost."""

    ground: Ground
    base_rps: float
    burst_rps: float
    off: RunSummary
    on: RunSummary
    quality: Quality | None

    @property
    def valid(self) -> bool:
        """Both runs sent all requests in time, and none failed."""
        return all(run.valid and not run.result.failed for run in (self.off, self.on))

    def summary(self) -> dict[str, object]:
        """Content of summary.json."""
        return {
            "capacity_rps": self.ground.capacity_rps,
            "base_rps": self.base_rps,
            "burst_rps": self.burst_rps,
            "slo": msgspec.to_builtins(self.ground.slo),
            "arrivals_sha256": self.off.run.arrivals_sha256,
            "generator_lateness_p99_s": max(self.off.generator_lateness_p99_s, self.on.generator_lateness_p99_s),
            "off": msgspec.to_builtins(self.off.result),
            "on": msgspec.to_builtins(self.on.result),
            "quality": msgspec.to_builtins(self.quality) if self.quality else None,
        }

    def table(self) -> Table:
        slo = self.ground.slo
        table = Table(box=box.SIMPLE_HEAD, title="The same arrivals, brownout off and on")
        table.add_column("")
        for column in ("off", "on", "change"):
            table.add_column(column, justify="right", no_wrap=True)
        rows: list[tuple[str, str, Callable[[float | None], str], bool]] = [
            (f"requests whose first token took over {ms(slo.ttft_s)}", "ttft_violation_ratio", percent, True),
            (f"tokens that took over {ms(slo.itl_s)}", "itl_violation_ratio", percent, True),
            ("seconds in which either promise was broken", "violating_seconds_ratio", percent, True),
            ("first token, p99", "ttft_p99_s", ms, True),
            ("between tokens, p99", "itl_p99_s", ms, True),
            ("output tokens per second", "output_tokens_per_s", lambda v: f"{v:.0f}", True),
            ("requests completed", "completed", str, False),
            ("requests rejected", "rejected", str, False),
            ("requests failed", "failed", str, False),
            ("mean threshold, prefill", "mean_threshold_prefill", _two_places, False),
            ("mean threshold, decode", "mean_threshold_decode", _two_places, False),
            ("share of the work that united experts did", "united_share", percent, False),
        ]
        for title, name, text, compared in rows:
            off, on = getattr(self.off.result, name), getattr(self.on.result, name)
            change = f"{on / off - 1:+.0%}" if compared and off and on is not None else ""
            table.add_row(title, text(off), text(on), change)
        if self.quality:
            table.add_row("quality lost, mean over tokens", "0.0%", f"{self.quality.mean_loss_percent:.1f}%", "")
        if self.off.run.bursts:
            table.add_row("full quality again after the burst", "", _seconds(self.on.result.recovery_s), "")
        return table


def _two_places(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f} s"
