"""Brownout in the engine: nothing at theta = 1, nothing for `never` requests, and every token accounted for."""

from __future__ import annotations

import random

import pytest
import torch

from backend.brownout.settings import Settings
from backend.config import EngineConfig
from backend.engine.engine import Engine
from backend.engine.request import Request, TokenOutput
from backend.engine.sampling_params import SamplingParams
from backend.errors import ConfigError

FULL = Settings(version=1, threshold_prefill=0.0, threshold_decode=0.0)


def make_engine(united: str = "2,4", **overrides) -> Engine:
    parameters = {"checkpoint": "dummy:tiny", "dtype": "float32", "max_model_len": 128, "kv_cache_blocks": 600}
    return Engine(EngineConfig(**{**parameters, "united": united, "similarity": "seeded", **overrides}))


def make_prompts(count: int, seed: int = 0, low: int = 20, high: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(512) for _ in range(rng.randint(low, high))] for _ in range(count)]


def make_request(name: object, prompt: list[int], max_tokens: int = 12, **more) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **more)
    return Request(name, prompt, params)


def run(engine: Engine, requests: list[Request]) -> dict[object, list[TokenOutput]]:
    """Outputs by request id."""
    for request in requests:
        engine.add(request)
    outputs: dict[object, list[TokenOutput]] = {}
    while engine.has_work:
        for event in engine.step():
            assert isinstance(event, TokenOutput), event
            outputs.setdefault(event.request_id, []).append(event)
    engine.blocks.check()
    return outputs


def ids(outputs: list[TokenOutput]) -> list[int]:
    return [output.token_id for output in outputs]


def recorded_logits(engine: Engine) -> list[torch.Tensor]:
    """A list to which each step's logits will be added."""
    logits, inner = [], engine.runner.run

    def recording(schedule):
        logits.append(inner(schedule))
        return logits[-1]

    engine.runner.run = recording
    return logits


@pytest.mark.parametrize("mechanism", ["united", "reroute", "piggyback", "top_k", "drop"])
def test_theta_one_is_bit_identical_to_an_engine_without_united_experts(mechanism):
    plain, equipped = make_engine("none", similarity=""), make_engine()
    equipped.set_settings(Settings(mechanism=mechanism))
    # Long enough that some steps take the path for many rows per slot and some that for few.
    requests = [[make_request(i, prompt, 8) for i, prompt in enumerate(make_prompts(16, high=100))] for _ in range(2)]
    expected, found = recorded_logits(plain), recorded_logits(equipped)
    tokens, same = run(plain, requests[0]), run(equipped, requests[1])
    assert {name: ids(outputs) for name, outputs in tokens.items()} == {n: ids(o) for n, o in same.items()}
    assert len(expected) == len(found) and all(map(torch.equal, expected, found))
    assert {output.united_share for outputs in same.values() for output in outputs} == {0.0}


@pytest.mark.parametrize("mechanism", ["united", "reroute", "piggyback", "top_k", "drop"])
def test_settings_change_between_steps_and_leave_emitted_tokens_alone(mechanism):
    prompts = make_prompts(8)
    expected = run(make_engine(), [make_request(i, p, 24) for i, p in enumerate(prompts)])
    engine = make_engine()
    for i, prompt in enumerate(prompts):
        engine.add(make_request(i, prompt, 24))
    tokens: dict[object, list[int]] = {i: [] for i in range(8)}
    emitted = None
    dim = Settings(version=1, threshold_prefill=0.3, threshold_decode=0.3, mechanism=mechanism)
    while engine.has_work:
        for event in engine.step():
            tokens[event.request_id].append(event.token_id)
        if emitted is None and len(tokens[0]) == 8:
            engine.set_settings(dim)
            emitted = {i: list(t) for i, t in tokens.items()}
    assert emitted is not None
    for i in range(8):
        assert tokens[i][: len(emitted[i])] == emitted[i] == ids(expected[i])[: len(emitted[i])]
        assert len(tokens[i]) == 24
    assert tokens != {i: ids(outputs) for i, outputs in expected.items()}, "brownout changes something"


@pytest.mark.parametrize("mechanism", ["united", "reroute", "piggyback", "top_k", "drop"])
def test_never_request_beside_browned_out_ones_makes_the_tokens_it_makes_alone(mechanism):
    prompts = make_prompts(32, seed=4, low=40)
    dim = Settings(threshold_prefill=0.3, threshold_decode=0.3, mechanism=mechanism)
    warm = make_engine()
    warm.set_settings(dim)
    dimmed = run(warm, [make_request(i, p, 24) for i, p in enumerate(prompts)])
    assert sum(outputs[-1].united_share > 0 for outputs in dimmed.values()) > 15
    for which, prompt in list(enumerate(prompts))[::8]:
        alone = ids(run(make_engine("none"), [make_request("a", prompt, 24)])["a"])
        cold = make_engine()
        cold.set_settings(dim)
        for engine in (cold, warm):  # the warm one has the prompt's blocks, but browned out
            others = [make_request((which, i), p, 24) for i, p in enumerate(prompts) if i != which]
            outputs = run(engine, [*others, make_request("never", prompt, 24, brownout="never")])
            assert ids(outputs["never"]) == alone
            assert {output.united_share for output in outputs["never"]} == {0.0}
            assert sum(outputs[which, i][-1].united_share > 0 for i in range(32) if i != which) > 15


