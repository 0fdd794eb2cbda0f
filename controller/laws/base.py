"""The contract of a control law."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from controller.reading import Reading


@dataclass(frozen=True)
class Limits:
    """What a law must keep: the latency objectives in seconds, and how far it may dim."""

    ttft_slo_s: float
    itl_slo_s: float
    min_threshold_prefill: float = 0.0
    min_threshold_decode: float = 0.0


@dataclass(frozen=True)
class Decision:
    """Thresholds to put in force, and the numbers that led to them, for the log."""

    threshold_prefill: float
    threshold_decode: float
    terms: dict[str, float | str | None] = field(default_factory=dict)


class Law(ABC):
    """Holds its own thresholds; `resume` sets them, after a restart of either side, to those in force."""

    #: Seconds over which a reading's latencies are to be taken.
    window_s = 2.0

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.threshold_prefill = 1.0
        self.threshold_decode = 1.0

    def resume(self, threshold_prefill: float, threshold_decode: float) -> None:
        """Start from these thresholds, within the limits; what the law knows of the past becomes worthless."""
        self.threshold_prefill = min(1.0, max(self.limits.min_threshold_prefill, threshold_prefill))
        self.threshold_decode = min(1.0, max(self.limits.min_threshold_decode, threshold_decode))

    @abstractmethod
    def update(self, reading: Reading | None, dt_s: float) -> Decision:
        """The thresholds from now on; `dt_s` since the last call. Without a reading they stay as they are."""

    def _decision(self, **terms: float | str | None) -> Decision:
        return Decision(self.threshold_prefill, self.threshold_decode, terms)
