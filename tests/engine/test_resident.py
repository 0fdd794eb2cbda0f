"""Resident pool in the engine: more experts than memory, the same tokens where it waits, and honest bookkeeping where not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backend.brownout.fingerprint import checkpoint_fingerprint
from backend.brownout.settings import Settings
from backend.config import EngineConfig
from backend.elastic.predictor import FILE_NAME, LoadPredictor
from backend.engine.engine import Engine
from backend.engine.model_runner import ModelRunner
from backend.errors import ConfigError
from backend.experts import mover
from backend.experts.telemetry import ExpertTelemetry
from tests.engine.test_brownout import ids, make_engine, make_prompts, make_request, run
from tests.engine.test_cuda_graphs import FakeGraph
from tests.models.tiny_checkpoints import make_checkpoint

PROMPTS = make_prompts(12)


def tokens(engine: Engine, **more) -> dict[object, list[int]]:
    outputs = run(engine, [make_request(i, prompt, 16, **more) for i, prompt in enumerate(PROMPTS)])
    return {name: ids(events) for name, events in outputs.items()}


@pytest.fixture(scope="module")
def local() -> dict[object, list[int]]:
    return tokens(make_engine())


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"expert_prefetch": "none"},
        {"resident_experts": "0.13"},
        {"max_running": 2},
        {"max_batch_tokens": 33},
        {"united": "none"},
    ],
    ids=["half", "no-prefetch", "one-slot", "few-running", "chunks", "no-united"],
)
def test_tokens_are_the_local_pools_where_every_miss_waits(local, overrides):
    engine = make_engine(expert_pool="resident", expert_miss="wait", **overrides)
    assert tokens(engine) == local
    found = engine.expert_telemetry()
    assert found.misses == 0 and found.stalls > 0 and found.stall_s > 0
    assert found.bytes_moved > 0 and found.resident_share <= 0.5
    assert (found.prefetches > 0) == (overrides.get("expert_prefetch") != "none")


@pytest.mark.parametrize(("overrides", "sampling"), [({"expert_miss": "wait"}, {}), ({}, {"brownout": "never"})])
def test_tokens_stay_the_same_when_the_share_of_resident_experts_changes_while_they_are_made(
    local, overrides, sampling
):
    engine = make_engine(expert_pool="resident", resident_experts="0.9", **overrides)
    for i, prompt in enumerate(PROMPTS):
        engine.add(make_request(i, prompt, 16, **sampling))
    found: dict[object, list[int]] = {}
    slots, most, version = engine.runner.model.pool.ledger.slot_of.shape[1], 0, 0
    while engine.has_work:
        version += 1
        share = (0.25, 0.9, 0.0, 0.5)[version % 4]
        engine.set_settings(Settings(version=version, resident_share=share))
        for event in engine.step():
            found.setdefault(event.request_id, []).append(event.token_id)
        resident = engine.expert_telemetry().resident_share
        assert resident <= max(share, 1 / slots)
        most = max(most, resident)
    assert found == local
    assert most > 0.5, "it grows again, too"
    assert engine.expert_telemetry().stalls > 0 and engine.expert_telemetry().misses == 0


def test_fewer_resident_experts_leave_more_to_united_ones_from_the_next_step_on():
    engine = make_engine(expert_pool="resident", resident_experts="0.75")
    shares = []
    for version, share in enumerate((1.0, 0.25, 1.0), 1):
        before = engine.expert_telemetry()
        engine.set_settings(Settings(version=version, resident_share=share))
        run(engine, [make_request((version, i), prompt[:-1], 24) for i, prompt in enumerate(PROMPTS)])
        after = engine.expert_telemetry()
        assert after.resident_share == pytest.approx(min(share, 0.75), abs=0.01)
        shares.append((after.misses - before.misses) / (after.assignments - before.assignments))
    assert shares[0] < 0.5 * shares[1] and shares[2] < 0.7 * shares[1]
    with pytest.raises(ConfigError, match=r"resident_share 0\.5 needs a resident expert pool"):
        make_engine().set_settings(Settings(version=4, resident_share=0.5))


def test_never_requests_are_exact_beside_others_that_united_experts_serve(local):
    engine = make_engine(expert_pool="resident")
    requests = [make_request(i, p, 16, brownout="never" if i % 4 == 0 else "auto") for i, p in enumerate(PROMPTS)]
    outputs = run(engine, requests)
    for i, events in outputs.items():
        if i % 4 == 0:
            assert ids(events) == local[i] and events[-1].united_share == 0
    assert sum(events[-1].united_share > 0 for events in outputs.values()) > 5
    found = engine.expert_telemetry()
    assert found.misses > 0 and found.stalls > 0
    engine.runner.model.pool.forget_counts()
    left = engine.expert_telemetry()
    states = {name: getattr(found, name) for name in ("resident_share", "warm", "loading", "cold")}
    assert replace(left, slot_byte_s=0, always_on_byte_s=0) == ExpertTelemetry(**states)
    assert 2 * left.slot_byte_s == pytest.approx(left.always_on_byte_s) and left.slot_byte_s < found.slot_byte_s
    # The same prompts again: what the cache holds from the others is not pristine.
    again = run(engine, [make_request((i, "never"), p, 16, brownout="never") for i, p in enumerate(PROMPTS)])
    assert {i: ids(events) for (i, _), events in again.items()} == local


def test_without_never_requests_nothing_stalls_and_misses_add_up():
    engine = make_engine(expert_pool="resident", resident_experts="0.25")
    outputs = run(engine, [make_request(i, prompt, 16) for i, prompt in enumerate(PROMPTS)])
    found = engine.expert_telemetry()
    assert found.stalls == 0
    # Two layers of two experts a token; the last token made is not computed.
    replaced = sum(round(e[-1].united_share * 4 * (len(PROMPTS[i]) + 15)) for i, e in outputs.items())
    assert found.misses == replaced > 0


def test_brownout_acts_on_resident_experts_too():
    engine = make_engine(expert_pool="resident")
    engine.set_settings(Settings(version=1, threshold_prefill=0.0, threshold_decode=0.0))
    dim = run(engine, [make_request(i, prompt, 8) for i, prompt in enumerate(PROMPTS)])
    assert min(events[-1].united_share for events in dim.values()) > 0.8
    with pytest.raises(ConfigError, match="top_k cannot stand in for missing experts"):
        engine.set_settings(Settings(version=2, threshold_decode=0.5, mechanism="top_k"))


def test_past_loads_tell_which_experts_to_hold(monkeypatch: pytest.MonkeyPatch):
    """With copies that are there at once: how soon a thread makes them depends on what else runs."""
    monkeypatch.setattr(mover, "AT_ONCE_BYTES", 2**40)

    def misses(prefetch: str) -> float:
        engine = make_engine(
            expert_pool="resident",
            checkpoint="dummy:cpu-s",
            united="8",
            similarity="",
            routing="zipf:1.2",
            expert_prefetch=prefetch,
        )
        run(engine, [make_request(i, prompt, 24) for i, prompt in enumerate(PROMPTS)])
        found = engine.expert_telemetry()
        return found.misses / found.assignments

    assert misses("ewma") < 0.8 * misses("none")


def test_checkpoint_whose_experts_do_not_fit_is_served_from_the_mapped_file(tmp_path: Path):
    make_checkpoint(tmp_path)
    parameters = {"checkpoint": str(tmp_path), "max_model_len": 128, "kv_cache_blocks": 200}
    prompts = [[token % 199 for token in prompt] for prompt in PROMPTS[:6]]

    def made(**more) -> tuple[Engine, list[list[int]]]:
        engine = Engine(EngineConfig(**parameters, **more))
        outputs = run(engine, [make_request(i, prompt, 16) for i, prompt in enumerate(prompts)])
        return engine, [ids(outputs[i]) for i in range(len(prompts))]

    whole, expected = made()
    part, found = made(expert_pool="resident", resident_experts="0.5", expert_miss="wait")
    assert found == expected
    one = 3 * 20 * 48 * 4  # bytes of an expert
    assert whole.runner.model.resident_bytes() == 3 * 7 * one
    assert part.runner.model.resident_bytes() == 3 * 3 * one
    assert whole.runner.model.weight_bytes() - part.runner.model.weight_bytes() == 3 * 4 * one
    _, found = made(expert_pool="resident", resident_experts=str(3 * one), expert_miss="wait")
    assert found == expected
    for wrong, message in (
        ({"resident_experts": str(3 * one - 1)}, f"gives {3 * one - 1} bytes, but one expert of each of the 3 layers"),
        ({"expert_miss": "united"}, "expert_miss united, which needs united experts, but none are loaded"),
        ({"expert_prefetch": "predictor"}, r"expert_prefetch is predictor, but the checkpoint has no load-predictor"),
    ):
        with pytest.raises(ConfigError, match=message):
            made(**{"expert_pool": "resident", "expert_miss": "wait", **wrong})


def test_predictor_beside_the_checkpoint_fetches_within_the_step(tmp_path: Path):
    make_checkpoint(tmp_path)
    plain = ModelRunner(EngineConfig(checkpoint=str(tmp_path), kv_cache_blocks=200, max_model_len=128), "cpu").model
    pairs = {(layer, 1): plain.moe_block(layer).router.float() for layer in (1, 2)}
    biases = {pair: torch.zeros(7) for pair in pairs}
    LoadPredictor(pairs, biases, 2, checkpoint_fingerprint(tmp_path)).write(tmp_path / FILE_NAME)
    engine = Engine(
        EngineConfig(
            checkpoint=str(tmp_path), kv_cache_blocks=200, max_model_len=128, expert_pool="resident", expert_miss="wait"
        )
    )
    run(engine, [make_request(i, [t % 199 for t in p], 8) for i, p in enumerate(PROMPTS[:4])])
    assert engine.expert_telemetry().prefetch_hits > 0


def test_replayed_steps_fetch_between_steps_and_never_requests_run_without_graphs(local):
    engine = make_engine(expert_pool="resident")
    runner = engine.runner
    runner.graphs = runner.make_graphs(engine.config, FakeGraph)
    run(engine, [make_request(i, prompt, 16) for i, prompt in enumerate(PROMPTS)])
    found = engine.expert_telemetry()
    assert found.prefetch_hits > 0 and found.misses > 0 and found.stalls == 0
    replayed, inner = [], runner.graphs.run
    runner.graphs.run = lambda *args: replayed.append(True) or inner(*args)
    assert tokens(engine, brownout="never") == local
    assert not replayed
