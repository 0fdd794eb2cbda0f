"""The engine's end of the control block: settings are read between steps, telemetry is written after them."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterable

import numpy as np

from backend.brownout.block import MAX_ENGINES, MAX_LAYERS, MAX_STEPS, QUEUE, TELEMETRY, Block
from backend.brownout.buckets import bucket_of
from backend.brownout.control import SettingsReader
from backend.brownout.step_model import Slowed, StepModel, StepSample
from backend.engine.admission import QueueState
from backend.engine.concurrency import Concurrency
from backend.engine.engine import Engine, Event
from backend.engine.shedding import Margin, Pace
from backend.engine.speed import measure_steps
from backend.errors import ConfigError

log = logging.getLogger(__name__)

#: Telemetry is written this often at most, so that very short steps do not pay for it each time.
WRITE_PERIOD_S = 0.02
#: Slot usage reads the device.
_USAGE_PERIOD_S = 0.5
_SHED_PERIOD_S = 0.01
_HOLD_PERIOD_S = 0.1
#: The model remembers hundreds of steps, but how fast they go may change within a second, as others use the processors. So
#: its predictions are taken times the last steps' mean deviation from it: the weight of one step, and bounds.
_SLOWDOWN_SMOOTHING, _SLOWDOWN = 0.1, (0.5, 5.0)
#: Priority of an empty queue: whoever comes is the last in it.
_LEAST = -(2**62)


class EngineControl:
    """Follows the block's settings and keeps the engine's telemetry section."""

    def __init__(self, engine: Engine, block: Block, index: int, generation: int) -> None:
        if index >= MAX_ENGINES:
            raise ConfigError(f"parameter device must list at most {MAX_ENGINES} devices")
        self._engine, self._block, self._index = engine, block, index
        self._settings = SettingsReader(block)
        self._error = ""
        self._record = np.zeros(1, TELEMETRY)
        row = self._record[0]
        row["pid"], row["generation"] = os.getpid(), generation
        available = engine.available
        row["ways"] = sum(1 << (way % 64) for way in available.ways)
        row["similarity"], row["missing_experts"] = available.similarity, available.missing_experts
        row["resident"] = available.resident
        # Views of the record's arrays: writing through them is cheaper than by name each step.
        self._steps, self._prefill, self._decode = row["steps"], row["prefill_step_counts"], row["decode_step_counts"]
        self._ttft, self._itl = row["ttft_counts"], row["itl_counts"]
        self._num_steps = self._num_prefill = self._num_decode = 0
        self._max_gap_s = 0.0
        self._margin = Margin()
        self._model = StepModel()
        self._slowdown = 1.0
        config, most = engine.config, engine.scheduler.max_running
        self._concurrency = (
            None if config.hold_itl_s is None else Concurrency(config.hold_itl_s, most, config.max_batch_tokens)
        )
        self._learns = config.shed_ttft_s is not None or self._concurrency is not None
        self._next_write_s = self._next_usage_s = self._next_shed_s = self._next_hold_s = 0.0
        #: Of an engine that refuses nothing early.
        self._state = QueueState(generation, 0.0, 0.0, 0, 0, 0, False, math.inf, math.nan, Pace(1, 0, 0, 0, 1, 0))

    def learn_speed(self) -> None:
        """If requests may be refused early or held back, find out how long steps take: before there are any."""
        if self._learns:
            for step in measure_steps(self._engine):
                self._learn(step)

    def follow_settings(self) -> None:
        """Apply what has changed in the block; the new settings act in the next step."""
        settings = self._settings.changed()
        if self._settings.error != self._error:
            self._error = self._settings.error
            log.log(logging.ERROR if self._error else logging.INFO, "%s", self._error or "the block is readable again")
        if settings is None:
            return
        try:
            self._engine.set_settings(settings)
            self._record[0]["settings_error"] = b""
        except ConfigError as error:
            log.error("settings version %d cannot be followed: %s", settings.version, error)
            self._record[0]["settings_error"] = str(error).encode()[:255]
        self._next_write_s = 0.0

    def stepped(self, seconds: float) -> None:
        """A step with its handing out took so long."""
        counters, settings = self._engine.counters, self._engine.settings
        prefill, decode = counters.step_prefill_tokens, counters.step_decode_tokens
        if prefill + decode == 0:
            return
        self._steps[self._num_steps % MAX_STEPS] = (
            seconds,
            prefill,
            decode,
            settings.threshold_prefill,
            settings.threshold_decode,
        )
        if self._learns:
            self._learn(StepSample(seconds, prefill, decode, settings.threshold_prefill, settings.threshold_decode))
            self._hold()
        self._num_steps += 1
        self._num_prefill += prefill
        self._num_decode += decode
        counts = self._prefill if prefill else self._decode
        counts[bucket_of(seconds)] += 1

    def _learn(self, step: StepSample) -> None:
        if self._model.ready:
            expected_s = float(self._model.predict_s(*step.inputs))
            ratio = min(max(step.seconds / max(expected_s, 1e-6), _SLOWDOWN[0]), _SLOWDOWN[1])
            self._slowdown += _SLOWDOWN_SMOOTHING * (ratio - self._slowdown)
        self._model.update(step)

    def _hold(self) -> None:
        """Let as many run at once as get their tokens in time, if that is configured and the engine's speed is known."""
        now = time.monotonic()
        if self._concurrency is None or not self._model.ready or now < self._next_hold_s:
            return
        self._next_hold_s = now + _HOLD_PERIOD_S
        counters = self._engine.counters
        lengths = counters.mean_prompt_tokens, counters.mean_output_tokens
        self._engine.scheduler.limit = self._concurrency.update(self._present_model(), *lengths, *self._deepest())

    def _present_model(self) -> Slowed:
        return Slowed(self._model, self._slowdown)

    def _deepest(self) -> tuple[float, float]:
        """Thresholds for prefill and decode: the present ones, or the lowest that the controller may choose."""
        settings, floor = self._engine.settings, self._settings.floor
        return min(settings.threshold_prefill, floor), min(settings.threshold_decode, floor)

    def shed(self) -> list[Event]:
        """End requests that come too late, if that is configured and the engine's speed is known."""
        limit_s, now = self._engine.config.shed_ttft_s, time.monotonic()
        if limit_s is None or not self._model.ready or now < self._next_shed_s:
            return []
        self._next_shed_s = now + _SHED_PERIOD_S
        return self._engine.shed(self._present_model(), limit_s, self._settings.floor, self._margin.share)

    def announce(self, seen_s: float) -> None:
        """Tell the stubs how the queue stands: before a step, and when there is nothing left to do.

        `seen_s` is the arrival of the latest request that has come.
        """
        engine, limit_s = self._engine, self._engine.config.shed_ttft_s
        requests = engine.requests
        request_s = requests.request_s
        state = self._state._replace(
            seen_s=seen_s, waiting=len(requests.waiting), request_s=math.nan if request_s is None else request_s
        )
        if limit_s is None or not self._model.ready:
            state = state._replace(pace=state.pace._replace(free=engine.scheduler.num_free))
        else:
            load, settings, now = engine.load(), engine.settings, time.monotonic()
            thetas = settings.threshold_prefill, settings.threshold_decode
            model = self._present_model()
            pace = Pace.of(model, load, *self._deepest())
            prefill = min(pace.chunk, load.waiting_tokens - (0 if pace.free > 0 else requests.waiting_tokens))
            step_s = float(model.predict_s(prefill, load.running, *thetas)) if engine.has_work else 0.0
            state = state._replace(
                ready_s=now + step_s,
                tokens=load.waiting_tokens - prefill,
                max_priority=max((priority for priority, _ in requests.waiting_classes), default=_LEAST),
                any_auto=any(auto for _, auto in requests.waiting_classes),
                allowed_s=limit_s * (1 - self._margin.share),
                pace=pace,
            )
        self._block.write_queue(self._index, np.array([state], QUEUE))

    def served(self, ttft_s: Iterable[float], gaps: Iterable[tuple[float, int]]) -> None:
        """Latencies of responses handed to Triton: first ones, and gaps with the tokens that came with each."""
        limit_s = self._engine.config.shed_ttft_s
        for seconds in ttft_s:
            self._ttft[bucket_of(seconds)] += 1
            if limit_s is not None:
                self._margin.served(late=seconds > limit_s)
        for gap_s, tokens in gaps:
            self._itl[bucket_of(gap_s / tokens)] += tokens
            self._max_gap_s = max(self._max_gap_s, gap_s)

    def publish(self) -> None:
        """Write the section, if it is time."""
        now = time.monotonic()
        if now < self._next_write_s:
            return
        self._next_write_s = now + WRITE_PERIOD_S
        self.write()

    def write(self) -> None:
        """Write the section now."""
        now = time.monotonic()
        engine, row = self._engine, self._record[0]
        load, counters, settings = engine.load(), engine.counters, engine.settings
        row["time_s"] = now
        row["settings_version"] = settings.version
        row["threshold_prefill"], row["threshold_decode"] = settings.threshold_prefill, settings.threshold_decode
        row["num_steps"] = self._num_steps
        row["prefill_tokens"], row["decode_tokens"] = self._num_prefill, self._num_decode
        row["requests"], row["prompt_tokens"] = counters.requests, counters.prompt_tokens
        row["sequences_finished"], row["requests_shed"] = counters.sequences_finished, counters.requests_shed
        row["preemptions"] = engine.scheduler.num_preemptions
        row["mean_output_tokens"] = counters.mean_output_tokens
        row["requests_running"], row["requests_waiting"] = load.running, load.waiting
        row["waiting_tokens"], row["oldest_waiting_s"] = load.waiting_tokens, load.oldest_waiting_s
        row["kv_usage_ratio"] = load.kv_usage_ratio
        row["max_batch_tokens"], row["max_running"] = load.max_batch_tokens, load.max_running
        row["max_gap_s"] = self._max_gap_s
        experts = engine.expert_telemetry()
        row["resident_share"] = experts.resident_share
        row["expert_misses"], row["expert_stalls"] = experts.misses, experts.stalls
        row["expert_stall_s"], row["expert_bytes_moved"] = experts.stall_s, experts.bytes_moved
        row["expert_warm"], row["expert_loading"], row["expert_cold"] = experts.warm, experts.loading, experts.cold
        row["expert_loads"], row["expert_failures"] = experts.loads, experts.failures
        row["expert_evictions"], row["expert_refusals"] = experts.evictions, experts.refusals
        row["expert_slot_byte_s"] = experts.slot_byte_s
        row["expert_always_on_byte_s"] = experts.always_on_byte_s
        row["expert_prefetches"], row["expert_prefetch_hits"] = experts.prefetches, experts.prefetch_hits
        row["expert_workers"], row["expert_layers_redone"] = experts.workers, experts.redone
        row["expert_workers_lost"], row["expert_workers_relieved"] = experts.workers_lost, experts.workers_relieved
        row["expert_plan_changes"], row["expert_bytes_exchanged"] = experts.plan_changes, experts.bytes_exchanged
        if now >= self._next_usage_s and engine.has_work:
            self._next_usage_s = now + _USAGE_PERIOD_S
            stats = engine.stats()
            slots = stats.active_slots_by_layer[:MAX_LAYERS]
            row["num_layers"] = len(slots)
            row["active_slots"][: len(slots)] = slots
            row["assignments_per_token"], row["united_share"] = stats.assignments_per_token, stats.united_share
        self._block.write_telemetry(self._index, self._record)
