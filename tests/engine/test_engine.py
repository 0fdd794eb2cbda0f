"""The engine end to end on a tiny random model: the same tokens however the work is cut, and exactly one end each."""

import gc
import random
import time
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.brownout.settings import Settings
from backend.brownout.step_model import StepModel
from backend.config import EngineConfig
from backend.engine.engine import Engine
from backend.engine.request import Request, RequestEnded, TokenOutput
from backend.engine.sampling_params import SamplingParams
from backend.errors import ConfigError, InvalidRequestError, UnavailableError
from tests.controller.readings import measured_steps


def make_engine(**overrides) -> Engine:
    parameters = {
        "checkpoint": "dummy:tiny",
        "dtype": "float32",
        "max_model_len": 128,
        "kv_cache_blocks": 400,
        **overrides,
    }
    return Engine(EngineConfig(**parameters))


def greedy(max_tokens=16, **more) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **more)


def run(engine: Engine, requests: list[Request]) -> dict:
    """Tokens by (request id, sequence index); checks that each request ends exactly once."""
    for request in requests:
        engine.add(request)
    tokens, ends = {}, {}
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, TokenOutput):
                key = event.request_id, event.index
                assert key not in ends, "a token after the end"
                tokens.setdefault(key, []).append(event.token_id)
                if event.finish_reason:
                    ends[key] = event.finish_reason
            else:
                ends[event.request_id] = event.outcome
    assert engine.blocks.num_in_use == 0
    engine.blocks.check()
    assert set(tokens) == {key for key in ends if isinstance(key, tuple)}
    return tokens


def test_lengths_of_answers_count_however_they_end() -> None:
    """At a length, and at a stop string, which somebody else has found; not where the client has gone."""
    engine, prompt = make_engine(), list(range(40))
    for name, max_tokens in (("whole", 6), ("stopped", 50), ("gone", 50)):
        engine.add(Request(name, prompt, greedy(max_tokens)))
        for _ in range(6):
            engine.step()
        if name == "stopped":
            engine.abort(name, 0)
        engine.abort(name)
    counters = engine.counters
    assert (counters.sequences_finished, counters.mean_output_tokens) == (2, 6)
    # Of the second prompt 32 tokens were in the prefix cache, which knows whole blocks.
    assert counters.mean_prompt_tokens == (40 + 8) / 2


def make_prompts(count: int, seed: int = 0, low: int = 1, high: int = 90) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(512) for _ in range(rng.randint(low, high))] for _ in range(count)]


@pytest.fixture(scope="module")
def alone() -> dict:
    """Reference: each prompt by itself, prefilled whole."""
    tokens = {}
    engine = make_engine()
    for number, prompt in enumerate(make_prompts(32)):
        engine.blocks.clear_cache()
        tokens |= run(engine, [Request(number, prompt, greedy())])
    return tokens


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"max_batch_tokens": 7, "max_running": 7},
        {"max_batch_tokens": 33},
        {"block_size": 8},
        {"block_size": 32, "kv_cache_blocks": 200},
        {"kv_cache_blocks": 20, "block_size": 8},  # far too few for 32 sequences: preemption
        {"max_running": 3},
    ],
    ids=["mixed-batch", "tiny-chunks", "chunks", "block-8", "block-32", "preemption", "few-running"],
)
def test_tokens_do_not_depend_on_how_the_work_is_cut(alone, overrides):
    engine = make_engine(**overrides)
    requests = [Request(number, prompt, greedy()) for number, prompt in enumerate(make_prompts(32))]
    assert run(engine, requests) == alone
    if "kv_cache_blocks" in overrides and overrides["kv_cache_blocks"] == 20:
        assert engine.scheduler.num_preemptions > 0


