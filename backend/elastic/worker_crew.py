"""The workers of a worker pool: who takes part, what each shall hold and does hold.

A lost or slow worker is started anew beside the running steps and joins between two of them; if that fails, its experts move to
the others. What a step reads (`members`, `holders`) changes between steps only, but for workers that are lost in one, and a
worker forgets an expert only when no step can ask it for that any more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from backend.elastic.exchange import ENGINE, Link
from backend.elastic.expert_plan import Holders, Plan, PlanError, make_plan
from backend.elastic.expert_worker import WorkerShape
from backend.experts.telemetry import ExpertTelemetry
from backend.experts.weight_store import Source

log = logging.getLogger(__name__)

#: Attempts in a row to start a worker, none being left, before the engine gives up, and seconds before each further one.
_ATTEMPTS = 3
_RETRY_S = (0.0, 1.0, 5.0, 30.0)
#: Seconds between two replacements of slow workers.
_RELIEF_PERIOD_S = 60.0


class WorkerHandle(Protocol):
    """A started worker, as its host lets the engine reach it beside the exchanges."""

    def put(self, experts: Sequence[tuple[int, int, Source]]) -> None:
        """Hand over experts as (layer, expert, weights). Raises if the worker is gone or has no room."""

    def keep(self, experts: Sequence[Sequence[int]]) -> None:
        """Have it forget all but these experts of each layer."""

    def stop(self) -> None:
        """End it, whatever it does; never raises."""


class WorkerHost(Protocol):
    """Starts workers somewhere."""

    #: The engine's address, as workers reach it.
    address: str

    def start(self, name: str, shape: WorkerShape, store_port: int) -> WorkerHandle:
        """A worker that meets the engine under `name` in the engine's store. Raises if none can be started."""


@dataclass
class Member:
    """A worker that takes part."""

    handle: WorkerHandle
    link: Link
    #: [L, E] what it holds for certain.
    held: np.ndarray
    #: What it will hold when `loading` is done.
    coming: np.ndarray | None = None
    loading: Future[int] | None = None

    @property
    def num_loading(self) -> int:
        """Copies on their way."""
        return 0 if self.coming is None else int((self.coming & ~self.held).sum())


@dataclass
class _Start:
    """A worker that is being started: beside, perhaps, the slow one whose place it takes."""

    member: Future[Member]
    #: [L, E] what it will hold.
    coming: np.ndarray
    failures: int = 0


def _stop_started(start: Future[Member]) -> None:
    if not start.cancelled() and start.exception() is None:
        start.result().handle.stop()


