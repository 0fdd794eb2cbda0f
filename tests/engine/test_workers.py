"""Expert workers in the engine: the local pool's tokens, whatever happens to workers while requests run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from backend.brownout.settings import Settings
from backend.engine.engine import Engine
from backend.errors import ConfigError
from backend.models import registry
from tests.elastic.greedy_tokens import PROMPTS, tokens
from tests.elastic.thread_workers import ThreadHost
from tests.engine.test_brownout import FULL, ids, make_engine, make_request, run


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "RayHost", lambda *_: ThreadHost())
        made = make_engine(expert_pool="workers:2", resident_experts="0.75")
    yield made
    made.close()


@pytest.fixture(scope="module")
def local() -> dict[object, list[int]]:
    return tokens(make_engine())


def test_tokens_are_the_local_pools_while_copies_move_and_a_worker_dies(engine: Engine, local) -> None:
    assert tokens(engine) == local
    pool = engine.runner.model.pool
    loads = np.ones((2, 8))
    loads[:, 5] = 30

    def disturb(step: int) -> None:
        if step == 2:
            pool.crew.replan(loads)
        if step == 5:
            pool.crew._host.handles[0].die_in_the_next_layer()

    assert tokens(engine, disturb) == local
    found = engine.expert_telemetry()
    assert found.workers_lost == 1 and found.redone == 1 and found.plan_changes <= 1
    assert tokens(engine) == local


def test_united_experts_stay_in_the_engine(engine: Engine) -> None:
    reference = make_engine()
    reference.set_settings(FULL)
    before = engine.expert_telemetry().bytes_exchanged
    engine.set_settings(FULL)
    try:
        assert tokens(engine) == tokens(reference)
    finally:
        engine.set_settings(Settings(version=2))
    dim = engine.expert_telemetry().bytes_exchanged
    tokens(engine)
    assert dim - before < 0.5 * (engine.expert_telemetry().bytes_exchanged - dim)


def test_bfloat16_model_runs_on_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "RayHost", lambda *_: ThreadHost())
    engine = make_engine(expert_pool="workers:2", dtype="bfloat16")
    outputs = run(engine, [make_request(i, prompt, 4) for i, prompt in enumerate(PROMPTS)])
    assert [len(ids(found)) for found in outputs.values()] == [4] * len(PROMPTS)
    engine.close()


def test_settings_that_workers_do_not_go_with_are_named() -> None:
    for wrong, message in (
        ({"expert_pool": "workers:0"}, "expert_pool must be local, resident or workers:N"),
        ({"cuda_graphs": "on"}, "cuda_graphs must be auto or off with expert_pool workers"),
        ({"async_scheduling": "on"}, "async_scheduling is on, which needs expert_pool local"),
        ({"worker_cpus": 0}, "worker_cpus must be at least 1"),
        ({"exchange_timeout_s": 0.0}, "exchange_timeout_s must be greater than 0"),
        ({"resident_experts": "0.25"}, "2 workers with room for 2 experts of each layer cannot hold 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_engine(**{"expert_pool": "workers:2", **wrong})