def test_prefix_hits_change_nothing(alone):
    engine = make_engine()
    requests = [Request(number, prompt, greedy()) for number, prompt in enumerate(make_prompts(32))]
    run(engine, requests)
    before = engine.blocks.num_hit_tokens
    again = [Request(number, prompt, greedy()) for number, prompt in enumerate(make_prompts(32))]
    assert run(engine, again) == alone
    assert engine.blocks.num_hit_tokens > before


def test_several_sequences_share_the_prompt_and_differ_by_seed():
    engine = make_engine()
    prompt = make_prompts(1, low=64, high=64)[0]
    params = SamplingParams(max_tokens=8, n=4, seed=5, ignore_eos=True)
    tokens = run(engine, [Request("a", prompt, params)])
    assert set(tokens) == {("a", i) for i in range(4)}
    assert len({tuple(t) for t in tokens.values()}) > 1
    assert engine.blocks.num_hit_tokens == 3 * 48, "siblings compute only the last block of the prompt"
    assert run(engine, [Request("b", prompt, params)]) == {("b", i): tokens["a", i] for i in range(4)}


def test_siblings_survive_preemption_of_the_first_sequence():
    engine = make_engine(kv_cache_blocks=16, block_size=8)
    params = SamplingParams(max_tokens=30, n=5, seed=1, ignore_eos=True)
    prompts = make_prompts(4, low=30, high=60)
    tokens = run(engine, [Request(i, prompt, params) for i, prompt in enumerate(prompts)])
    assert len(tokens) == 20 and all(len(t) == 30 for t in tokens.values())
    assert engine.scheduler.num_preemptions > 0


def test_seeded_sampling_does_not_depend_on_the_neighbours():
    prompt = make_prompts(1)[0]
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=7, ignore_eos=True)
    one = run(make_engine(), [Request("x", prompt, params)])["x", 0]
    neighbours = [Request(i, p, SamplingParams(max_tokens=12)) for i, p in enumerate(make_prompts(9, seed=3))]
    assert run(make_engine(), [*neighbours, Request("x", prompt, params)])["x", 0] == one


def test_finish_reasons():
    engine = make_engine(max_model_len=20)
    prompt = list(range(10))
    first = run(engine, [Request("a", prompt, greedy(100))])["a", 0]
    assert len(first) == 10, "the context is full"
    stop_at = first[3]
    position = first.index(stop_at)
    params = greedy(100, stop_token_ids=(stop_at,))
    assert run(engine, [Request("b", prompt, params)])["b", 0] == first[: position + 1]
    params = greedy(100, stop_token_ids=(stop_at,), min_tokens=8)
    assert len(run(engine, [Request("c", prompt, params)])["c", 0]) >= 8


def test_logprobs_are_reported_when_asked_for():
    engine = make_engine()
    engine.add(Request("a", [1, 2, 3], greedy(2, logprobs=3)))
    events = engine.step() + engine.step()
    for event in events:
        assert event.rank == 1 and len(event.top) == 3
        assert event.top[0] == (event.token_id, pytest.approx(event.logprob, abs=1e-5))


def test_abort_frees_everything_at_any_moment():
    rng = random.Random(0)
    engine = make_engine(kv_cache_blocks=24, block_size=8, max_batch_tokens=40)
    prompts = make_prompts(40, seed=2)
    for number, prompt in enumerate(prompts):
        engine.add(Request(number, prompt, SamplingParams(max_tokens=20, n=1 + number % 3, ignore_eos=True)))
    ended = set()
    while engine.has_work:
        for event in engine.step():
            assert event.request_id not in ended, "an aborted request spoke"
        victim = rng.randrange(40)
        engine.abort(victim)
        ended.add(victim)
        engine.blocks.check()
    assert engine.blocks.num_in_use == 0 and not engine.scheduler.running and engine.scheduler.num_waiting == 0


