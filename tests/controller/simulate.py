"""A queueing model of one engine under a control law: continuous batching in simulated time.

Same scheduling rule as the engine (running sequences first, chunked prefill under one token budget), with step times from a
formula that the laws do not know: weights are read once per active slot, and slots saturate with the step's tokens.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from backend.brownout.queue_model import EngineLoad
from backend.brownout.step_model import StepModel, StepSample
from backend.engine.concurrency import Concurrency
from backend.engine.shedding import Margin, Pace, Waiting, late_requests
from backend.engine.stats import EngineCounters
from controller.laws import Decision, Law
from controller.reading import EngineReading, Reading


@dataclass(frozen=True)
class Job:
    """A request: when it comes, and its tokens."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Plant:
    """The simulated engine. Times in seconds; `savable` is the share of expert work that full dimming saves."""

    base_s: float = 0.004
    slots_s: float = 0.016
    #: Tokens at which 63 % of the slots are active.
    slots_tokens: float = 12.0
    prefill_token_s: float = 0.0002
    decode_token_s: float = 0.0003
    savable: float = 0.6
    #: Standard deviation of the logarithm of a step's time.
    noise: float = 0.05
    max_batch_tokens: int = 256
    max_running: int = 64

    def step_s(self, prefill: int, decode: int, theta_prefill: float, theta_decode: float) -> float:
        """Seconds of a step without noise."""
        tokens = prefill + decode
        theta = (prefill * theta_prefill + decode * theta_decode) / max(tokens, 1)
        slots = self.slots_s * (1 - math.exp(-tokens / self.slots_tokens)) * self._share(theta)
        work = prefill * self.prefill_token_s * self._share(theta_prefill)
        work += decode * self.decode_token_s * self._share(theta_decode)
        return self.base_s + slots + work

    def _share(self, theta: float) -> float:
        return 1 - self.savable * (1 - theta)

    def capacity_rps(self, prompt_tokens: float, output_tokens: float, itl_s: float) -> float:
        """Requests per second at full quality at which steps settle at `itl_s`."""
        spare = itl_s - self.base_s - self.slots_s
        return spare / itl_s / (prompt_tokens * self.prefill_token_s + output_tokens * self.decode_token_s)


@dataclass
class _Live:
    job: Job
    prompt_left: int
    output: int = 0
    first_s: float = 0.0
    accepted: bool = False


@dataclass
class Outcome:
    """What came of a run; latencies as the product defines them."""

    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    #: Of requests that ended: when, TTFT, mean inter-token latency.
    finished: list[tuple[float, float, float]] = field(default_factory=list)
    #: How long refused requests had waited.
    refused_after_s: list[float] = field(default_factory=list)
    decisions: list[tuple[float, Decision]] = field(default_factory=list)
    #: Threshold in force by token.
    thetas: list[tuple[float, int]] = field(default_factory=list)

    def goodput_rps(self, ttft_slo_s: float, itl_slo_s: float, span_s: float) -> float:
        """Requests per second that finished with TTFT and mean inter-token latency within the objectives."""
        return sum(ttft <= ttft_slo_s and itl <= itl_slo_s for _, ttft, itl in self.finished) / span_s

    @property
    def mean_theta(self) -> float:
        """Over all tokens."""
        values, tokens = np.array(self.thetas).T
        return float(values @ tokens / tokens.sum())

    def violations(self, ttft_slo_s: float, itl_slo_s: float) -> tuple[float, float]:
        """Shares of requests and of tokens beyond the objectives."""
        return (
            float(np.mean(np.array(self.ttft_s) > ttft_slo_s)),
            float(np.mean(np.array(self.itl_s) > itl_slo_s)),
        )


