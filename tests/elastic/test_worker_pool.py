"""Experts on workers: the same results whoever serves, dies, hangs or joins; plans that cannot be met change nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from backend.elastic import stragglers, worker_crew
from backend.elastic.expert_plan import PlanError
from backend.elastic.expert_worker import ExpertWorker, WorkerShape
from backend.elastic.worker_pool import WorkerPool
from backend.experts.expert_map import ExpertMap
from backend.experts.weight_store import ExpertWeights
from backend.kernels import reference
from tests.elastic.thread_workers import ThreadHost

LAYERS, EXPERTS, TOP_K, HIDDEN, SIZE = 2, 8, 3, 6, 4
EXPERT_BYTES = 3 * HIDDEN * SIZE * 4


class Cluster:
    """A pool on two workers beside the same experts all in one place."""

    def __init__(self, capacity: int = 6, timeout_s: float = 30.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.w13 = torch.randn(LAYERS, EXPERTS, 2 * SIZE, HIDDEN, generator=generator)
        self.w2 = torch.randn(LAYERS, EXPERTS, HIDDEN, SIZE, generator=generator)
        self.host = ThreadHost()
        shape = WorkerShape(LAYERS, EXPERTS, TOP_K, HIDDEN, SIZE, capacity)
        self.pool = WorkerPool(self.host, 2, shape, torch.device("cpu"), reference, [True] * 4, timeout_s)
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
        total = self.pool.telemetry()
        assert total.loads == total.warm + total.loading + total.failures + total.evictions, (
            "loaded: there, or has left"
        )

    def until(self, condition: Callable[[], bool]) -> None:
        """Steps until the condition holds."""
        limit = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < limit, "it never came"
            self.step(3)
            time.sleep(0.01)

    def is_whole(self) -> bool:
        """Whether both workers are there and hold what they shall."""
        crew = self.pool.crew
        settled = (
            len(crew.members) == crew._num_workers and not crew._starting and not crew._changing and crew._is_held()
        )
        return settled and self.pool.telemetry().resident_share == 1.0


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    torch.manual_seed(0)
    monkeypatch.setattr(worker_crew, "_RETRY_S", (0.0, 0.05))
    made = Cluster()
    yield made
    made.pool.close()


def skewed() -> np.ndarray:
    loads = np.ones((LAYERS, EXPERTS))
    loads[:, 0] = 40
    return loads


def test_workers_make_what_one_place_makes_and_their_memory_is_metered(cluster: Cluster) -> None:
    for rows in (1, 9, 40):
        cluster.step(rows)
    found = cluster.pool.telemetry()
    assert found.workers_lost == found.redone == found.bytes_moved == 0
    assert found.bytes_exchanged > 0 and found.resident_share == 1.0 and found.workers == 2
    assert found.assignments == 50 * TOP_K * LAYERS
    assert (found.warm, found.loading, found.cold, found.loads) == (LAYERS * EXPERTS, 0, 0, LAYERS * EXPERTS)
    cluster.pool.forget_counts()
    before = time.monotonic()
    time.sleep(0.05)
    found = cluster.pool.telemetry()
    spent = found.slot_byte_s / (LAYERS * EXPERTS * EXPERT_BYTES)
    assert 0.05 <= spent <= time.monotonic() - before + 0.5
    assert found.always_on_byte_s == found.slot_byte_s, "one copy of each expert"
    assert (found.assignments, found.loads, found.warm) == (0, 0, LAYERS * EXPERTS)


def test_layer_of_a_worker_that_dies_in_it_is_done_again_and_a_new_worker_joins(cluster: Cluster) -> None:
    lost = cluster.host.handles[0]
    lost.die_in_the_next_layer()
    cluster.step()
    found = cluster.pool.telemetry()
    assert (found.workers_lost, found.redone) == (1, 1)
    assert found.bytes_moved > 0, "what only the lost worker held comes from the engine's store"
    cluster.until(lambda: cluster.host.started == 3 and cluster.is_whole())
    assert lost.stopped
    moved = cluster.pool.telemetry().bytes_moved
    cluster.step()
    assert cluster.pool.telemetry().bytes_moved == moved


def test_all_workers_may_die_at_once(cluster: Cluster) -> None:
    for handle in cluster.host.handles.values():
        handle.die_in_the_next_layer()
    cluster.step()
    found = cluster.pool.telemetry()
    assert found.workers_lost == 2 and (found.warm, found.evictions) == (0, LAYERS * EXPERTS)
    cluster.until(cluster.is_whole)


def test_worker_that_hangs_is_given_up_after_the_timeout_alone_and_replaced() -> None:
    torch.manual_seed(0)
    slow = Cluster(timeout_s=1.0)
    released = threading.Event()
    slow.host.handles[1].before_run = released.wait
    slow.step()
    assert slow.pool.telemetry().workers_lost == 1
    slow.until(slow.is_whole)
    released.set()
    slow.pool.close()


def test_worker_that_holds_the_others_up_works_on_until_another_has_taken_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(stragglers, "_WINDOW", 12)
    cluster = Cluster(timeout_s=10.0)
    slow = cluster.host.handles[1]
    slow.before_run = lambda: time.sleep(0.03)
    cluster.until(lambda: cluster.host.handles[1] is not slow and cluster.is_whole())
    cluster.until(lambda: slow.stopped)
    found = cluster.pool.telemetry()
    assert (found.workers_relieved, found.workers_lost, found.redone) == (1, 0, 0)
    cluster.pool.close()


def test_experts_of_a_worker_that_does_not_come_back_move_to_the_other_and_back_when_it_does() -> None:
    torch.manual_seed(0)
    cluster = Cluster(capacity=EXPERTS)
    cluster.host.refuses = {0}
    cluster.host.handles[0].die_in_the_next_layer()
    cluster.until(lambda: cluster.pool.telemetry().plan_changes == 1)
    found = cluster.pool.telemetry()
    assert found.workers == 1 and found.resident_share == 1.0
    moved = found.bytes_moved
    cluster.step()
    assert cluster.pool.telemetry().bytes_moved == moved, "the engine's store is needed no more"
    cluster.host.refuses = set()
    cluster.until(lambda: cluster.is_whole() and cluster.pool.telemetry().plan_changes == 2)
    assert cluster.pool.crew.plan[0].any(1).all(), "every layer has experts on the worker that has joined"
    cluster.step(40)
    cluster.pool.close()


def test_workers_that_cannot_be_started_any_more_are_an_error(cluster: Cluster) -> None:
    cluster.host.refuses = {0, 1}
    cluster.host.handles[0].die_in_the_next_layer()
    cluster.until(lambda: cluster.pool.telemetry().workers == 1 and bool(cluster.pool.crew._retries))
    cluster.step()  # what one cannot hold, the engine runs
    cluster.host.handles[1].die_in_the_next_layer()
    with pytest.raises(RuntimeError, match="no expert worker is left, and none can be started: the cluster is gone"):
        cluster.until(lambda: False)


def test_new_plan_comes_into_force_and_results_stay(cluster: Cluster) -> None:
    before = cluster.pool.crew.plan
    cluster.pool.crew.replan(skewed())
    cluster.until(lambda: cluster.pool.telemetry().plan_changes == 1)
    assert not np.array_equal(cluster.pool.crew.plan, before)
    assert cluster.pool.crew.plan[:, :, 0].all(), "the busy expert has two copies"
    cluster.step(40)
    found = cluster.pool.telemetry()
    assert found.workers_lost == found.redone == 0 and found.bytes_moved > 0


def test_plan_that_does_not_fit_is_named_and_the_old_one_stays(cluster: Cluster) -> None:
    before = cluster.pool.crew.plan
    with pytest.raises(PlanError, match="2 workers with room for 3 experts of each layer cannot hold 8"):
        cluster.pool.crew.replan(capacity=3)
    assert cluster.pool.telemetry().refusals == 1
    assert cluster.pool.crew.plan is before
    cluster.step()


def test_plan_for_which_a_worker_lacks_memory_is_taken_back(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    before = cluster.pool.crew.plan

    def full() -> None:
        cluster.host.handles[1].before_put = lambda: None
        raise MemoryError("this worker is full")

    cluster.host.handles[1].before_put = full
    cluster.pool.crew.replan(skewed())
    cluster.until(lambda: cluster.pool.crew.plan is before and cluster.pool.telemetry().resident_share == 1.0)
    assert "could not be loaded into worker 1, the old one stays: this worker is full" in caplog.text
    cluster.until(lambda: all(np.array_equal(m.held, before[w]) for w, m in cluster.pool.crew.members.items()))
    found = cluster.pool.telemetry()
    assert found.plan_changes == found.workers_lost == 0 and found.failures > 0


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
    worker.keep(0, [])
    worker.put(0, 6, *weights)
    assert worker.run(0, rows).shape == (1, HIDDEN)