def test_load_counts_the_prompt_tokens_that_are_left():
    rng = random.Random(1)
    engine = make_engine(max_batch_tokens=40, max_running=4, max_waiting=100)
    requests = [Request(number, prompt, greedy(3)) for number, prompt in enumerate(make_prompts(30, seed=3))]
    for request in requests[:20]:
        engine.add(request)
    late = iter(requests[20:])
    while engine.has_work:
        engine.step()
        engine.abort(rng.randrange(20))
        if (request := next(late, None)) is not None:
            engine.add(request)
        alive = [r.sequences[0] for r in requests if engine.is_active(r.request_id)]
        assert engine.load().waiting_tokens == sum(max(0, s.num_prompt - s.num_computed) for s in alive)
    assert engine.load().waiting_tokens == 0


def test_abort_of_one_sequence_leaves_the_others():
    engine = make_engine()
    engine.add(Request("a", [1, 2, 3], SamplingParams(max_tokens=5, n=3, ignore_eos=True)))
    engine.abort("a", 1)
    seen = {}
    while engine.has_work:
        for event in engine.step():
            seen[event.index] = seen.get(event.index, 0) + 1
    assert seen == {0: 5, 2: 5}


def test_full_queue_is_refused_and_disturbs_nobody():
    engine = make_engine(max_waiting=2)
    for number in range(2):
        engine.add(Request(number, [1, 2], greedy(2)))
    with pytest.raises(UnavailableError, match=r"the queue is full: 2 requests wait \(max_waiting\)"):
        engine.add(Request("late", [1, 2], greedy(2)))
    tokens = {}
    while engine.has_work:
        for event in engine.step():
            tokens.setdefault(event.request_id, []).append(event.token_id)
    assert {number: len(t) for number, t in tokens.items()} == {0: 2, 1: 2}


def test_ended_requests_are_freed_without_garbage_collection():
    """With thousands of requests waiting, a collection stops the engine for hundreds of milliseconds."""
    engine = make_engine(max_running=2, max_waiting=4)
    requests = [
        Request("completed", [1, 2], greedy(2, n=2)),
        Request("cancelled while it runs", [1, 2], greedy(20)),
        Request("cancelled while it waits", [1, 2], greedy(2)),
        Request("timeout", [1, 2], greedy(100, timeout_s=0.01)),
        Request("rejected", [1, 2], greedy(2)),
    ]
    living = {request.request_id: weakref.ref(request) for request in requests}
    gc.collect()
    gc.disable()
    try:
        while requests:
            request = requests.pop(0)
            try:
                engine.add(request)
            except UnavailableError:
                assert request.request_id == "rejected"
        del request
        assert living["rejected"]() is None
        engine.step()
        for name in ("cancelled while it runs", "cancelled while it waits"):
            engine.abort(name)
        time.sleep(0.02)
        # The sequences of the last batch are kept until there is another one.
        engine.add(Request("last", [1, 2], greedy(9)))
        while engine.has_work:
            engine.step()
        assert [name for name, request in living.items() if request() is not None] == []
    finally:
        gc.enable()


def test_garbage_collection_finds_no_lists_of_tokens_in_waiting_requests():
    """It goes through every item of a list, and nothing within an array."""
    engine = make_engine(max_running=2, max_waiting=9)
    requests = [Request(number, [1] * 20, greedy(4)) for number in range(8)]
    for request in requests:
        engine.add(request)
    engine.step()
    held = [[*gc.get_referents(sequence), sequence.request.prompt_ids] for r in requests for sequence in r.sequences]
    assert all(len(item) < 20 for items in held for item in items if isinstance(item, list | tuple))


def test_timeout_ends_a_request_with_an_error():
    engine = make_engine()
    engine.add(Request("slow", [1, 2], greedy(100, timeout_s=0.01)))
    engine.add(Request("other", [1, 2], greedy(3)))
    time.sleep(0.02)
    events = []
    while engine.has_work:
        events += engine.step()
    ended = [event for event in events if isinstance(event, RequestEnded)]
    assert [event.request_id for event in ended] == ["slow"]
    assert ended[0].outcome == "timeout" and "after 0.01 s" in ended[0].message
    assert len([event for event in events if event.request_id == "other"]) == 3


