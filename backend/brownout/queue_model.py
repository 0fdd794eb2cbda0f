"""When a waiting request gets its first token, by the step model: used to dim in time and to refuse what is too late."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from backend.brownout.step_model import Array, StepModel

#: With so much of the KV cache in use, a waiting request is taken to wait for a running one to end.
_KV_FULL = 0.95


@dataclass(frozen=True)
class EngineLoad:
    """What an engine has before it. Sizes in tokens unless the name says otherwise."""

    running: int
    waiting: int
    #: Known tokens that no step has computed yet, beyond one per decoding sequence.
    waiting_tokens: int
    oldest_waiting_s: float
    kv_usage_ratio: float
    max_batch_tokens: int
    max_running: int
    #: Of finished sequences lately; 0 while none has finished.
    mean_output_tokens: float

    @property
    def slots(self) -> int:
        """Sequences that can run at once: fewer than max_running if the KV cache is full."""
        full = self.waiting > 0 and self.running > 0 and self.kv_usage_ratio >= _KV_FULL
        return min(self.running, self.max_running) if full else self.max_running

    @property
    def full_step(self) -> tuple[float, int]:
        """Prefill and decode tokens of a step while all slots are taken, and a sequence starts whenever one finishes.

        Who waits for a slot waits for such steps, also if there are free ones now: those before it will have taken them.
        """
        decodes = max(1, min(self.slots, self.max_batch_tokens - 1))
        per_request = self.waiting_tokens / max(self.waiting, 1)
        started = per_request * decodes / max(self.mean_output_tokens, 1)
        return min(self.max_batch_tokens - decodes, started), decodes


def first_token_s(
    model: StepModel,
    load: EngineLoad,
    tokens: float,
    requests_ahead: float,
    theta_prefill: ArrayLike,
    theta_decode: ArrayLike,
) -> Array:
    """Seconds from now to the first token of a request at some place of the queue; thresholds broadcast.

    `tokens` are its own and those ahead of it that are still to be computed, `requests_ahead` those waiting before it. Two
    things may hold it up, prefill work and the wait for running sequences to finish; they overlap, so the longer one counts.
    """
    decodes = min(load.running, load.max_batch_tokens - 1)
    chunk = load.max_batch_tokens - decodes
    full_chunks, rest = divmod(max(tokens, 1), chunk)
    prefill = full_chunks * model.predict_s(chunk, decodes, theta_prefill, theta_decode)
    if rest:
        prefill = prefill + model.predict_s(rest, decodes, theta_prefill, theta_decode)
    to_finish = load.running + requests_ahead + 1 - load.slots
    if to_finish <= 0 or load.mean_output_tokens <= 0:
        return prefill
    beside, full = load.full_step
    step = model.predict_s(beside, full, theta_prefill, theta_decode)
    return np.maximum(prefill, to_finish * load.mean_output_tokens / full * step)
