"""How long a step takes: a linear model, fitted while the engine runs by recursive least squares.

    seconds = b + b'·theta + P·(p + p'·theta_prefill) + D·(d + d'·theta_decode)

P and D are the step's prefill and decode tokens, theta the thresholds, averaged over the step's tokens in the second term. The
primed weights are what dimming can save: with thresholds at 0 nothing is left of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

#: Names of the weights, each in seconds: for a step, for PREFILL_UNIT prefill tokens, for DECODE_UNIT decode tokens.
WEIGHT_NAMES = ("step", "step_theta", "prefill", "prefill_theta", "decode", "decode_theta")
PREFILL_UNIT = 256.0
DECODE_UNIT = 32.0

#: Weight of a step's fit among the steps after it falls by this factor a step: a memory of some 500 steps.
_FORGETTING = 0.998
#: Variance of a step's relative deviation from the model.
_NOISE = 0.1**2
#: Standard deviation of the weights before the first step, in units of that step's time.
_PRIOR = 2.0
_ERROR_SMOOTHING = 0.02
#: Before so many steps, predictions are not gone by.
_FIRST_SAMPLES = 6
#: Deviations are measured by the prediction, but at least by this share of the typical step; larger ones than _LARGEST
#: (a step that was held up by something else) count as that.
_LEAST_SCALE = 0.2
_LARGEST = 10.0


class StepSample(msgspec.Struct, frozen=True, array_like=True):
    """One measured step."""

    seconds: float
    prefill_tokens: int
    decode_tokens: int
    threshold_prefill: float
    threshold_decode: float

    @property
    def inputs(self) -> tuple[int, int, float, float]:
        """What the model predicts from."""
        return self.prefill_tokens, self.decode_tokens, self.threshold_prefill, self.threshold_decode


def features(prefill: ArrayLike, decode: ArrayLike, theta_prefill: ArrayLike, theta_decode: ArrayLike) -> Array:
    """[..., 6] of broadcast arguments, in the order of WEIGHT_NAMES."""
    p, d, tp, td = np.broadcast_arrays(
        *(np.asarray(value, np.float64) for value in (prefill, decode, theta_prefill, theta_decode))
    )
    mixed = (p * tp + d * td) / np.maximum(p + d, 1e-9)
    p, d = p / PREFILL_UNIT, d / DECODE_UNIT
    return np.stack([np.ones_like(p), mixed, p, p * tp, d, d * td], axis=-1)


class StepModel:
    """Fitted to deviations relative to what was expected, so that short decode steps count as much as long prefill steps.

    Until dimming has been seen, a step's cost is taken to be half savable: the least squares solution of least norm.
    """

    def __init__(self) -> None:
        self.num_samples = 0
        #: Mean absolute error of the last some 50 predictions, each made before its step was learnt and as a share of it.
        self.error: float | None = None
        self._weights = np.zeros(len(WEIGHT_NAMES))
        self._covariance = np.zeros((len(WEIGHT_NAMES),) * 2)
        self._trace_limit = 0.0
        self._typical_s = 0.0
        self._usable = self._weights

    @property
    def ready(self) -> bool:
        """Whether enough steps have been seen to go by its predictions."""
        return self.num_samples >= 20

    @property
    def weights(self) -> dict[str, float]:
        """Seconds by WEIGHT_NAMES, as predictions use them."""
        return dict(zip(WEIGHT_NAMES, map(float, self._usable), strict=True))

    def update(self, sample: StepSample) -> None:
        """Learn one step."""
        seconds = max(sample.seconds, 1e-6)
        inputs = features(*sample.inputs)
        scale = self._scale_s(inputs, seconds)
        row, target = inputs / scale, min(seconds / scale, _LARGEST)
        if self.num_samples == 0:
            self._typical_s = seconds
            self._covariance = np.eye(len(row)) * (_PRIOR * seconds) ** 2
            self._trace_limit = float(np.trace(self._covariance))
        elif self.num_samples >= _FIRST_SAMPLES:
            error = abs(float(row @ self._usable) - target)
            self.error = error if self.error is None else self.error + _ERROR_SMOOTHING * (error - self.error)
        # Forgetting makes the covariance grow in directions that no step informs about; bounded, they do not run away.
        if np.trace(self._covariance) < self._trace_limit * _FORGETTING:
            self._covariance /= _FORGETTING
        spread = self._covariance @ row
        gain = spread / (_NOISE + row @ spread)
        self._weights = self._weights + gain * (target - row @ self._weights)
        self._covariance -= np.outer(gain, spread)
        self._covariance = (self._covariance + self._covariance.T) / 2
        self._typical_s += _ERROR_SMOOTHING * (seconds - self._typical_s)
        self.num_samples += 1
        self._usable = _nonnegative(self._weights)

    def _scale_s(self, inputs: Array, seconds: float) -> float:
        """What to measure this step's deviation by. By its own time, slow steps would count less and be underestimated."""
        if self.num_samples < _FIRST_SAMPLES:
            return seconds
        return max(float(inputs @ self._usable), _LEAST_SCALE * self._typical_s)

    def learn(self, samples: Iterable[StepSample]) -> None:
        for sample in samples:
            self.update(sample)

    def predict_s(
        self, prefill: ArrayLike, decode: ArrayLike, theta_prefill: ArrayLike, theta_decode: ArrayLike
    ) -> Array:
        """Seconds of a step; arguments broadcast. Never falls with tokens or thresholds."""
        return features(prefill, decode, theta_prefill, theta_decode) @ self._usable

    def state(self) -> dict[str, object]:
        """Everything needed to go on later, as plain JSON values."""
        return {
            "num_samples": self.num_samples,
            "relative_error": self.error,
            "weights": self._weights.tolist(),
            "covariance": self._covariance.tolist(),
            "trace_limit": self._trace_limit,
            "typical_s": self._typical_s,
        }

    @classmethod
    def from_state(cls, state: dict) -> StepModel:
        """The reverse of `state`. Raises ValueError or KeyError if it is not one."""
        model = cls()
        model.num_samples = int(state["num_samples"])
        model.error = None if state["relative_error"] is None else float(state["relative_error"])
        model._weights = np.array(state["weights"], np.float64)
        model._covariance = np.array(state["covariance"], np.float64)
        model._trace_limit = float(state["trace_limit"])
        model._typical_s = float(state["typical_s"])
        size = len(WEIGHT_NAMES)
        if model._weights.shape != (size,) or model._covariance.shape != (size, size):
            raise ValueError(f"weights must be {size} numbers and covariance {size} x {size}")
        if not (np.isfinite(model._weights).all() and np.isfinite(model._covariance).all()):
            raise ValueError("weights and covariance must be finite")
        model._usable = _nonnegative(model._weights)
        return model


class Slowed:
    """A step model as it holds just now: all steps take `factor` times what it predicts."""

    def __init__(self, model: StepModel, factor: float) -> None:
        self._model, self._factor = model, factor

    def predict_s(
        self, prefill: ArrayLike, decode: ArrayLike, theta_prefill: ArrayLike, theta_decode: ArrayLike
    ) -> Array:
        return self._factor * self._model.predict_s(prefill, decode, theta_prefill, theta_decode)


def _nonnegative(weights: Array) -> Array:
    """The nearest sensible weights: in each pair (fixed, savable) none below 0, their sum kept where it can be."""
    pairs = weights.reshape(-1, 2)
    total = np.maximum(pairs.sum(1), 0.0)
    fixed = np.clip(pairs[:, 0], 0.0, total)
    return np.stack([fixed, total - fixed], axis=1).reshape(-1)