class WorkerCrew:
    """The workers of one engine, whose thread calls everything."""

    def __init__(
        self,
        host: WorkerHost,
        num_workers: int,
        shape: WorkerShape,
        device: torch.device,
        telemetry: ExpertTelemetry,
        source: Callable[[int, int], Source],
        loads: Callable[[], np.ndarray],
    ) -> None:
        """`shape` of every worker; `device` of the engine's tokens; `source` has the weights of a layer's expert, `loads` what is expected of them [L, E].

        `telemetry` counts what happens here. Raises PlanError if the workers have no room for all experts.
        """
        self._host, self._num_workers, self._telemetry = host, num_workers, telemetry
        self._device, self._source, self._loads = device, source, loads
        self.shape = shape
        self.members: dict[int, Member] = {}
        self._starting: dict[int, _Start] = {}
        #: When a worker that could not be started is tried again, and after how many failures.
        self._retries: dict[int, tuple[float, int]] = {}
        self._generation = 0
        uniform = np.ones((shape.num_layers, shape.num_experts))
        #: What shall be held, and what to go back to if that cannot be loaded.
        self.plan = make_plan(uniform, [shape.capacity] * num_workers)
        self._former: Plan | None = None
        self._changing = False
        #: What is held.
        self.holders = Holders(np.zeros_like(self.plan))
        self._next_relief_s = 0.0
        self._metered_s = time.monotonic()
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))
        self._background = ThreadPoolExecutor(2 * num_workers, thread_name_prefix="expert workers")

    def start(self) -> None:
        """Start all workers and wait until they hold their experts. Raises what kept one from starting."""
        for worker in range(self._num_workers):
            self._begin(worker)
        try:
            for worker, start in self._starting.items():
                self.members[worker] = start.member.result()
        except BaseException:
            self.close()
            raise
        self._starting.clear()
        self._changed()

    def close(self) -> None:
        """End all workers, also those that are being started."""
        self._background.shutdown(wait=False, cancel_futures=True)
        for start in self._starting.values():
            start.member.add_done_callback(_stop_started)
        for member in self.members.values():
            member.link.stop()
            member.handle.stop()
        self.members.clear()
        self._starting.clear()

    def between_steps(self) -> None:
        """To be called before every step: workers that are ready join, copies that are loaded come into use.

        Raises RuntimeError when no worker is left and none could be started several times in a row.
        """
        self._collect_started()
        self._collect_loaded()
        self._load()

    def replan(self, loads: np.ndarray | None = None, capacity: int | None = None) -> None:
        """Begin a plan for loads [L, E] (default: those of the past); copies come into use as they are loaded.

        Raises PlanError, and the present plan stays, if it cannot be met. While workers or another plan are on their way nothing
        is planned. A plan that a worker then cannot load is taken back.
        """
        plan = self._make_plan(loads, capacity)
        if self._changing or self._starting or np.array_equal(plan, self.plan):
            return
        self._former, self.plan, self._changing = self.plan, plan, True
        self._load()

    def lost(self, worker: int, error: Exception) -> None:
        """A worker has failed: its part is for others to do, and a new one is started in its place."""
        log.error("expert worker %d is lost: %s", worker, error)
        self._telemetry.workers_lost += 1
        self._end(self.members.pop(worker))
        self._changed()
        if worker not in self._starting:
            self._begin(worker)

    def _end(self, member: Member) -> None:
        self._telemetry.evictions += int(member.held.sum())
        self._telemetry.failures += member.num_loading
        self._background.submit(member.handle.stop)

    def relieve(self, worker: int) -> None:
        """A worker holds the others up: another one is started and takes its place when it is ready."""
        if worker in self._starting or time.monotonic() < self._next_relief_s:
            return
        log.warning("expert worker %d is slow, another one will take its place", worker)
        self._next_relief_s = time.monotonic() + _RELIEF_PERIOD_S
        self._telemetry.workers_relieved += 1
        self._begin(worker)

    def meter(self) -> None:
        """Bring the telemetry up to date: the states of the copies, and their memory × time since the last call."""
        found, now = self._telemetry, time.monotonic()
        byte_s = self.shape.expert_bytes * (now - self._metered_s)
        found.slot_byte_s += (found.warm + found.loading) * byte_s
        found.always_on_byte_s += self.holders.counts.size * byte_s
        self._metered_s = now
        starting = [start.coming for start in self._starting.values()]
        loading = [member.coming for member in self.members.values() if member.coming is not None]
        found.warm = int(self.holders.counts.sum())
        found.loading = sum(int(coming.sum()) for coming in starting) + sum(
            m.num_loading for m in self.members.values()
        )
        found.cold = int((~np.any([self.holders.counts > 0, *starting, *loading], axis=0)).sum())

    def _make_plan(self, loads: np.ndarray | None = None, capacity: int | None = None) -> Plan:
        if loads is None:
            loads = self._loads()
        room = self.shape.capacity if capacity is None else capacity
        rooms = [0 if n in self._retries else room for n in range(self._num_workers)]
        try:
            return make_plan(loads, rooms, self.plan)
        except PlanError:
            self._telemetry.refusals += 1
            raise

    def _begin(self, worker: int, failures: int = 0) -> None:
        self._generation += 1
        name = f"worker-{worker}-{self._generation}"
        coming = self.plan[worker].copy()
        self._starting[worker] = _Start(self._background.submit(self._start, worker, name, coming), coming, failures)
        self._telemetry.loads += int(coming.sum())
        self.meter()

    def _start(self, worker: int, name: str, wanted: np.ndarray) -> Member:
        handle = self._host.start(name, self.shape, self._store.port)
        try:
            # A connection of its own: while one thread waits on a store, others cannot use it.
            store = dist.TCPStore("127.0.0.1", self._store.port, is_master=False)
            link = Link(store, name, ENGINE, self._host.address, self._device)
            handle.put(self._sources(wanted))
        except BaseException:
            handle.stop()
            raise
        return Member(handle, link, wanted)

    def _sources(self, wanted: np.ndarray) -> list[tuple[int, int, Source]]:
        return [(layer, e, self._source(layer, e)) for layer, e in np.argwhere(wanted).tolist()]

    def _collect_started(self) -> None:
        for worker, start in [(w, s) for w, s in self._starting.items() if s.member.done()]:
            del self._starting[worker]
            try:
                member = start.member.result()
            except Exception as error:
                self._telemetry.failures += int(start.coming.sum())
                self._could_not_start(worker, start.failures + 1, error)
                continue
            if (slow := self.members.get(worker)) is not None:
                self._end(slow)
            self.members[worker] = member
            self._telemetry.bytes_moved += int(member.held.sum()) * self.shape.expert_bytes
            log.info("expert worker %d has joined", worker)
            self._changed()
            if start.failures:
                self._replan_for_members()
        for worker, (when, failures) in list(self._retries.items()):
            if worker not in self._starting and time.monotonic() >= when:
                self._begin(worker, failures)

    def _could_not_start(self, worker: int, failures: int, error: Exception) -> None:
        log.error("expert worker %d could not be started: %s", worker, error)
        if worker in self.members:
            return  # only slow: it goes on
        if not self.members and not self._starting and failures >= _ATTEMPTS:
            raise RuntimeError(f"no expert worker is left, and none can be started: {error}") from error
        self._retries[worker] = (time.monotonic() + _RETRY_S[min(failures, len(_RETRY_S) - 1)], failures)
        if failures == 1:
            self._replan_for_members()

    def _replan_for_members(self) -> None:
        """Plan anew because the workers have changed."""
        for worker in self.members.keys() & self._retries.keys():
            del self._retries[worker]
        try:
            plan = self._make_plan()
        except PlanError as error:
            log.error("the engine runs what no worker holds, because %s", error)
        else:
            self.plan, self._former, self._changing = plan, None, True

    def _load(self) -> None:
        """Have workers that do not hold what they shall begin to load it."""
        changed = False
        for worker, member in self.members.items():
            wanted = self.plan[worker]
            if member.loading is not None or np.array_equal(member.held, wanted):
                continue
            new = wanted & ~member.held
            self._telemetry.loads += int(new.sum())
            self._telemetry.evictions += int((member.held & ~wanted).sum())
            # What it shall hold no more gives way first; until the new copies are there, others or the engine serve.
            member.held, member.coming = member.held & wanted, wanted.copy()
            kept = [np.flatnonzero(row).tolist() for row in member.held]
            member.loading = self._background.submit(self._hand_over, member.handle, kept, new)
            changed = True
        if changed:
            self._changed()

    def _hand_over(self, handle: WorkerHandle, kept: list[list[int]], new: np.ndarray) -> int:
        handle.keep(kept)
        handle.put(self._sources(new))
        return int(new.sum()) * self.shape.expert_bytes

    def _collect_loaded(self) -> None:
        for worker, member in [(w, m) for w, m in self.members.items() if m.loading and m.loading.done()]:
            loading, coming, copies = member.loading, member.coming, member.num_loading
            member.loading = member.coming = None
            assert loading is not None and coming is not None
            try:
                self._telemetry.bytes_moved += loading.result()
            except Exception as error:
                self._telemetry.failures += copies
                if self._former is None:
                    self.lost(worker, error)
                else:
                    log.error("a plan could not be loaded into worker %d, the old one stays: %s", worker, error)
                    self.plan, self._former, self._changing = self._former, None, False
                continue
            member.held = coming
            self._changed()
        if self._changing and self._is_held():
            self._former, self._changing = None, False
            self._telemetry.plan_changes += 1

    def _is_held(self) -> bool:
        return all(np.array_equal(member.held, self.plan[worker]) for worker, member in self.members.items())

    def _changed(self) -> None:
        """The members or what they hold have changed."""
        held = np.zeros_like(self.plan)
        for worker, member in self.members.items():
            held[worker] = member.held
        self.holders = Holders(held)
        self.meter()
