"""The engine: schedule, run, sample, emit. On a GPU the next step is scheduled and launched while one runs.

    engine = Engine(EngineConfig(checkpoint="dummy:cpu-s"))
    engine.add(Request("a", [1, 2, 3], SamplingParams(max_tokens=8)))
    while engine.has_work:
        for event in engine.step():
            print(event)

`backend.engine.llm.LLM` adds text in and text out.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from backend.brownout.queue_model import EngineLoad
from backend.brownout.settings import Available, Settings
from backend.brownout.step_model import Slowed, StepModel
from backend.config import EngineConfig
from backend.engine.admission import too_late
from backend.engine.block_manager import BlockManager
from backend.engine.model_runner import ModelRunner, resolve_async_scheduling
from backend.engine.penalties import SampleRow
from backend.engine.prompt import check_prompt
from backend.engine.request import FINISH_LENGTH, FINISH_STOP, Request, RequestEnded, Sequence, TokenOutput, timed_out
from backend.engine.request_book import RequestBook
from backend.engine.sampler import Sampled, Sampling
from backend.engine.scheduler import Schedule, Scheduler
from backend.engine.shedding import Pace, Waiting, late_requests
from backend.engine.stats import EngineCounters, EngineStats
from backend.experts.telemetry import ExpertTelemetry
from backend.kernels.transfer import HostCopy

Event = TokenOutput | RequestEnded


@dataclass
class _Step:
    """A step that has been launched, and what is to be read of it when the device has done it."""

    schedule: Schedule
    #: Sequences that get a token, in the order of the tokens, and the tokens; None if there are none.
    ready: list[Sequence]
    sampling: Sampling | None
    #: For each token class whether experts were replaced.
    browned: tuple[bool, ...]
    #: The tokens if there are some, then the replaced assignments [T] if there may be some.
    values: HostCopy


class Engine:
    """Continuous batching over one model. Not thread-safe: one thread calls everything.

    Each request ends in exactly one of: its last TokenOutput (every sequence has a finish_reason), one RequestEnded, or the
    caller's own `abort`, after which nothing more is said about it.
    """

    def __init__(self, config: EngineConfig, device: str | None = None) -> None:
        self.config = config
        self.runner = ModelRunner(config, config.devices[0] if device is None else device)
        self.max_model_len = self.runner.max_model_len
        self.vocab_size = self.runner.model.config.vocab_size
        self.eos_token_ids = tuple(self.runner.model.config.eos_token_ids)
        self.settings = Settings()
        #: Assignments of one token in all layers.
        model_config = self.runner.model.config
        self._assignments = max(1, sum(model_config.moe_layers)) * model_config.top_k
        #: Whether a step is launched before the tokens of the one before it are known.
        self.overlap = resolve_async_scheduling(config, self.runner.device)
        self._begin_anew()

    def _begin_anew(self) -> None:
        config = self.config
        self._united_share = 0.0
        self.blocks = BlockManager(self.runner.num_blocks, config.block_size)
        self.scheduler = Scheduler(self.blocks, config.max_batch_tokens, config.max_running)
        self.counters = EngineCounters()
        self._requests = RequestBook(config.max_waiting)
        self._num_steps = 0
        self._ahead: _Step | None = None
        self._started_s = time.monotonic()

    def reset(self) -> None:
        """Forget silently every request, what they left in the prefix cache, and all counts; settings stay."""
        self.runner.forget_steps()
        self._begin_anew()

    def close(self) -> None:
        """End what runs beside the engine: expert workers."""
        self.runner.close()

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def is_active(self, request_id: object) -> bool:
        """Whether the request has been added and has not ended."""
        return request_id in self._requests

    @property
    def has_room(self) -> bool:
        """Whether `add` would take one more request."""
        return self._requests.has_room

    def check(self, request: Request) -> None:
        """Raise InvalidRequestError unless this engine can serve the request."""
        check_prompt(request.prompt_ids, self.max_model_len, self.vocab_size)
        self._requests.check_new(request)

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequestError, or UnavailableError when max_waiting requests already wait."""
        self.check(request)
        self._requests.add(request)
        self.counters.requests += 1
        self.counters.prompt_tokens += len(request.prompt_ids)
        self.scheduler.add(request.sequences[0])

    def abort(self, request_id: object, index: int | None = None) -> None:
        """End a request at once and silently, or one of its sequences, which has come to a stop string.

        Unknown ids are ignored: it may have just ended.
        """
        request = self._requests.get(request_id)
        if request is None:
            return
        for sequence in request.sequences if index is None else request.sequences[index : index + 1]:
            if index is not None and not sequence.finished:
                self._count_finished(sequence)
            self._remove(sequence, "abort")
        self._end_if_finished(request)

    def set_settings(self, settings: Settings) -> None:
        """Change the brownout settings; they act in the next step.

        Raises ConfigError, and the old ones stay in force, if they need united experts or similarities that are not loaded.
        """
        self.runner.apply(settings)
        self.settings = settings

    @property
    def available(self) -> Available:
        """Brownout settings that this engine's model can follow."""
        return self.runner.available

    def load(self) -> EngineLoad:
        """What is before the engine now."""
        waiting_tokens = self._requests.waiting_tokens
        for sequence in self.scheduler.running:
            waiting_tokens += max(0, sequence.num_prompt - sequence.num_computed)
        return EngineLoad(
            running=len(self.scheduler.running),
            waiting=len(self._requests.waiting),
            waiting_tokens=waiting_tokens,
            oldest_waiting_s=self._requests.oldest_waiting_s,
            kv_usage_ratio=self.blocks.num_in_use / self.blocks.num_blocks,
            max_batch_tokens=self.config.max_batch_tokens,
            max_running=self.scheduler.limit,
            mean_output_tokens=self.counters.mean_output_tokens,
        )

    @property
    def requests(self) -> RequestBook:
        """Those that have not ended, to look at."""
        return self._requests

    def count_refused(self, prompt_tokens: Collection[int]) -> None:
        """Count requests with so many prompt tokens each that were refused early before they came here."""
        self.counters.requests += len(prompt_tokens)
        self.counters.prompt_tokens += sum(prompt_tokens)
        self.counters.requests_shed += len(prompt_tokens)

    def shed(self, model: StepModel | Slowed, limit_s: float, floor: float = 1.0, margin: float = 0.0) -> list[Event]:
        """End requests that have come since the last call and cannot get their first token within `limit_s` of arriving.

        They are judged at the present thresholds or, if it is lower, at `floor`: what dimming may still save is not refused.
        Which ones, and what `margin` is: `shedding.late_requests`.
        """
        if all(request.accepted for request in self._requests.waiting.values()):
            return []
        now, load, settings = time.monotonic(), self.load(), self.settings
        pace = Pace.of(model, load, min(settings.threshold_prefill, floor), min(settings.threshold_decode, floor))
        queue = sorted(self._requests.waiting.values(), key=lambda request: (request.sort_key, request.number))
        started_tokens = load.waiting_tokens - self._requests.waiting_tokens
        refusals = late_requests(pace, started_tokens, [Waiting.of(request, now) for request in queue], limit_s, margin)
        for request in queue:
            request.accepted = True
        for refusal in refusals:
            self.abort(refusal.request_id)
            self.counters.requests_shed += 1
        return [
            RequestEnded(refusal.request_id, "rejected", too_late(refusal.expected_s, limit_s)) for refusal in refusals
        ]

    def step(self) -> list[Event]:
        """Compute one batch and return what happened. Without work that can run, returns only expired requests."""
        events: list[Event] = self._expire()
        step, self._ahead = self._ahead, None
        if step is None or all(sequence.finished for sequence in step.schedule.sequences):
            step = self._begin()
        schedule = Schedule() if step is None else step.schedule
        self.counters.step_decode_tokens = schedule.num_decodes
        self.counters.step_prefill_tokens = sum(schedule.num_tokens) - schedule.num_decodes
        if step is not None:
            ahead = self._launch_ahead(step)
            self._finish(step, events)
            if ahead is not None:
                self._book(ahead.schedule.unfinished(), ahead.browned)
                self._ahead = ahead
            self._num_steps += 1
        return events

    def _begin(self) -> _Step | None:
        """Schedule, launch and book a step when all tokens so far are known."""
        schedule = self.scheduler.schedule()
        if not schedule:
            return None
        logits = self.runner.run(schedule)
        self._book(schedule, self.runner.browned_classes)
        return self._sample(schedule, logits)

    def _launch_ahead(self, step: _Step) -> _Step | None:
        """Launch the step after `step`, which is booked and may still run; None if its tokens must be known for that.

        A sequence that ends with a token that nobody foresaw has a row too many in the step ahead, which is left out when
        that one is finished. Its keys and values go to blocks that may have been handed out again, but before anything that
        is launched later writes there.
        """
        if not self.overlap or any(_reads_output(s.request.params) for s in step.ready):
            return None
        schedule = self.scheduler.schedule_ahead(step.ready, self._ends_by_length)
        if schedule is None:
            return None
        tokens = None if step.sampling is None else step.sampling.tokens
        return self._sample(schedule, self.runner.run(schedule, tokens))

    def _sample(self, schedule: Schedule, logits: Tensor) -> _Step:
        """Go on with the logits of a step that has just been launched: begin to choose tokens."""
        ready, num_unknown = schedule.ready(), len(schedule.previous_rows or ())
        rows = [self._sample_row(sequence, entry < num_unknown) for entry, sequence in enumerate(ready)]
        sampling = Sampling(logits, rows) if ready else None
        browned = self.runner.browned_classes
        values = [] if sampling is None else [sampling.packed]
        if any(browned):
            values.append(self.runner.replaced)
        return _Step(schedule, ready, sampling, browned, HostCopy(self.runner.device, *values))

    def _finish(self, step: _Step, events: list[Event]) -> None:
        """Wait for a step, also for one without tokens, and say what its tokens lead to."""
        values = iter(step.values.numpy())
        results = step.sampling.results(next(values)) if step.sampling is not None else []
        self._count_replaced(step.schedule, next(values, None))
        for sequence, sampled in zip(step.ready, results, strict=True):
            if not sequence.finished:
                events.append(self._emit(sequence, sampled))

    def _count_finished(self, sequence: Sequence) -> None:
        self.counters.finished(max(0, sequence.num_prompt - sequence.num_reused), sequence.num_output)

    def stats(self) -> EngineStats:
        """For occasional telemetry: it reads the device."""
        active_slots, assignments_per_token = self.runner.model.slot_usage()
        return EngineStats(
            num_steps=self._num_steps,
            num_preemptions=self.scheduler.num_preemptions,
            prefix_hit_tokens=self.blocks.num_hit_tokens,
            requests_running=len(self._requests) - len(self._requests.waiting),
            requests_waiting=len(self._requests.waiting),
            kv_usage_ratio=self.blocks.num_in_use / self.blocks.num_blocks,
            settings_version=self.settings.version,
            active_slots=sum(active_slots) / max(1, len(active_slots)),
            assignments_per_token=assignments_per_token,
            active_slots_by_layer=active_slots,
            united_share=self._united_share,
        )

    def expert_telemetry(self) -> ExpertTelemetry:
        """What the expert pool has done since the start; cheap."""
        model = self.runner.model
        if model.pool is not None:
            return model.pool.telemetry()
        byte_s = model.resident_bytes() * (time.monotonic() - self._started_s)
        warm = sum(block.expert_map.num_resident for block in model.moe_blocks)
        return ExpertTelemetry(warm=warm, slot_byte_s=byte_s, always_on_byte_s=byte_s)

    def _book(self, schedule: Schedule, browned: tuple[bool, ...]) -> None:
        """Record what is computed once the device has come so far; all tokens that go into it are known.

        `browned`: for each token class whether experts were replaced.
        """
        # With a threshold below 1 a token counts as touched, whether or not one of its experts was replaced.
        pristine = None
        if any(browned):
            pairs = zip(schedule.sequences, schedule.num_tokens, strict=True)
            pristine = [not browned[sequence.token_class(count)] for sequence, count in pairs]
        self.scheduler.computed(schedule, pristine)
        # Beyond its prompt a sequence has been here with no more than that.
        for sequence in [s for s in schedule.sequences if s.num_computed <= s.num_prompt]:
            request = sequence.request
            self._requests.started(request)
            if sequence.prompt_computed and not request.siblings_started:
                request.siblings_started = True
                for sibling in request.sequences[1:]:
                    if not sibling.finished:
                        self.scheduler.add(sibling)

    def _count_replaced(self, schedule: Schedule, by_token: np.ndarray | None) -> None:
        """Record how many assignments [T] brownout replaced in a step; None: none."""
        if by_token is None:
            self._united_share = 0.0
            return
        starts = np.cumsum([0, *schedule.num_tokens[:-1]])
        replaced = np.add.reduceat(by_token, starts).tolist()
        for sequence, num_replaced in zip(schedule.sequences, replaced, strict=True):
            sequence.num_replaced += num_replaced
        self._united_share = sum(replaced) / (sum(schedule.num_tokens) * self._assignments)

    def _ends_by_length(self, sequence: Sequence) -> bool:
        """Whether the next token is the last one, whatever it is."""
        known = len(sequence.tokens) + 1
        return known - sequence.num_prompt >= sequence.request.params.max_tokens or known >= self.max_model_len

    def _sample_row(self, sequence: Sequence, ahead: bool) -> SampleRow:
        """`ahead`: a token before this one is not known yet."""
        params = sequence.request.params
        position = len(sequence.tokens) + ahead - sequence.num_prompt
        return SampleRow(
            params,
            sequence.seed,
            position,
            sequence.request.prompt_ids,
            sequence.tokens[sequence.num_prompt :] if _reads_output(params) else (),
            self.eos_token_ids if position < params.min_tokens else (),
        )

    def _emit(self, sequence: Sequence, sampled: Sampled) -> Event:
        request, params = sequence.request, sequence.request.params
        if sampled.error is not None:
            self.abort(request.request_id)
            return RequestEnded(request.request_id, "failed", sampled.error)
        token = sampled.token_id
        sequence.tokens.append(token)
        united_share = sequence.num_replaced / (sequence.num_run * self._assignments) if sequence.num_replaced else 0.0
        reason = None
        if (token in self.eos_token_ids and not params.ignore_eos) or token in params.stop_token_ids:
            reason = FINISH_STOP
        elif sequence.num_output >= params.max_tokens or len(sequence.tokens) >= self.max_model_len:
            reason = FINISH_LENGTH
        if reason is not None:
            self._count_finished(sequence)
            self._remove(sequence, reason)
            self._end_if_finished(request)
        return TokenOutput(
            request.request_id, sequence.index, token, reason, sampled.logprob, sampled.rank, sampled.top, united_share
        )

    def _remove(self, sequence: Sequence, reason: str) -> None:
        """Finish a sequence, also one that has not reached the scheduler yet."""
        if sequence.index == 0 or sequence.request.siblings_started:
            self.scheduler.remove(sequence, reason)
        elif not sequence.finished:
            sequence.finish_reason = reason

    def _end_if_finished(self, request: Request) -> None:
        if request.finished:
            self._requests.ended(request)

    def _expire(self) -> list[Event]:
        """End requests whose timeout has passed."""
        events: list[Event] = []
        for request in self._requests.expired():
            self.abort(request.request_id)
            events.append(RequestEnded(request.request_id, "timeout", timed_out(request.params.timeout_s)))
        return events


def _reads_output(params) -> bool:
    """Whether the sampler needs the tokens made so far."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