class Simulation:
    """Runs jobs through a plant under a law that is asked every `period_s`."""

    def __init__(
        self,
        plant: Plant,
        law: Law,
        *,
        period_s: float = 0.25,
        shed_ttft_s: float | None = None,
        hold_itl_s: float | None = None,
        seed: int = 0,
    ) -> None:
        """`shed_ttft_s`, `hold_itl_s`: refuse early and hold back as the engine does with these parameters."""
        self._plant, self._law, self._period_s, self._shed_ttft_s = plant, law, period_s, shed_ttft_s
        self._limit, self._counters = plant.max_running, EngineCounters()
        self._concurrency = None
        if hold_itl_s is not None:
            self._concurrency = Concurrency(hold_itl_s, plant.max_running, plant.max_batch_tokens)
        self._model, self._margin = StepModel(), Margin()
        self._random = np.random.default_rng(seed)
        self._waiting: deque[_Live] = deque()
        self._running: list[_Live] = []
        self._theta = (1.0, 1.0)
        self._steps: list[StepSample] = []
        #: (time, seconds) of first tokens and gaps, (time, prompt tokens) of arrivals, within the law's window.
        self._ttft: deque[tuple[float, float]] = deque()
        self._itl: deque[tuple[float, float]] = deque()
        self._arrivals: deque[tuple[float, int]] = deque()

    def run(self, jobs: Sequence[Job], end_s: float) -> Outcome:
        """Until `end_s`; what has not ended by then is left out."""
        outcome = Outcome()
        coming = deque(sorted(jobs, key=lambda job: job.arrival_s))
        now, next_control, next_hold = 0.0, self._period_s, 0.0
        while now < end_s:
            while coming and coming[0].arrival_s <= now:
                job = coming.popleft()
                self._waiting.append(_Live(job, job.prompt_tokens))
                self._arrivals.append((job.arrival_s, job.prompt_tokens))
            if self._waiting and self._shed_ttft_s is not None and self._model.ready:
                self._shed(now, self._shed_ttft_s, outcome)
            if self._waiting or self._running:
                now = self._step(now, outcome)
            else:
                now = min([next_control, end_s] + [job.arrival_s for job in list(coming)[:1]])
            if self._concurrency is not None and self._model.ready and now >= next_hold:
                self._hold(self._concurrency)
                next_hold = now + 0.1
            if now >= next_control:
                decision = self._law.update(self._reading(now), self._period_s)
                self._theta = (decision.threshold_prefill, decision.threshold_decode)
                outcome.decisions.append((now, decision))
                next_control = now + self._period_s
        return outcome

    def _hold(self, concurrency: Concurrency) -> None:
        lengths = self._counters.mean_prompt_tokens, self._counters.mean_output_tokens
        self._limit = concurrency.update(self._model, *lengths, *self._deepest())

    def _deepest(self) -> tuple[float, float]:
        limits = self._law.limits
        return min(self._theta[0], limits.min_threshold_prefill), min(self._theta[1], limits.min_threshold_decode)

    def _shed(self, now: float, limit_s: float, outcome: Outcome) -> None:
        queue = [
            Waiting(live, now - live.job.arrival_s, live.prompt_left, accepted=live.accepted) for live in self._waiting
        ]
        started = sum(live.prompt_left for live in self._running)
        pace = Pace.of(self._model, self._load(now), *self._deepest())
        refusals = late_requests(pace, started, queue, limit_s, self._margin.share)
        for live in self._waiting:
            live.accepted = True
        for refusal in refusals:
            self._waiting.remove(refusal.request_id)
            outcome.refused_after_s.append(now - refusal.request_id.job.arrival_s)

    def _step(self, now: float, outcome: Outcome) -> float:
        plant, (theta_prefill, theta_decode) = self._plant, self._theta
        decoding = [live for live in self._running if live.prompt_left == 0]
        budget = plant.max_batch_tokens - len(decoding)
        chunks: list[tuple[_Live, int]] = []
        prefilling = [live for live in self._running if live.prompt_left > 0]
        while budget > 0:
            if prefilling:
                live = prefilling.pop(0)
            elif self._waiting and len(self._running) < self._limit:
                live = self._waiting.popleft()
                self._running.append(live)
            else:
                break
            count = min(live.prompt_left, budget)
            budget -= count
            chunks.append((live, count))
        prefill, decode = sum(count for _, count in chunks), len(decoding)
        noise = math.exp(self._random.normal(0.0, plant.noise))
        seconds = plant.step_s(prefill, decode, theta_prefill, theta_decode) * noise
        sample = StepSample(seconds, prefill, decode, theta_prefill, theta_decode)
        self._steps.append(sample)
        self._model.update(sample)
        outcome.thetas += [(theta_prefill, prefill), (theta_decode, decode)]
        end = now + seconds
        for live in decoding:
            live.output += 1
            self._itl.append((end, seconds))
            outcome.itl_s.append(seconds)
        for live, count in chunks:
            live.prompt_left -= count
            if live.prompt_left == 0:
                live.output, live.first_s = 1, end
                self._ttft.append((end, end - live.job.arrival_s))
                outcome.ttft_s.append(end - live.job.arrival_s)
                if self._shed_ttft_s is not None:
                    self._margin.served(late=outcome.ttft_s[-1] > self._shed_ttft_s)
        for live in [live for live in self._running if live.output >= live.job.output_tokens]:
            self._running.remove(live)
            gaps_s = (end - live.first_s) / max(live.output - 1, 1)
            outcome.finished.append((end, live.first_s - live.job.arrival_s, gaps_s))
            self._counters.finished(live.job.prompt_tokens, live.output)
        return end

    def _reading(self, now: float) -> Reading:
        law = self._law
        for series in (self._ttft, self._itl, self._arrivals):
            while series and series[0][0] < now - law.window_s:
                series.popleft()
        ttft, itl = np.array([s for _, s in self._ttft]), np.array([s for _, s in self._itl])
        steps, self._steps = tuple(self._steps), []
        window_s = min(now, law.window_s)
        tokens = sum(count for _, count in self._arrivals)
        return Reading(
            time_s=now,
            age_s=0.0,
            ttft_p90_s=float(np.quantile(ttft, 0.9)) if len(ttft) else None,
            itl_p90_s=float(np.quantile(itl, 0.9)) if len(itl) else None,
            ttft_violation_ratio=float(np.mean(ttft > law.limits.ttft_slo_s)) if len(ttft) else None,
            itl_violation_ratio=float(np.mean(itl > law.limits.itl_slo_s)) if len(itl) else None,
            threshold_prefill=self._theta[0],
            threshold_decode=self._theta[1],
            engines=(EngineReading(self._load(now), len(self._arrivals) / window_s, tokens / window_s, steps),),
        )

    def _load(self, now: float) -> EngineLoad:
        return EngineLoad(
            running=len(self._running),
            waiting=len(self._waiting),
            waiting_tokens=sum(live.prompt_left for live in (*self._waiting, *self._running)),
            oldest_waiting_s=now - self._waiting[0].job.arrival_s if self._waiting else 0.0,
            kv_usage_ratio=0.5,
            max_batch_tokens=self._plant.max_batch_tokens,
            max_running=self._limit,
            mean_output_tokens=self._counters.mean_output_tokens,
        )


