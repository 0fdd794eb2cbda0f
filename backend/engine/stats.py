"""What an engine tells about itself."""

from __future__ import annotations

from dataclasses import dataclass

_SMOOTHING = 0.05


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start and gauges of now."""

    num_steps: int
    num_preemptions: int
    prefix_hit_tokens: int
    requests_running: int
    requests_waiting: int
    kv_usage_ratio: float
    settings_version: int
    #: Of the last step, per MoE layer and per token.
    active_slots: float
    assignments_per_token: float
    active_slots_by_layer: list[int]
    #: Share of the last step's assignments that united experts (or whatever replaces experts) served.
    united_share: float


@dataclass
class EngineCounters:
    """Totals since the start, and what the last step computed; plain numbers, cheap to read after every step."""

    requests: int = 0
    prompt_tokens: int = 0
    sequences_finished: int = 0
    requests_shed: int = 0
    #: Of sequences that ended by themselves, smoothed over the last some 20; 0 before the first.
    mean_output_tokens: float = 0.0
    #: Of these, the prompt tokens that were computed: without those found in the prefix cache.
    mean_prompt_tokens: float = 0.0
    #: Tokens of the last call of `step`; both 0 if it had nothing to compute.
    step_prefill_tokens: int = 0
    step_decode_tokens: int = 0

    def finished(self, num_prompt: int, num_output: int) -> None:
        """Count a sequence that has ended by itself after so many tokens, and so many computed ones of its prompt."""
        self.sequences_finished += 1
        weight = max(_SMOOTHING, 1 / self.sequences_finished)
        self.mean_prompt_tokens += weight * (num_prompt - self.mean_prompt_tokens)
        self.mean_output_tokens += weight * (num_output - self.mean_output_tokens)
