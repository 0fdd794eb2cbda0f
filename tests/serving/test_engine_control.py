"""The engine's end of the block: settings act in the next step, telemetry counts what happened."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import msgspec
import pytest

from backend.brownout.block import Block
from backend.brownout.buckets import quantile
from backend.brownout.control import Lease
from backend.brownout.settings import Settings
from backend.config import EngineConfig
from backend.engine.admission import Gate, QueueState, TooLate
from backend.engine.engine import Engine
from backend.engine.request import Request
from backend.engine.sampling_params import SamplingParams
from backend.engine.shedding import REFUSED_WITHIN_S, Pace
from backend.errors import ConfigError
from backend.serving import engine_control
from backend.serving.engine_control import EngineControl
from tests.controller.readings import measured_steps

DIM = Settings(threshold_prefill=0.5, threshold_decode=0.25, mechanism="drop")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(EngineConfig(checkpoint="dummy:tiny", kv_cache_blocks=128, max_running=2))


@pytest.fixture
def block(tmp_path: Path) -> Block:
    return Block(tmp_path / "block", os.getpid())


def run(engine: Engine, control: EngineControl) -> None:
    control.follow_settings()
    engine.step()
    control.stepped(0.01)
    control._next_write_s = 0.0
    control.publish()


def add(engine: Engine, name: str, max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    engine.add(Request(name, [ord(name)] * 20, params))


def test_settings_act_in_the_next_step_and_end_with_their_lease(engine: Engine, block: Block) -> None:
    control = EngineControl(engine, block, 0, 1)
    Lease.none(Settings(version=1)).granted(DIM, "me", 0.2, time.monotonic()).write(block)
    add(engine, "a", 4)
    run(engine, control)
    assert engine.settings.threshold_prefill == 0.5
    row = block.read_telemetry(0)
    assert (row["settings_version"], row["threshold_decode"]) == (2, 0.25)
    assert row["steps"][0]["threshold_prefill"] == 0.5
    time.sleep(0.21)
    run(engine, control)
    assert engine.settings.threshold_prefill == 1.0
    assert block.read_telemetry(0)["settings_version"] == 3
    engine.abort("a")


def test_settings_that_the_engine_cannot_follow_are_reported(
    engine: Engine, block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = EngineControl(engine, block, 0, 1)
    control.follow_settings()

    def refuse(settings: Settings) -> None:
        raise ConfigError("way 8 is not loaded")

    Lease.none(Settings(version=1)).granted(Settings(way=8), "me", 0.2, time.monotonic()).write(block)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "set_settings", refuse)
        run(engine, control)
    assert block.read_telemetry(0)["settings_error"].decode() == "way 8 is not loaded"
    time.sleep(0.21)
    run(engine, control)
    assert block.read_telemetry(0)["settings_error"] == b""


def test_telemetry_counts_steps_requests_and_latencies(engine: Engine, block: Block) -> None:
    control = EngineControl(engine, block, 5, 3)
    before = engine.counters.requests
    for name in "xyz":
        add(engine, name, 3)
    run(engine, control)
    row = block.read_telemetry(5)
    assert (row["pid"], row["generation"]) == (os.getpid(), 3)
    assert row["requests"] - before == 3
    # max_running is 2: two prompts of 20 tokens were computed, one waits
    assert (row["requests_running"], row["requests_waiting"], row["waiting_tokens"]) == (2, 1, 20)
    assert row["oldest_waiting_s"] > 0
    assert (row["prefill_tokens"], row["decode_tokens"], row["num_steps"]) == (40, 0, 1)
    assert row["num_layers"] > 0
    assert (row["active_slots"][: row["num_layers"]] > 0).all()
    while engine.has_work:
        run(engine, control)
    control.served([0.5], [(0.3, 3)])
    control._next_write_s = 0.0
    control.publish()
    row = block.read_telemetry(5)
    assert (row["requests_running"], row["requests_waiting"], row["kv_usage_ratio"]) == (0, 0, 0)
    assert row["decode_tokens"] == 6
    assert row["mean_output_tokens"] == 3
    assert row["prefill_step_counts"].sum() == 2
    assert quantile(row["decode_step_counts"], 0.5) == pytest.approx(0.01, rel=0.05)
    assert quantile(row["ttft_counts"], 0.9) == pytest.approx(0.5, rel=0.05)
    assert row["itl_counts"].sum() == 3
    assert quantile(row["itl_counts"], 0.9) == pytest.approx(0.1, rel=0.05)
    assert row["max_gap_s"] == 0.3


def test_a_restarted_engine_is_told_from_the_one_before(engine: Engine, block: Block) -> None:
    for generation in (1, 2):
        control = EngineControl(engine, block, 0, generation)
        control.publish()
        assert block.read_telemetry(0)["generation"] == generation


def test_stubs_learn_how_the_queue_stands(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said before a step is what the engine goes by, less what the step will compute."""
    config = EngineConfig(
        checkpoint="dummy:tiny", kv_cache_blocks=64, max_running=1, max_batch_tokens=16, shed_ttft_s=1.0
    )
    engine = Engine(config)
    control = EngineControl(engine, block, 2, 7)
    add(engine, "a", 4)
    control.announce(12.5)
    said = block.read_queue(2)
    assert (said["generation"], said["seen_s"], said["waiting"], said["pace"]["free"]) == (7, 12.5, 1, 1)
    assert said["allowed_s"] == math.inf  # it does not know its speed yet
    control._model.learn(measured_steps(count=20))
    add(engine, "b", 4)
    before = time.monotonic()
    control.announce(13.0)
    said = block.read_queue(2)
    assert (said["waiting"], said["tokens"], said["pace"]["chunk"]) == (2, 40 - 16, 16)
    assert (said["allowed_s"], said["any_auto"], said["max_priority"]) == (pytest.approx(0.85), True, 0)
    assert said["ready_s"] - before == pytest.approx(float(control._model.predict_s(16, 0, 1.0, 1.0)), abs=0.05)
    while engine.has_work:
        engine.step()
    control.announce(13.0)
    said = block.read_queue(2)
    assert (said["waiting"], said["tokens"], said["any_auto"], said["pace"]["free"]) == (0, 0, False, 1)
    assert said["ready_s"] <= time.monotonic()


