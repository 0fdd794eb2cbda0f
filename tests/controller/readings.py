"""Readings made by hand."""

from __future__ import annotations

from backend.brownout.queue_model import EngineLoad
from backend.brownout.step_model import StepSample
from controller.reading import EngineReading, Reading


def load(**changes: float) -> EngineLoad:
    values: dict = {
        "running": 8,
        "waiting": 0,
        "waiting_tokens": 0,
        "oldest_waiting_s": 0.0,
        "kv_usage_ratio": 0.3,
        "max_batch_tokens": 256,
        "max_running": 64,
        "mean_output_tokens": 50.0,
    }
    return EngineLoad(**{**values, **changes})


def reading(
    *,
    ttft_p90_s: float | None = None,
    itl_p90_s: float | None = None,
    steps: tuple[StepSample, ...] = (),
    requests_per_s: float = 0.0,
    prompt_tokens_per_s: float = 0.0,
    **changes: float,
) -> Reading:
    """One engine, with `changes` to its load."""
    engine = EngineReading(load(**changes), requests_per_s, prompt_tokens_per_s, steps)
    return Reading(0.0, 0.0, ttft_p90_s, itl_p90_s, None, None, 1.0, 1.0, (engine,))


def measured_steps(savable: float = 0.6, count: int = 300) -> tuple[StepSample, ...]:
    """Steps of an engine that follows the model exactly, at changing thresholds."""
    steps = []
    for i in range(count):
        prefill, decode, theta = (0, 64, 200, 17)[i % 4], (8, 1, 20, 3, 30)[i % 5], (1.0, 0.5, 0.2)[i % 3]
        dim = 1 - savable * (1 - theta)
        seconds = 0.004 + dim * (0.01 + 0.0002 * prefill + 0.0003 * decode)
        steps.append(StepSample(seconds, prefill, decode, theta, theta))
    return tuple(steps)
