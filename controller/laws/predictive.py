"""Dim before latencies show it: predict them with a fitted step model and choose the least dimming that keeps them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from backend.brownout.queue_model import EngineLoad, first_token_s
from backend.brownout.step_model import DECODE_UNIT, PREFILL_UNIT, Array, StepModel, StepSample
from controller.laws.base import Decision, Law, Limits
from controller.reading import EngineReading, Reading

#: The knobs of the configuration, where nobody sets them.
MARGIN, HYSTERESIS, BRIGHTEN_PER_S = 0.2, 0.1, 0.5
#: Points of the grid that is searched.
_GRID = 21
#: Steps that stand for the present mix of prefill and decode.
_RECENT_STEPS = 64
#: A prediction may be corrected by what was served up to this factor.
_MAX_TRIM = 3.0
_TRIM_FADES_S = 5.0
#: From thresholds so near to full quality, after so long without a need to dim, what the model takes to be too bright is tried,
#: at this share of the usual pace.
_NEARLY_FULL, _CALM_S, _PROBING = 0.8, 5.0, 0.1
#: P90 of the rest of one step and all of the next, in P90s of a step: rarely are both that long.
_STEPS_WITHOUT_QUEUE = 1.7
#: Euler steps over the horizon.
_HORIZON_PARTS = 6


class Predictive(Law):
    """Per reading, over a grid of thresholds, the same for prefill and decode (all engines must hold):

    - inter-token latency: the P90 of recent steps, each repriced at the candidate thresholds, times the growth of a step
      over the next `horizon_s` if arrivals go on as they are (more sequences run at once);
    - TTFT of the queue's head (its age and a step) and tail (the whole queue's drain time, see `queue_model`), and of a
      request that finds no queue: it waits for the end of the running step, then for its own.

    Of those that keep both within (1 - margin) of the SLO the brightest is the target. Under load nearly every step has tokens
    of both phases, and an expert that one of them keeps is read for all: one phase dimmed alone saves little. Dimming goes to
    the target at once; brightening wants `hysteresis` more margin, goes as far as the present arrivals could be sustained, and
    moves `brighten_per_s` at most. Near full quality it goes on slowly if no need to dim has shown for some seconds: the model
    may be wrong about what lasts, and only learns it by trying. Latencies that were missed though the predictions had them
    within the SLO raise the predictions by a trim, which fades when they are kept again.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        margin: float = MARGIN,
        hysteresis: float = HYSTERESIS,
        brighten_per_s: float = BRIGHTEN_PER_S,
        arrivals_time_s: float = 1.5,
        horizon_s: float = 3.0,
        model: StepModel | None = None,
    ) -> None:
        super().__init__(limits)
        self.model = StepModel() if model is None else model
        self._margin = margin
        self._hysteresis = hysteresis
        self._brighten_per_s = brighten_per_s
        self._arrivals_time_s = arrivals_time_s
        self._horizon_s = horizon_s
        self._ttft = _Trim(limits.ttft_slo_s, self.window_s)
        self._itl = _Trim(limits.itl_slo_s, self.window_s)
        self._arrivals: dict[int, tuple[float, float]] = {}
        self._recent: dict[int, list[StepSample]] = {}
        #: Since it was last necessary to dim.
        self._undimmed_s = 0.0
        self._grid_prefill, self._grid_decode = _grid(limits)

    def resume(self, threshold_prefill: float, threshold_decode: float) -> None:
        super().resume(threshold_prefill, threshold_decode)
        self._ttft.reset()
        self._itl.reset()
        self._arrivals.clear()
        self._recent.clear()

    def update(self, reading: Reading | None, dt_s: float) -> Decision:
        if reading is None:
            return self._decision(action="no reading")
        for engine in reading.engines:
            self.model.learn(engine.steps)
        for index, engine in enumerate(reading.engines):
            self._follow(index, engine, dt_s)
        if not self.model.ready:
            return self._decision(action="learning")
        return self._choose(reading, dt_s)

    def predict(self, reading: Reading, theta_prefill: Array, theta_decode: Array) -> tuple[Array, Array]:
        """TTFT and inter-token latency in seconds [N] of the worst engine at thresholds [N] each, trims included."""
        ttft, itl = np.zeros_like(theta_prefill), np.zeros_like(theta_prefill)
        for index, engine in enumerate(reading.engines):
            growth = self._growth(engine, theta_prefill, theta_decode)
            itl = np.maximum(itl, growth * self._itl_s(index, theta_prefill, theta_decode))
            ttft = np.maximum(ttft, self._ttft_s(engine.load, theta_prefill, theta_decode))
            ttft = np.maximum(ttft, _STEPS_WITHOUT_QUEUE * growth * self._step_s(index, theta_prefill, theta_decode))
        return ttft * self._ttft.factor, itl * self._itl.factor

    def _choose(self, reading: Reading, dt_s: float) -> Decision:
        limits = self.limits
        # The present thresholds stand first: they are judged, too, though they need not be on the grid.
        theta_prefill = np.concatenate([[self.threshold_prefill], self._grid_prefill])
        theta_decode = np.concatenate([[self.threshold_decode], self._grid_decode])
        ttft, itl = self.predict(reading, theta_prefill, theta_decode)
        self._ttft.update(float(ttft[0]), reading.ttft_p90_s, dt_s)
        self._itl.update(float(itl[0]), reading.itl_p90_s, dt_s)
        load = np.maximum(ttft / limits.ttft_slo_s, itl / limits.itl_slo_s)
        brightness = theta_prefill + theta_decode
        now = (self.threshold_prefill, self.threshold_decode)
        self._undimmed_s += dt_s
        if load[0] > 1 - self._margin:
            self._undimmed_s = 0.0
            fits = load <= 1 - self._margin
            # Where nothing helps enough, the deepest dimming hurts least.
            best = int(np.argmax(np.where(fits, brightness, -np.inf))) if fits.any() else len(load) - 1
            action = "dim" if fits.any() else "dim fully"
            self.threshold_prefill = float(theta_prefill[best])
            self.threshold_decode = float(theta_decode[best])
        else:
            sustained = self._sustained(reading, theta_prefill, theta_decode)
            fits = np.maximum(load, sustained) <= 1 - self._margin - self._hysteresis
            rate = self._brighten_per_s
            calm = self._undimmed_s >= _CALM_S and min(now) >= _NEARLY_FULL
            if calm and not (fits & (brightness > brightness[0])).any():
                fits, rate = brightness > brightness[0], _PROBING * rate
            best = int(np.argmax(np.where(fits, brightness, -np.inf))) if fits.any() else 0
            action = "hold"
            if brightness[best] > brightness[0]:
                step = rate * dt_s
                self.threshold_prefill = min(max(now[0], float(theta_prefill[best])), now[0] + step)
                self.threshold_decode = min(max(now[1], float(theta_decode[best])), now[1] + step)
                action = "brighten"
        return self._decision(
            action=action,
            ttft_predicted_s=_finite(ttft[0]),
            itl_predicted_s=_finite(itl[0]),
            ttft_target_s=_finite(ttft[best]),
            itl_target_s=_finite(itl[best]),
            trim_ttft=self._ttft.factor,
            trim_itl=self._itl.factor,
            model_error=self.model.error,
        )

    def _follow(self, index: int, engine: EngineReading, dt_s: float) -> None:
        """Keep the engine's arrival rates, smoothed, and its recent steps."""
        share = 1 - math.exp(-dt_s / self._arrivals_time_s)
        requests, tokens = self._arrivals.get(index, (engine.requests_per_s, engine.prompt_tokens_per_s))
        self._arrivals[index] = (
            requests + share * (engine.requests_per_s - requests),
            tokens + share * (engine.prompt_tokens_per_s - tokens),
        )
        busy = engine.load.running + engine.load.waiting > 0
        recent = [*self._recent.get(index, []), *engine.steps] if busy else []
        self._recent[index] = recent[-_RECENT_STEPS:]

    def _ttft_s(self, load: EngineLoad, theta_prefill: Array, theta_decode: Array) -> Array:
        if load.waiting_tokens == 0:
            return np.zeros_like(theta_prefill)
        # Prompts that are being computed are waited for, too, though they are no longer in the queue.
        each = load.waiting_tokens / max(load.waiting, 1)
        head = np.zeros_like(theta_prefill)
        if load.waiting:
            head = load.oldest_waiting_s + first_token_s(self.model, load, each, 0, theta_prefill, theta_decode)
        tail = first_token_s(self.model, load, load.waiting_tokens, load.waiting - 1, theta_prefill, theta_decode)
        return np.maximum(head, tail)

    def _itl_s(self, index: int, theta_prefill: Array, theta_decode: Array) -> Array:
        """P90 over the tokens of recent steps."""
        steps = [step for step in self._recent.get(index, ()) if step.decode_tokens > 0]
        seconds = self._repriced(steps, theta_prefill, theta_decode)
        return _p90(seconds, np.array([step.decode_tokens for step in steps])[:, None] + np.zeros_like(seconds))

    def _step_s(self, index: int, theta_prefill: Array, theta_decode: Array) -> Array:
        """P90 of recent steps as an arrival meets them: a step that takes twice as long meets twice as many."""
        seconds = self._repriced(self._recent.get(index, ()), theta_prefill, theta_decode)
        return _p90(seconds, seconds)

    def _repriced(self, steps: Sequence[StepSample], theta_prefill: Array, theta_decode: Array) -> Array:
        """[steps, N] seconds that these steps would take."""
        tokens = np.array([(step.prefill_tokens, step.decode_tokens) for step in steps], np.float64).reshape(-1, 2, 1)
        return self.model.predict_s(tokens[:, 0], tokens[:, 1], theta_prefill, theta_decode)

    def _growth(self, engine: EngineReading, theta_prefill: Array, theta_decode: Array) -> Array:
        """How many times as long a step takes after `horizon_s` of the present arrivals: [N], at least 1.

        Sequences come at the rate of arrivals and end after `mean_output_tokens` steps; a step of t seconds computes the
        prompt tokens that arrive in t seconds beside one token of each sequence.
        """
        load, output = engine.load, engine.load.mean_output_tokens
        if output <= 0 or engine.requests_per_s <= 0:
            return np.ones_like(theta_prefill)
        w = self.model.weights
        mixed = _mean_threshold(engine.prompt_tokens_per_s, engine.requests_per_s * output, theta_prefill, theta_decode)
        fixed = w["step"] + w["step_theta"] * mixed
        token = (w["decode"] + w["decode_theta"] * theta_decode) / DECODE_UNIT
        prompts = engine.prompt_tokens_per_s * (w["prefill"] + w["prefill_theta"] * theta_prefill) / PREFILL_UNIT
        free = np.maximum(1 - prompts, 0.05)
        running = np.full_like(theta_prefill, load.running + load.waiting)
        first = last = np.maximum((fixed + running * token) / free, 1e-6)
        for _ in range(_HORIZON_PARTS):
            ended = np.minimum(running, load.slots) / (output * last)
            running = np.maximum(running + (engine.requests_per_s - ended) * self._horizon_s / _HORIZON_PARTS, 0.0)
            decodes = np.minimum(running, min(load.slots, load.max_batch_tokens))
            # What the token budget of a step does not hold waits in the queue and makes no step longer.
            full = self.model.predict_s(load.max_batch_tokens - decodes, decodes, theta_prefill, theta_decode)
            last = np.maximum(np.minimum((fixed + decodes * token) / free, full), 1e-6)
        return np.maximum(last / first, 1.0)

    def _sustained(self, reading: Reading, theta_prefill: Array, theta_decode: Array) -> Array:
        """How much of the objectives and of the engines' room the present arrivals would take if they went on: [N], 1 is all.

        Where a load settles, a step of t seconds computes the prompt tokens of t seconds, and one token each of N = (output
        tokens per second) * t sequences; so t = fixed cost / (1 - cost of a second's tokens), if there is such a time.
        """
        w = self.model.weights
        prefill_s = (w["prefill"] + w["prefill_theta"] * theta_prefill) / PREFILL_UNIT
        decode_s = (w["decode"] + w["decode_theta"] * theta_decode) / DECODE_UNIT
        worst = np.zeros_like(theta_prefill)
        for index, engine in enumerate(reading.engines):
            requests, prompt = self._arrivals[index]
            output = requests * engine.load.mean_output_tokens
            if output <= 0:
                continue
            mixed = _mean_threshold(prompt, output, theta_prefill, theta_decode)
            busy = prompt * prefill_s + output * decode_s
            seconds = (w["step"] + w["step_theta"] * mixed) / np.maximum(1 - busy, 1e-9)
            load = engine.load
            worst = np.maximum(worst, seconds * self._itl.factor / self.limits.itl_slo_s)
            worst = np.maximum(worst, seconds * output / load.slots)
            worst = np.maximum(worst, seconds * (output + prompt) / load.max_batch_tokens)
        return worst


