"""Experts on workers: the same results whoever serves, dies, hangs or joins; plans that cannot be met change nothing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from backend.elastic.exchange import WORKER, Link, LinkError
from backend.elastic.expert_worker import ExpertWorker, WorkerShape
from backend.elastic.worker_pool import PlanError, WorkerPool, make_plan
from backend.experts.expert_map import ExpertMap
from backend.experts.weight_store import ExpertWeights
from backend.kernels import reference

LAYERS, EXPERTS, TOP_K, HIDDEN, SIZE = 2, 8, 3, 6, 4


class ThreadHandle:
    """A worker in a thread of this process, which can be made to die or to hang in the middle of a layer."""

    def __init__(self, name: str, shape: WorkerShape, port: int, timeout_s: float) -> None:
        self.worker = ExpertWorker(shape, torch.device("cpu"))
        self.before_run: Callable[[], None] = lambda: None
        run = self.worker.run

        def hooked(layer: int, rows: Tensor) -> Tensor:
            self.before_run()
            return run(layer, rows)

        self.worker.run = hooked  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._serve, args=(name, port, timeout_s), daemon=True)
        self._thread.start()

    def _serve(self, name: str, port: int, timeout_s: float) -> None:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=10))
        link = Link(store, name, WORKER, timeout_s)
        # The link ends with this frame: its peer sees a closed connection.
        with contextlib.suppress(LinkError, ZeroDivisionError):
            self.worker.serve(link)

    def put(self, experts) -> None:
        for layer, expert, source in experts:
            self.worker.put(layer, expert, *source)

    def drop(self, experts) -> None:
        for layer, expert in experts:
            self.worker.drop(layer, expert)

    def stop(self) -> None:
        self.before_run = lambda: 1 / 0


class ThreadHost:
    def __init__(self) -> None:
        self.handles: list[ThreadHandle] = []
        self.refuses = False

    def start(self, name: str, shape: WorkerShape, store_port: int, timeout_s: float) -> ThreadHandle:
        if self.refuses:
            raise OSError("the cluster is gone")
        self.handles.append(ThreadHandle(name, shape, store_port, timeout_s))
        return self.handles[-1]


class Cluster:
    """A pool on two workers beside the same experts all in one place."""

    def __init__(self, capacity: int = 6, timeout_s: float = 30.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.w13 = torch.randn(LAYERS, EXPERTS, 2 * SIZE, HIDDEN, generator=generator)
        self.w2 = torch.randn(LAYERS, EXPERTS, HIDDEN, SIZE, generator=generator)
        self.host = ThreadHost()
        shape = WorkerShape(LAYERS, EXPERTS, TOP_K, HIDDEN, SIZE, capacity)
        self.pool = WorkerPool(self.host, 2, shape, reference, [True] * 4, timeout_s)
        self.maps = []
        for layer in range(LAYERS):
            sources = [(w13[:SIZE], w13[SIZE:], w2) for w13, w2 in zip(self.w13[layer], self.w2[layer], strict=True)]
            self.maps.append(ExpertMap(EXPERTS, 0, torch.device("cpu"), 0))
            weights = ExpertWeights(0, HIDDEN, SIZE, torch.float32, torch.device("cpu"))
            self.pool.add_layer(weights, self.maps[-1], sources)
        self.pool.start()

    def step(self, rows: int = 9) -> None:
        """A step of random routing, compared with one place."""
        self.pool.between_steps()
        for layer in range(LAYERS):
            hidden, gates = torch.randn(rows, HIDDEN), torch.rand(rows, TOP_K)
            experts = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(rows)])
            of_layer = self.pool.layers[layer]
            of_layer.admit(hidden, experts, torch.zeros(rows, dtype=torch.int8), None)
            found = of_layer.forward(hidden, self.maps[layer].expert_slots[experts], gates)
            expected = reference.grouped_experts_forward(hidden, self.w13[layer], self.w2[layer], experts, gates)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def until(self, condition: Callable[[], bool]) -> None:
        """Steps until the condition holds."""
        limit = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < limit, "it never came"
            self.step(3)
            time.sleep(0.02)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    torch.manual_seed(0)
    made = Cluster()
    yield made
    made.pool.close()


def test_workers_make_what_one_place_makes(cluster: Cluster) -> None:
    for rows in (1, 9, 40):
        cluster.step(rows)
    found = cluster.pool.telemetry()
    assert found.workers_lost == found.redone == found.bytes_moved == 0
    assert found.bytes_exchanged > 0 and found.resident_share == 1.0


def test_layer_of_a_worker_that_dies_in_it_is_done_again_and_a_new_worker_joins(cluster: Cluster) -> None:
    cluster.host.handles[0].before_run = lambda: 1 / 0
    cluster.step()
    found = cluster.pool.telemetry()
    assert (found.workers_lost, found.redone) == (1, 1)
    assert found.bytes_moved > 0, "what only the lost worker held comes from the engine's store"
    cluster.until(lambda: len(cluster.host.handles) == 3 and cluster.pool.telemetry().resident_share == 1.0)
    moved = cluster.pool.telemetry().bytes_moved
    cluster.step()
    assert cluster.pool.telemetry().bytes_moved == moved


def test_all_workers_may_die_at_once(cluster: Cluster) -> None:
    for handle in cluster.host.handles:
        handle.before_run = lambda: 1 / 0
    cluster.step()
    assert cluster.pool.telemetry().workers_lost == 2
    cluster.until(lambda: cluster.pool.telemetry().resident_share == 1.0)


def test_worker_that_hangs_is_given_up_after_the_timeout_and_replaced() -> None:
    torch.manual_seed(0)
    slow = Cluster(timeout_s=3.0)
    released = threading.Event()
    slow.host.handles[1].before_run = released.wait
    slow.step()
    assert slow.pool.telemetry().workers_lost == 1
    slow.until(lambda: slow.pool.telemetry().resident_share == 1.0)
    released.set()
    slow.pool.close()


def test_workers_that_cannot_be_started_any_more_are_an_error(cluster: Cluster) -> None:
    cluster.host.refuses = True
    cluster.host.handles[0].before_run = lambda: 1 / 0
    with pytest.raises(RuntimeError, match="expert workers cannot be started any more: the cluster is gone"):
        cluster.until(lambda: False)


def test_new_plan_comes_into_force_and_results_stay(cluster: Cluster) -> None:
    before = cluster.pool._plan
    loads = np.ones((LAYERS, EXPERTS))
    loads[:, 0] = 40
    cluster.pool.replan(loads)
    cluster.until(lambda: cluster.pool.telemetry().plan_changes == 1)
    assert cluster.pool._plan != before
    assert {worker for expert, worker in cluster.pool._plan[0] if expert == 0} == {0, 1}, (
        "the busy expert has two copies"
    )
    cluster.step(40)
    assert cluster.pool.telemetry().workers_lost == 0


def test_plan_that_cannot_be_met_is_named_and_the_old_one_stays(cluster: Cluster) -> None:
    before = cluster.pool._plan
    with pytest.raises(PlanError, match="2 workers with room for 3 experts of each layer cannot hold 8"):
        cluster.pool.replan(capacity=3)
    assert cluster.pool._plan == before
    cluster.step()


def test_plans_hold_every_expert_within_memory_and_give_the_busy_ones_more() -> None:
    rng = np.random.default_rng(0)
    for workers, capacity in ((2, 4), (3, 5), (4, 8)):
        loads = rng.exponential(size=(LAYERS, EXPERTS)) ** 2 * (rng.random((LAYERS, EXPERTS)) < 0.7)
        plan = make_plan(loads, capacity, workers)
        for pairs in plan:
            assert {expert for expert, _ in pairs} == set(range(EXPERTS))
            assert all(sum(w == worker for _, w in pairs) <= capacity for worker in range(workers))


def test_worker_refuses_what_it_has_no_room_for_and_rows_for_what_it_has_not() -> None:
    shape = WorkerShape(1, EXPERTS, TOP_K, HIDDEN, SIZE, capacity=1)
    worker = ExpertWorker(shape, torch.device("cpu"))
    weights = torch.randn(SIZE, HIDDEN), torch.randn(SIZE, HIDDEN), torch.randn(HIDDEN, SIZE)
    worker.put(0, 5, *weights)
    worker.put(0, 5, *weights)
    with pytest.raises(MemoryError, match="room for 1 experts of layer 0"):
        worker.put(0, 6, *weights)
    rows = torch.zeros(1, shape.row_width)
    rows[0, HIDDEN : HIDDEN + TOP_K] = torch.tensor([6.0, -1.0, -1.0])
    with pytest.raises(KeyError, match="does not hold"):
        worker.run(0, rows)
    worker.drop(0, 5)
    worker.put(0, 6, *weights)
    assert worker.run(0, rows).shape == (1, HIDDEN)
