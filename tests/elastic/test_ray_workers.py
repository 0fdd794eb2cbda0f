"""Workers as Ray actors: real processes that are killed while requests run."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from backend.elastic.ray_workers import RayHandle
from backend.engine.engine import Engine
from backend.engine.request import TokenOutput
from backend.errors import ConfigError
from tests.engine.test_brownout import ids, make_engine, make_prompts, make_request, run

PROMPTS = make_prompts(8)


def requests() -> list:
    return [make_request(i, prompt, 24) for i, prompt in enumerate(PROMPTS)]


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ConfigError, match="expert_pool is workers:2, which needs the package ray: install the extra elastic"
    ):
        make_engine(expert_pool="workers:2")


@pytest.mark.slow
def test_cluster_that_cannot_be_reached_is_named() -> None:
    pytest.importorskip("ray", reason="needs the package ray (extra elastic)")
    with pytest.raises(ConfigError, match=r"Ray cluster at 127.0.0.1:1 .*cannot be used"):
        make_engine(expert_pool="workers:2", ray_address="127.0.0.1:1")


@pytest.fixture(scope="module")
def engine():
    ray = pytest.importorskip("ray", reason="needs the package ray (extra elastic)")
    made = make_engine(expert_pool="workers:2", resident_experts="0.75")
    yield made
    made.runner.model.pool.close()
    ray.shutdown()


def pids(engine: Engine) -> list[int]:
    handles = [member.handle for member in engine.runner.model.pool._members.values()]
    assert all(isinstance(handle, RayHandle) for handle in handles)
    return [handle.pid for handle in handles]


@pytest.mark.slow
def test_tokens_are_the_local_pools_also_when_a_worker_is_killed_in_a_step(engine: Engine) -> None:
    expected = {name: ids(outputs) for name, outputs in run(make_engine(), requests()).items()}
    assert {name: ids(outputs) for name, outputs in run(engine, requests()).items()} == expected
    engine.blocks.clear_cache()
    for request in requests():
        engine.add(request)
    found: dict[object, list[int]] = {}
    steps = 0
    while engine.has_work:
        if steps == 5:
            os.kill(pids(engine)[0], signal.SIGKILL)
        for event in engine.step():
            assert isinstance(event, TokenOutput), event
            found.setdefault(event.request_id, []).append(event.token_id)
        steps += 1
    assert found == expected
    telemetry = engine.expert_telemetry()
    assert telemetry.workers_lost == 1 and telemetry.redone >= 1
    limit = time.monotonic() + 60
    while engine.expert_telemetry().resident_share < 1 and time.monotonic() < limit:
        run(engine, requests()[:1])
        engine.blocks.clear_cache()
    assert len(pids(engine)) == 2 and engine.expert_telemetry().resident_share == 1


@pytest.mark.slow
def test_plan_that_the_workers_cannot_hold_is_refused_at_the_start(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="2 workers with room for 2 experts of each layer cannot hold 8"):
        make_engine(expert_pool="workers:2", resident_experts="0.25")
