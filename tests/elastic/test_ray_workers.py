"""Workers as Ray actors: real processes that are killed while requests run. One cluster and one engine for all tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
import torch

from backend.brownout.settings import Settings
from backend.elastic import ray_workers
from backend.elastic.exchange import LinkError
from backend.elastic.ray_workers import RayHandle
from backend.elastic.worker_pool import WorkerPool
from backend.engine.engine import Engine
from backend.errors import ConfigError, UnreachableError
from backend.serving.launch_processes import has_ended
from backend.serving.triton_server import PRODUCT_ROOT
from tests.elastic.greedy_tokens import PROMPTS, tokens
from tests.engine.test_brownout import FULL, make_engine, make_request, run
from tests.waiting import wait_until


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ConfigError, match="expert_pool is workers:2, which needs the package ray: install the extra workers"
    ):
        make_engine(expert_pool="workers:2")


@pytest.mark.parametrize(("error", "status"), [(LinkError("closed"), 0), (KeyError("expert 7"), 1)])
def test_a_worker_that_fails_says_why_before_its_process_ends(error, status, monkeypatch, caplog) -> None:
    ended: list[int] = []
    monkeypatch.setattr(ray_workers.os, "_exit", ended.append)
    monkeypatch.setattr(ray_workers, "Link", Mock(side_effect=error))
    actor = ray_workers.RayActor.__new__(ray_workers.RayActor)
    actor._worker, actor._device = Mock(), torch.device("cpu")
    actor._serve(Mock(), "engine", "127.0.0.1")
    assert ended == [status]
    assert ("KeyError: 'expert 7'" in caplog.text) == (status == 1)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    ray = pytest.importorskip("ray", reason="needs the package ray (extra workers)")
    handler = signal.getsignal(signal.SIGTERM)
    made = make_engine(expert_pool="workers:2", resident_experts="0.75", worker_cpus=1)
    assert signal.getsignal(signal.SIGTERM) is handler
    yield made
    made.close()
    ray.shutdown()


@pytest.fixture(scope="module")
def expected() -> dict[object, list[int]]:
    return tokens(make_engine())


def pool_of(engine: Engine) -> WorkerPool:
    pool = engine.runner.model.pool
    assert isinstance(pool, WorkerPool)
    return pool


def pids(engine: Engine) -> dict[int, int]:
    handles = {worker: member.handle for worker, member in pool_of(engine).crew.members.items()}
    assert all(isinstance(handle, RayHandle) for handle in handles.values())
    return {worker: handle.pid for worker, handle in handles.items()}


def step_until(engine: Engine, condition) -> None:
    limit = time.monotonic() + 150
    while not condition():
        assert time.monotonic() < limit, "it never came"
        run(engine, [make_request(0, PROMPTS[0], 24)])
        engine.blocks.clear_cache()


def test_workers_have_the_engines_priority(engine: Engine) -> None:
    """By default Ray's workers step back behind everything else, and the engine waits for them."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in pids(engine).values()] == [own, own]


def test_tokens_are_the_local_pools_also_after_copies_have_moved(engine: Engine, expected) -> None:
    assert tokens(engine) == expected
    pool = pool_of(engine)
    loads = np.ones((2, 8))
    loads[:, 5] = 30

    def move(step: int) -> None:
        if step == 3:
            pool.crew.replan(loads)

    assert tokens(engine, move) == expected
    step_until(engine, lambda: engine.expert_telemetry().plan_changes == 1)
    assert pool.crew.plan[:, :, 5].all()
    assert tokens(engine) == expected


def test_worker_killed_in_a_step_changes_no_token_and_another_joins(engine: Engine, expected) -> None:
    killed = pids(engine)[0]

    def kill(step: int) -> None:
        if step == 5:
            os.kill(killed, signal.SIGKILL)

    before = engine.expert_telemetry()
    assert tokens(engine, kill) == expected
    after = engine.expert_telemetry()
    assert after.workers_lost == before.workers_lost + 1 and after.redone > before.redone
    # A new plan may be on its way when the worker joins: copies move.
    step_until(engine, lambda: (now := engine.expert_telemetry()).workers == 2 and now.resident_share == 1)
    assert killed not in pids(engine).values()
    assert tokens(engine) == expected


def test_worker_that_hangs_in_a_step_changes_no_token_and_is_replaced(engine: Engine, expected) -> None:
    hanging, pool = pids(engine)[1], pool_of(engine)
    usual, pool.timeout_s = pool.timeout_s, 1.5

    def hang(step: int) -> None:
        if step == 5:
            os.kill(hanging, signal.SIGSTOP)

    try:
        assert tokens(engine, hang) == expected
    finally:
        pool.timeout_s = usual
    step_until(engine, lambda: engine.expert_telemetry().workers == 2)
    assert hanging not in pids(engine).values()


def test_brownout_on_workers_is_the_local_pools(engine: Engine) -> None:
    local = make_engine()
    local.set_settings(FULL)
    expected = tokens(local)
    exchanged = engine.expert_telemetry().bytes_exchanged
    engine.set_settings(FULL)
    assert tokens(engine) == expected
    full = engine.expert_telemetry().bytes_exchanged - exchanged
    engine.set_settings(Settings(version=2))
    tokens(engine)
    assert full < 0.5 * (engine.expert_telemetry().bytes_exchanged - exchanged - full), (
        "united experts need no exchange"
    )


def test_plan_that_the_workers_cannot_hold_is_refused_at_the_start(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="2 workers with room for 2 experts of each layer cannot hold 8"):
        make_engine(expert_pool="workers:2", resident_experts="0.25")


def test_cluster_without_room_is_named_at_the_start(engine: Engine) -> None:
    with pytest.raises(ConfigError, match=r"has 3 of the resource CPU, but 4 workers need 20 \(parameters expert_pool"):
        make_engine(expert_pool="workers:4", worker_cpus=5)


def test_cluster_that_cannot_be_reached_is_named() -> None:
    pytest.importorskip("ray", reason="needs the package ray (extra workers)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for wrong, reason, may_come in (
        (address, "Connection refused", True),
        ("nowhere", "an address is host:port", False),
    ):
        with pytest.raises(
            ConfigError, match=rf"Ray cluster at {wrong} \(parameter ray_address\) cannot be used.*{reason}"
        ) as found:
            make_engine(expert_pool="workers:2", ray_address=wrong)
        assert isinstance(found.value, UnreachableError) == may_come


_ENGINE_OF_A_CLUSTER = """
import psutil, sys, torch
from backend.elastic.expert_worker import WorkerShape
from backend.elastic.ray_workers import RayHost
RayHost("", 1, 1, WorkerShape(1, 2, 1, 32, 32, 2), torch.device("cpu"))
print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
sys.stdin.read()
"""


def test_nothing_of_its_own_cluster_outlives_a_killed_engine() -> None:
    pytest.importorskip("ray", reason="needs the package ray (extra workers)")
    command = [sys.executable, "-c", _ENGINE_OF_A_CLUSTER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PRODUCT_ROOT
    ) as engine:
        found = [psutil.Process(int(pid)) for pid in engine.stdout.readline().split()]
        assert {"raylet", "gcs_server"} <= {process.name() for process in found}
        engine.kill()
    wait_until(lambda: all(map(has_ended, found)), 30, "the end of all that Ray has started")
