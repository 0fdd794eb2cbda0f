"""An engine's speed before its first request."""

from __future__ import annotations

import dataclasses

from backend.brownout.step_model import StepModel
from backend.config import EngineConfig
from backend.engine.engine import Engine
from backend.engine.request import Request
from backend.engine.sampling_params import SamplingParams
from backend.engine.speed import measure_steps
from backend.engine.stats import EngineCounters

SMALL = {"checkpoint": "dummy:tiny", "kv_cache_blocks": 64, "max_batch_tokens": 24, "max_running": 6, "max_waiting": 3}


def outputs(engine: Engine) -> list[int]:
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    engine.add(Request("a", [7] * 40, params))
    return [event.token_id for _ in range(6) for event in engine.step()]


def test_steps_of_many_shapes_are_measured_and_the_engine_is_as_new() -> None:
    engine = Engine(EngineConfig(**SMALL))
    fresh = dataclasses.asdict(engine.stats())
    samples = measure_steps(engine)
    model = StepModel()
    model.learn(samples)
    assert model.ready
    assert all(sample.seconds > 0 and sample.threshold_prefill == 1 for sample in samples)
    assert len({(sample.prefill_tokens, sample.decode_tokens) for sample in samples}) > 5
    assert max(sample.prefill_tokens + sample.decode_tokens for sample in samples) == 24
    assert max(sample.decode_tokens for sample in samples) == 6
    assert dataclasses.asdict(engine.stats()) == fresh
    assert engine.counters == EngineCounters()
    assert (engine.blocks.num_in_use, len(engine.blocks._cached), engine.has_work) == (0, 0, False)
    assert outputs(engine) == outputs(Engine(EngineConfig(**SMALL)))