def test_never_request_reads_only_pristine_blocks_and_others_prefer_them():
    engine = make_engine()
    prompt = make_prompts(1, low=64, high=64)[0]

    def cached_tokens(name, **more) -> int:
        before = engine.blocks.num_hit_tokens
        run(engine, [make_request(name, prompt, 4, **more)])
        return engine.blocks.num_hit_tokens - before

    engine.set_settings(FULL)
    assert cached_tokens("first") == 0
    assert cached_tokens("never", brownout="never") == 0, "made under brownout"
    assert cached_tokens("never again", brownout="never") == 48
    engine.blocks.clear_cache()
    assert cached_tokens("auto") == 0
    assert cached_tokens("auto again") == 48, "good enough for a request that is browned out anyhow"
    engine.set_settings(Settings())
    assert cached_tokens("bright, but on dim blocks") == 48
    assert cached_tokens("never", brownout="never") == 0, "a block after a dim one is dim"


def test_blocks_written_by_decoding_have_their_quality_too():
    engine = make_engine()
    prompt = make_prompts(1, low=16, high=16)[0]
    engine.set_settings(Settings(threshold_prefill=1.0, threshold_decode=0.0))
    tokens = ids(run(engine, [make_request("a", prompt, 40)])["a"])
    for brownout, expected in (("never", 16), ("auto", 48)):
        before = engine.blocks.num_hit_tokens
        run(engine, [make_request(brownout, [*prompt, *tokens], 1, brownout=brownout)])
        assert engine.blocks.num_hit_tokens - before == expected
        engine.blocks.check()


def test_shares_add_up_to_what_the_remap_replaced():
    engine = make_engine(max_batch_tokens=64)
    engine.set_settings(Settings(threshold_prefill=0.5, threshold_decode=0.25, way=2))
    requests = [make_request(i, p, 9, brownout="auto" if i % 4 else "never") for i, p in enumerate(make_prompts(12))]
    replaced, shares, inner = [], [], engine.runner.run

    def recording(schedule, *previous):
        logits = inner(schedule, *previous)
        replaced.append(int(engine.runner.replaced.sum()))
        shares.append(replaced[-1] / (sum(schedule.num_tokens) * 4))
        return logits

    engine.runner.run = recording
    for request in requests:
        engine.add(request)
    last: dict[object, float] = {}
    while engine.has_work:
        for event in engine.step():
            last[event.request_id] = event.united_share
        assert engine.stats().united_share == pytest.approx(shares[-1])
    # 2 layers of 2 assignments; the last token made is never computed.
    total = sum(share * 4 * (len(requests[i].prompt_ids) + 8) for i, share in last.items())
    assert total == pytest.approx(sum(replaced)) and total > 0
    assert all(last[i] == 0 for i in range(0, 12, 4)), "never"


def test_ways_are_switched_between_steps_in_place():
    engine = make_engine("2,4")
    model = engine.runner.model
    assert model.ways == engine.available.ways == (2, 4)
    block = model.moe_block(0)
    address = block.expert_map.united_slots.data_ptr()
    for i, prompt in enumerate(make_prompts(16)):
        engine.add(make_request(i, prompt, 40))
    for way, slots, most in ((2, range(8, 12), 4), (4, range(12, 14), 2), (0, range(12, 14), 2), (2, range(8, 12), 4)):
        engine.set_settings(Settings(threshold_prefill=0.0, threshold_decode=0.0, way=way))
        for _ in range(3):
            engine.step()
        assert set(block.last_slots[block.last_slots >= 0].tolist()) <= set(slots), "16 tokens leave no expert alone"
        stats = engine.stats()
        assert max(stats.active_slots_by_layer) <= most and stats.active_slots == sum(stats.active_slots_by_layer) / 2
        assert stats.assignments_per_token < 2 and stats.united_share == 1
    assert block.expert_map.united_slots.data_ptr() == address


@pytest.mark.parametrize(
    ("loaded", "wanted", "message"),
    [
        ({"united": "2,4"}, {"way": 8}, "way 8 is not loaded; loaded ways are 2, 4"),
        ({"united": "none"}, {"way": 2}, r"way 2 is not loaded; no united experts are loaded \(parameter united\)"),
        ({"united": "none"}, {"threshold_decode": 0.5}, "threshold below 1 needs united experts; no united experts"),
        (
            {"similarity": "none"},
            {"mechanism": "reroute"},
            r"needs expert similarities.*\(parameter similarity\); available mechanisms are united, united_top_k, piggyback, top_k, drop",
        ),
    ],
)
def test_settings_that_cannot_be_followed_change_nothing(loaded, wanted, message):
    engine = make_engine(**loaded)
    engine.set_settings(Settings(version=1, threshold_prefill=0.5, mechanism="top_k"))
    table = engine.runner.model.thresholds.clone()
    with pytest.raises(ConfigError, match=message):
        engine.set_settings(Settings(version=2, **wanted))
    assert engine.settings.version == 1
    assert torch.equal(engine.runner.model.thresholds, table)
    assert engine.runner.model.replacement.mechanism == "top_k"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"united": "9"}, "united of a dummy checkpoint must be whole numbers from 2"),
        ({"united": "2,"}, "united of a dummy checkpoint must be whole numbers from 2"),
        ({"similarity": "some.safetensors"}, "similarity of a dummy checkpoint must be seeded or none"),
    ],
)
def test_unusable_parameters_of_a_dummy_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_engine(**overrides)