def test_an_engine_knows_its_speed_before_the_first_request(block: Block) -> None:
    engine = Engine(EngineConfig(checkpoint="dummy:tiny", kv_cache_blocks=64, shed_ttft_s=1.0))
    control = EngineControl(engine, block, 2, 7)
    control.learn_speed()
    control.announce(0.0)
    assert block.read_queue(2)["allowed_s"] == pytest.approx(0.85)
    control.write()
    row = block.read_telemetry(2)
    assert (row["num_steps"], row["requests"], row["prefill_tokens"], row["num_layers"]) == (0, 0, 0, 0)


def test_no_more_run_at_once_than_get_their_tokens_in_time(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting what the controller may still dim; telemetry says how many, the stubs hear that a new one has to wait."""
    monkeypatch.setattr(engine_control, "_HOLD_PERIOD_S", 0.0)
    parameters = {"checkpoint": "dummy:tiny", "kv_cache_blocks": 64, "shed_ttft_s": 1.0, "hold_itl_s": 0.02}
    engine = Engine(EngineConfig(**parameters))
    control = EngineControl(engine, block, 2, 7)
    control._model.learn(measured_steps())
    for name in "abc":
        add(engine, name, 2)
    run(engine, control)
    unknown = engine.scheduler.limit  # before an answer has ended
    run(engine, control)
    first = engine.scheduler.limit
    assert 1 <= first < 10
    assert first < unknown < 256
    assert block.read_telemetry(2)["max_running"] == first
    control.announce(0.0)
    assert block.read_queue(2)["pace"]["free"] == first
    Lease.none(Settings(version=1)).granted(Settings(), "me", 5.0, time.monotonic(), floor=0.0).write(block)
    for name in "defghijklmnop":
        add(engine, name, 2)
        run(engine, control)
    assert engine.scheduler.limit > first


def at_the_door(engine: Engine, control: EngineControl, block: Block, count: int) -> int:
    """So many requests that come at once, and of which the engine takes notice only now; how many are let pass."""
    control.announce(0.0)
    *state, pace = block.read_queue(2).item()
    gate, now, passed = Gate(1000, engine.config.shed_ttft_s), time.monotonic(), 0
    for number in range(count):
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        request = Request(number, [1] * 8, params, now)
        try:
            request.judged = gate.admit(QueueState(*state, Pace(*pace)), 8, params, now, now)
        except TooLate:
            continue
        assert request.judged
        engine.add(request)
        passed += 1
    time.sleep(REFUSED_WITHIN_S + 0.01)
    return passed


def serves(engine: Engine, count: int) -> bool:
    """Whether it serves so many requests, each once."""
    events = []
    while engine.has_work:
        events += engine.step()
    ended = [event.request_id for event in events if event.finish_reason is not None]
    return len(ended) == len(set(ended)) == count


@pytest.mark.parametrize(("limit_s", "output_tokens", "crowd"), [(1.0, 100.0, 60), (0.1, 0.0, 3)])
def test_what_a_long_step_held_up_is_refused_at_the_door_or_served(
    block: Block, limit_s: float, output_tokens: float, crowd: int
) -> None:
    """A crowd before free slots: those are refused that would wait for others to finish. And a few that would have been in
    time if the step had not been so long: refused now, after nearly the whole time, they would gain nothing.
    """
    parameters = {"checkpoint": "dummy:tiny", "kv_cache_blocks": 256, "max_batch_tokens": 32, "max_running": 2}
    engine = Engine(EngineConfig(**parameters, shed_ttft_s=limit_s))
    control = EngineControl(engine, block, 2, 7)
    control._model.learn(measured_steps())
    engine.counters.mean_output_tokens = output_tokens
    passed = at_the_door(engine, control, block, crowd)
    # At 15 ms a step one of two finishes every 0.75 s.
    assert passed == min(3, crowd)
    assert control.shed() == []
    assert serves(engine, passed)


def test_the_queue_is_judged_by_how_fast_the_last_steps_were(block: Block) -> None:
    """The model itself remembers hundreds of steps; when the machine slows down, the stubs hear of it within some ten."""
    engine = Engine(EngineConfig(checkpoint="dummy:tiny", kv_cache_blocks=64, max_batch_tokens=16, shed_ttft_s=1.0))
    control = EngineControl(engine, block, 2, 7)
    add(engine, "a", 4)
    for step in measured_steps(count=200):
        control._learn(step)
    control.announce(1.0)
    before = block.read_queue(2)["pace"]["full_s"]
    for step in measured_steps(count=20):
        control._learn(msgspec.structs.replace(step, seconds=3 * step.seconds))
    control.announce(1.0)
    assert 2.5 * before < block.read_queue(2)["pace"]["full_s"] < 4 * before


def test_refusals_come_earlier_when_first_tokens_come_late(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """The margin grows while more than its share of those accepted are late, and shrinks again, within bounds."""
    control = EngineControl(
        engine := Engine(EngineConfig(checkpoint="dummy:tiny", kv_cache_blocks=64, shed_ttft_s=1.0)), block, 0, 1
    )
    margins = []
    monkeypatch.setattr(engine, "shed", lambda model, limit_s, floor, margin: margins.append(margin) or [])
    monkeypatch.setattr(engine_control, "_SHED_PERIOD_S", 0.0)
    control._model.learn(measured_steps(count=20))
    for served in ([0.9], [1.1] * 5, [1.1] * 100, [0.9] * 2000):
        control.served(served, [])
        control.shed()
    assert margins == [0.15, pytest.approx(0.248), 0.5, 0.15]
