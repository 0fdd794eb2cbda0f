"""What a control law sees: the engines' state now and their latencies over the last window."""

from __future__ import annotations

import msgspec

from backend.brownout.queue_model import EngineLoad
from backend.brownout.step_model import StepSample


class EngineReading(msgspec.Struct, frozen=True):
    """One engine."""

    load: EngineLoad
    #: Arrivals over the window, per second.
    requests_per_s: float
    prompt_tokens_per_s: float
    #: Steps since the reading before.
    steps: tuple[StepSample, ...]


class Reading(msgspec.Struct, frozen=True):
    """All engines. A latency is None when nothing was served in the window: unknown, not zero."""

    #: The server's monotonic clock, and how old the oldest engine's part is.
    time_s: float
    age_s: float
    ttft_p90_s: float | None
    itl_p90_s: float | None
    ttft_violation_ratio: float | None
    itl_violation_ratio: float | None
    #: In force in the engines.
    threshold_prefill: float
    threshold_decode: float
    engines: tuple[EngineReading, ...]