def _grid(limits: Limits) -> tuple[Array, Array]:
    """Thresholds for prefill and decode, [N] each, from the brightest to the deepest dimming within the limits."""
    both = np.linspace(1.0, min(limits.min_threshold_prefill, limits.min_threshold_decode), _GRID)
    return np.maximum(both, limits.min_threshold_prefill), np.maximum(both, limits.min_threshold_decode)


def _mean_threshold(prompt: float, output: float, theta_prefill: Array, theta_decode: Array) -> Array:
    """Over the tokens of prompts and of answers."""
    return (prompt * theta_prefill + output * theta_decode) / (prompt + output)


def _p90(values: Array, weights: Array) -> Array:
    """[N] weighted 90th percentiles of the columns of values [M, N]; zeros for M = 0."""
    if not len(values):
        return np.zeros(values.shape[1])
    order = np.argsort(values, axis=0)
    below = np.cumsum(np.take_along_axis(weights, order, axis=0), axis=0)
    row = np.argmax(below >= 0.9 * below[-1], axis=0)
    columns = np.arange(values.shape[1])
    return values[order[row, columns], columns]


class _Trim:
    """A factor on predictions: it grows while latencies are missed that were not predicted, and fades when they are kept."""

    def __init__(self, slo_s: float, window_s: float) -> None:
        self._slo_s, self._window_s = slo_s, window_s
        self.reset()

    def reset(self) -> None:
        self.factor = 1.0
        #: (age, prediction) over the window that served latencies are from, and one second before it.
        self._predicted: list[tuple[float, float]] = []

    def update(self, predicted_s: float, served_s: float | None, dt_s: float) -> None:
        aged = [(age + dt_s, seconds) for age, seconds in self._predicted if age + dt_s <= self._window_s + 1.0]
        self._predicted = [*aged, (0.0, predicted_s)]
        if served_s is None:
            return
        if served_s > self._slo_s >= max(seconds for _, seconds in self._predicted):
            self.factor = min(_MAX_TRIM, self.factor * (1 + 0.5 * min(dt_s, 1.0)))
        elif served_s < 0.9 * self._slo_s:
            self.factor = 1 + (self.factor - 1) * math.exp(-dt_s / _TRIM_FADES_S)


def _finite(seconds: float) -> float | None:
    """For the log: JSON has no infinity."""
    return float(seconds) if math.isfinite(seconds) else None
