"""The step model finds a linear engine, stays monotone on noise, and survives the disk."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.brownout.step_model import WEIGHT_NAMES, StepModel, StepSample
from tests.controller.readings import measured_steps

samples = st.builds(
    StepSample,
    seconds=st.floats(1e-4, 5.0),
    prefill_tokens=st.integers(0, 2048),
    decode_tokens=st.integers(0, 256),
    threshold_prefill=st.floats(0, 1),
    threshold_decode=st.floats(0, 1),
)


def test_a_linear_engine_is_found() -> None:
    model = StepModel()
    model.learn(measured_steps(savable=0.6))
    assert model.ready
    assert model.error < 0.01
    for prefill, decode, theta in ((0, 8, 1.0), (200, 20, 0.5), (256, 0, 0.0)):
        expected = 0.004 + (1 - 0.6 * (1 - theta)) * (0.01 + 0.0002 * prefill + 0.0003 * decode)
        assert float(model.predict_s(prefill, decode, theta, theta)) == pytest.approx(expected, rel=0.02)


def test_before_dimming_was_seen_half_of_a_step_is_taken_to_be_savable() -> None:
    model = StepModel()
    model.learn(step for step in measured_steps(count=600) if step.threshold_decode == 1.0)
    full, dimmed = (float(model.predict_s(0, 8, theta, theta)) for theta in (1.0, 0.0))
    assert dimmed == pytest.approx(full / 2, rel=0.2)


def test_a_changed_engine_is_learnt_anew() -> None:
    model = StepModel()
    model.learn(measured_steps(count=1000))
    slower = [
        StepSample(2 * s.seconds, s.prefill_tokens, s.decode_tokens, s.threshold_prefill, s.threshold_decode)
        for s in measured_steps(count=2000)
    ]
    model.learn(slower)
    assert float(model.predict_s(0, 8, 1, 1)) == pytest.approx(2 * (0.014 + 0.0024), rel=0.05)


def test_the_mean_of_noisy_steps_is_found() -> None:
    """Most steps take 2 ms, every tenth is held up and takes 30 ms: 4.8 ms on average, which queues feel."""
    model = StepModel()
    model.learn(StepSample(0.03 if i % 10 == 0 else 0.002, 0, 8, 1.0, 1.0) for i in range(2000))
    assert float(model.predict_s(0, 8, 1.0, 1.0)) == pytest.approx(0.0048, rel=0.15)


@settings(max_examples=50)
@given(st.lists(samples, min_size=1, max_size=60))
def test_predictions_are_finite_and_never_fall_with_tokens_or_thresholds(steps: list[StepSample]) -> None:
    model = StepModel()
    model.learn(steps)
    thetas = np.linspace(0, 1, 5)
    for predicted in (
        model.predict_s(np.arange(0, 500, 100), 4, 0.5, 0.5),
        model.predict_s(0, np.arange(1, 60, 10), 0.5, 0.5),
        model.predict_s(100, 4, thetas, thetas),
    ):
        assert np.isfinite(predicted).all()
        assert (predicted >= 0).all()
        assert (np.diff(predicted) >= -1e-12).all()


def test_a_restored_model_goes_on_as_the_saved_one() -> None:
    steps = measured_steps()
    first, whole = StepModel(), StepModel()
    first.learn(steps[:100])
    restored = StepModel.from_state(json.loads(json.dumps(first.state())))
    restored.learn(steps[100:])
    whole.learn(steps)
    assert restored.weights == pytest.approx(whole.weights)
    assert restored.error == pytest.approx(whole.error)
    assert set(whole.weights) == set(WEIGHT_NAMES)
