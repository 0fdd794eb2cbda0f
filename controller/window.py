"""From statuses of the control plane to readings: counters are differenced over a window, per engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from backend.brownout.buckets import FIRST_S, NUM_BUCKETS, RATIO, quantile, share_above
from backend.brownout.queue_model import EngineLoad
from backend.brownout.step_model import StepSample
from backend.errors import ConfigError
from controller.laws import Limits
from controller.reading import EngineReading, Reading


@dataclass
class _Engine:
    """One start of one engine process."""

    identity: tuple[int, int]
    #: (time_s, telemetry) with bucket counts as arrays, oldest first.
    past: deque[tuple[float, dict]] = field(default_factory=deque)
    num_steps_seen: int = 0


class Window:
    """Keeps a window's worth of snapshots and makes a Reading of each new one."""

    def __init__(self, window_s: float, limits: Limits) -> None:
        self._window_s, self._limits = window_s, limits
        self._engines: dict[int, _Engine] = {}

    def clear(self) -> None:
        self._engines.clear()

    def add(self, status: Mapping) -> Reading | None:
        """The reading that a status completes; None while an engine is not known well enough, or there is none.

        Raises ConfigError if the server counts latencies in other buckets.
        """
        if status["buckets"] != {"first_s": FIRST_S, "ratio": RATIO, "count": NUM_BUCKETS}:
            raise ConfigError(
                "the server counts latencies in other buckets: controller and server must be of one version"
            )
        telemetry = status["telemetry"]
        engines = [self._add(entry, status["time_s"]) for entry in telemetry]
        if not engines or None in engines:
            return None
        ttft = sum(self._served(entry["engine"], "ttft_counts") for entry in telemetry)
        itl = sum(self._served(entry["engine"], "itl_counts") for entry in telemetry)
        return Reading(
            time_s=status["time_s"],
            age_s=max(0.0, status["time_s"] - min(entry["time_s"] for entry in telemetry)),
            ttft_p90_s=quantile(ttft, 0.9),
            itl_p90_s=quantile(itl, 0.9),
            ttft_violation_ratio=share_above(ttft, self._limits.ttft_slo_s),
            itl_violation_ratio=share_above(itl, self._limits.itl_slo_s),
            threshold_prefill=max(entry["threshold_prefill"] for entry in telemetry),
            threshold_decode=max(entry["threshold_decode"] for entry in telemetry),
            engines=tuple(engines),
        )

    def _add(self, entry: Mapping, now_s: float) -> EngineReading | None:
        index, identity = entry["engine"], (entry["pid"], entry["generation"])
        engine = self._engines.get(index)
        # Counters or a clock that went back are another engine's, though the number of its process be the same.
        if (
            engine is None
            or engine.identity != identity
            or entry["num_steps"] < engine.num_steps_seen
            or now_s < engine.past[-1][0]
        ):
            engine = self._engines[index] = _Engine(identity, num_steps_seen=entry["num_steps"])
        row = {name: _padded(entry[name]) if name.endswith("_counts") else entry[name] for name in entry}
        engine.past.append((now_s, row))
        # The oldest kept snapshot is the youngest that is at least a window old.
        while len(engine.past) > 2 and engine.past[1][0] <= now_s - self._window_s:
            engine.past.popleft()
        if len(engine.past) < 2:
            return None
        num_new = entry["num_steps"] - engine.num_steps_seen
        engine.num_steps_seen = entry["num_steps"]
        first_s, first = engine.past[0]
        span_s = max(now_s - first_s, 1e-3)
        load = EngineLoad(
            running=entry["requests_running"],
            waiting=entry["requests_waiting"],
            waiting_tokens=entry["waiting_tokens"],
            oldest_waiting_s=entry["oldest_waiting_s"],
            kv_usage_ratio=entry["kv_usage_ratio"],
            max_batch_tokens=entry["max_batch_tokens"],
            max_running=entry["max_running"],
            mean_output_tokens=entry["mean_output_tokens"],
        )
        return EngineReading(
            load,
            (entry["requests"] - first["requests"]) / span_s,
            (entry["prompt_tokens"] - first["prompt_tokens"]) / span_s,
            tuple(StepSample(*step) for step in entry["steps"][-num_new:]) if num_new > 0 else (),
        )

    def _served(self, index: int, name: str) -> np.ndarray:
        past = self._engines[index].past
        return past[-1][1][name] - past[0][1][name]


def _padded(counts: list[int]) -> np.ndarray:
    return np.array(counts + [0] * (NUM_BUCKETS - len(counts)), np.int64)