def test_a_clock_that_is_set_makes_no_request_older(monkeypatch):
    """Ages, timeouts and early refusals go by monotonic time."""
    engine, real = make_engine(max_running=1), time.time
    model = StepModel()
    model.learn(measured_steps(count=20))
    for name in ("runs", "waits"):
        engine.add(Request(name, [1, 2], greedy(20, timeout_s=100)))
    events = []
    for number, offset_s in enumerate((0.0, 3600.0, -86400.0)):
        monkeypatch.setattr(time, "time", lambda offset_s=offset_s: real() + offset_s)
        engine.add(Request(number, [1, 2], greedy(2, timeout_s=100)))
        events += engine.shed(model, 50.0) + engine.step()
        assert 0 <= engine.load().oldest_waiting_s < 50
    assert len(events) == 3 and all(isinstance(event, TokenOutput) for event in events)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([1] * 128, r"128 tokens.*at most 127"),
        ([512], "between 0 and 511, got 512"),
        ([-1], "between 0 and 511, got -1"),
    ],
)
def test_unusable_prompts_are_named(prompt, message):
    engine = make_engine()
    with pytest.raises(InvalidRequestError, match=message):
        engine.add(Request("a", prompt, greedy()))
    assert not engine.has_work


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kv_cache_blocks": 7}, "kv_cache_blocks gives 7 KV blocks .* needs 8"),
        ({"kv_cache_blocks": None, "kv_cache_memory": 1000}, "raise kv_cache_memory or lower max_model_len"),
        ({"max_model_len": 5000}, "max_model_len must be at most the checkpoint's 1024"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"checkpoint": "dummy:nothing"}, "unknown dummy shape"),
    ],
)
def test_unusable_start_up_input_is_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_engine(**overrides)


def test_stats_tell_the_expert_load_of_the_last_step():
    engine = make_engine()
    assert engine.stats().active_slots == 0
    engine.add(Request("a", make_prompts(1, low=60, high=60)[0], greedy(1)))
    engine.step()
    stats = engine.stats()
    assert 2 <= stats.active_slots <= 8 and stats.assignments_per_token == 2


def test_settings_reach_the_moe_blocks_in_place():
    engine = make_engine(united="4")
    table = engine.runner.model.thresholds
    engine.set_settings(Settings(version=3, threshold_prefill=0.25, threshold_decode=0.5))
    assert engine.runner.model.thresholds is table
    assert table.tolist() == [[0.25, 0.5, 1.0, 1.0]] * 2
    assert engine.stats().settings_version == 3


@settings(max_examples=15)
@given(seed=st.integers(0, 2**20), blocks=st.integers(16, 40), budget=st.integers(4, 64))
def test_every_request_ends_once_under_random_traffic(seed, blocks, budget):
    rng = random.Random(seed)
    engine = make_engine(kv_cache_blocks=blocks, block_size=8, max_batch_tokens=budget, max_running=6, max_waiting=10)
    expected, counts, ended = {}, {}, set()
    for step in range(400):
        if step < 40 and rng.random() < 0.4:
            n, length, new = rng.randint(1, 3), rng.randint(1, 60), rng.randint(1, 12)
            params = SamplingParams(max_tokens=new, n=n, priority=rng.randint(-2, 2), ignore_eos=True)
            request = Request(step, [rng.randrange(4) for _ in range(length)], params)
            try:
                engine.add(request)
            except UnavailableError:
                continue
            expected[step] = n * new
        for event in engine.step():
            counts[event.request_id] = counts.get(event.request_id, 0) + 1
            if event.finish_reason:
                ended.add((event.request_id, event.index))
        if step >= 40 and not engine.has_work:
            break
    assert counts == expected and not engine.has_work
    assert engine.blocks.num_in_use == 0
    engine.blocks.check()
