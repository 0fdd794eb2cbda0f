"""Steps launched ahead: the same tokens as without, in the order that lets the device go on while the host reads."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from torch import Tensor

from backend.config import EngineConfig
from backend.engine.engine import Engine
from backend.engine.request import Request, TokenOutput
from backend.engine.sampling_params import SamplingParams
from backend.errors import ConfigError
from backend.kernels.transfer import HostCopy
from backend.models.attention import KVCache

KINDS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 6, "logprobs": 2},
    {"temperature": 1.0, "seed": 7, "n": 2},
    {"temperature": 1.0, "seed": 8, "min_tokens": 6},
    {"temperature": 0.7, "seed": 9, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
]
#: Every eighth token ends a sequence, so that steps ahead often have a row too many.
STOP = list(range(0, 512, 8))


def make_engine(setting: str, **options: object) -> Engine:
    place = {"checkpoint": "dummy:tiny", "dtype": "float32", "device": "cpu", "async_scheduling": setting}
    sizes = {"max_model_len": 64, "max_running": 4, "max_batch_tokens": 32, "block_size": 4}
    return Engine(EngineConfig(**{**place, **sizes, **options}))


def count_ahead(engine: Engine) -> list[bool]:
    """A list to which each launched step adds whether the tokens before it were not known yet."""
    launched, run = [], engine.runner.run

    def counting(schedule, *previous):
        launched.append(bool(previous))
        return run(schedule, *previous)

    engine.runner.run = counting
    return launched


def serve(engine: Engine, kinds: list[dict], seed: int) -> dict[tuple, list[TokenOutput]]:
    """Requests that come while others run, until all have ended."""
    rng, made = random.Random(seed), {}
    requests = []
    for i in range(14):
        kind = kinds[i % len(kinds)]
        stop = [] if i % 3 == 0 else STOP
        params = SamplingParams(max_tokens=rng.randint(1, 20), stop_token_ids=stop, ignore_eos=True, **kind)
        prompt = [rng.randrange(512) for _ in range(rng.randint(1, 40))]
        requests.append((rng.randint(0, 12), Request(i, prompt, params)))
    steps = 0
    while requests or engine.has_work:
        for at, request in list(requests):
            if at <= steps:
                engine.add(request)
                requests.remove((at, request))
        for event in engine.step():
            assert isinstance(event, TokenOutput)
            made.setdefault((event.request_id, event.index), []).append(event)
        steps += 1
        assert steps < 1000
    engine.blocks.check()
    return made


class Repeat:
    """A graph that calls its function again, and writes where the first result lies."""

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        self.function, self.result = function, function()
        return self.result

    def replay(self) -> None:
        self.result.copy_(self.function())


def use_graphs(engine: Engine) -> None:
    runner = engine.runner
    settings = {"dtype": runner.model.dtype, "device": runner.device}
    runner.kv_cache = KVCache(runner.model.config, runner.num_blocks + 1, runner.block_size, **settings)
    runner.graphs = runner.make_graphs(engine.config, Repeat)


@pytest.mark.parametrize("blocks", [64, 22], ids=["roomy", "preempting"])
@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "replayed"])
@pytest.mark.parametrize("kinds", [KINDS[:2], KINDS], ids=["plain", "all"])
def test_tokens_and_ends_are_those_of_steps_one_after_the_other(kinds: list[dict], graphs: bool, blocks: int) -> None:
    made = {}
    for setting in ("off", "on"):
        engine = make_engine(setting, kv_cache_blocks=blocks)
        if graphs and setting == "on":
            use_graphs(engine)
        launched = count_ahead(engine)
        made[setting] = serve(engine, kinds, seed=blocks)
        assert any(launched) == (setting == "on")
    assert made["on"].keys() == made["off"].keys()
    for key, expected in made["off"].items():
        found = made["on"][key]
        assert [event.token_id for event in found] == [event.token_id for event in expected]
        assert [event.finish_reason for event in found] == [event.finish_reason for event in expected]
        assert [event.rank for event in found] == [event.rank for event in expected]


def test_the_next_step_is_launched_before_tokens_are_read(monkeypatch) -> None:
    engine, happened = make_engine("on"), []
    run, numpy = engine.runner.run, HostCopy.numpy
    engine.runner.run = lambda *args: (happened.append("run"), run(*args))[1]
    monkeypatch.setattr(HostCopy, "numpy", lambda copy: (happened.append("read"), numpy(copy))[1])
    engine.add(Request("a", [1, 2, 3], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)))
    steps = []
    while engine.has_work:
        happened.clear()
        assert len(engine.step()) == 1
        steps.append(list(happened))
    # The last token's step is not followed by one: its length was known.
    assert steps == [["run", "run", "read"], ["run", "read"], ["run", "read"], ["read"]]


def test_prompts_are_computed_in_steps_ahead() -> None:
    """A long one in parts, beside one that decodes; one with a penalty needs to know its tokens."""
    engine = make_engine("on")
    launched, run = [], engine.runner.run

    def recording(schedule, *previous):
        launched.append((schedule.previous_rows is not None, schedule.num_tokens, len(schedule.partial)))
        return run(schedule, *previous)

    engine.runner.run = recording
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    engine.add(Request("a", [1] * 5, params))
    engine.step()
    engine.add(Request("b", [2] * 50, params))
    engine.step()
    engine.step()
    assert launched == [(False, [5], 0), (True, [1], 0), (True, [1, 31], 1), (True, [1, 19], 0)]
    engine.add(Request("c", [3] * 5, SamplingParams(max_tokens=4, temperature=0.0, repetition_penalty=1.5)))
    for _ in range(3):
        engine.step()
    assert [ahead for ahead, *_ in launched[-2:]] == [True, False], "c's next token depends on the one before"


def test_an_aborted_request_leaves_nothing_of_its_step_ahead() -> None:
    engine = make_engine("on")
    for name in ("a", "b"):
        engine.add(Request(name, [1, 2, 3], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)))
    for _ in range(3):
        engine.step()
    engine.abort("a")
    assert {event.request_id for event in engine.step()} == {"b"}
    engine.abort("b")
    assert not engine.has_work
    engine.blocks.check()
    engine.add(Request("c", [1, 2, 3], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)))
    events = []
    while engine.has_work:
        events += engine.step()
    assert [event.request_id for event in events] == ["c"] * 3


def test_new_requests_are_taken_while_others_decode() -> None:
    engine = make_engine("on")
    engine.add(Request("a", [1] * 5, SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)))
    engine.step()
    engine.add(Request("b", [2] * 5, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)))
    seen = [event.request_id for _ in range(4) for event in engine.step()]
    assert "b" in seen


def test_settings_name_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match="async_scheduling must be one of auto, on, off"):
        EngineConfig(async_scheduling="maybe")
    assert not make_engine("auto").overlap, "a CPU computes in the same thread"


@pytest.mark.gpu
def test_a_gpu_makes_the_same_tokens_with_and_without() -> None:
    made = []
    for setting in ("off", "on"):
        engine = make_engine(setting, device="cuda")
        made.append({key: [e.token_id for e in events] for key, events in serve(engine, KINDS[:2], seed=1).items()})
    assert made[0] == made[1]