def poisson_jobs(
    rate: Callable[[float], float],
    end_s: float,
    *,
    max_rate: float,
    prompt_tokens: int,
    output_tokens: int,
    seed: int = 0,
) -> list[Job]:
    """Arrivals of a Poisson process whose rate per second changes with time (thinning); lengths are geometric."""
    random = np.random.default_rng(seed)
    jobs, now = [], 0.0
    while (now := now + random.exponential(1 / max_rate)) < end_s:
        if random.random() * max_rate < rate(now):
            prompt = 1 + int(random.geometric(1 / prompt_tokens))
            jobs.append(Job(now, prompt, 1 + int(random.geometric(1 / output_tokens))))
    return jobs


def step_rate(base: float, end_s: float) -> Callable[[float], float]:
    """The paper's load: the rate doubles in the middle third."""
    return lambda t: base * (2 if end_s / 3 <= t < 2 * end_s / 3 else 1)


def spike_rate(base: float, end_s: float) -> Callable[[float], float]:
    """Short bursts of 2.5 times the rate, one every 20 s."""
    return lambda t: base * (2.5 if t % 20 >= 15 else 1)


def diurnal_rate(base: float, end_s: float) -> Callable[[float], float]:
    """One slow wave from the base rate to twice that and back."""
    return lambda t: base * (1.5 - 0.5 * math.cos(2 * math.pi * t / end_s))


SHAPES = {"step": step_rate, "spike": spike_rate, "diurnal": diurnal_rate}
