"""Worker pool: the experts of a model on workers that come, go and fail.

An engine routes and keeps the united experts; the rows of a layer go to the workers that hold the experts they need, at most one
exchange with each. What a worker does not answer in time is done again, by other workers that hold the experts or from the
engine's own store (the memory-mapped checkpoint): nothing of a failed exchange is used, so no result changes but for the order of
sums. A lost worker is started anew beside the running steps and joins between two of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from backend.elastic.exchange import ENGINE, Link, LinkError
from backend.elastic.expert_worker import WorkerShape
from backend.elastic.placer import place
from backend.elastic.predictor import Ewma
from backend.elastic.scaler import scale, straggler_bound
from backend.errors import ConfigError
from backend.experts.expert_map import MISSING, ExpertMap
from backend.experts.resident import ExpertTelemetry, Source
from backend.experts.weight_store import ExpertWeights

log = logging.getLogger(__name__)

#: Seconds in which a worker has to appear and take its experts, and attempts in a row before the engine gives up.
_START_TIMEOUT_S, _ATTEMPTS = 60.0, 3
#: Largest load of a replica, as a multiple of a worker's fair share.
_STRAGGLER_FACTOR = 1.0
#: Steps between two plans.
_PLAN_PERIOD = 256
#: Experts that the engine's own store runs at once.
_STORE_SLOTS = 4

#: [L] for each layer (expert, worker) copies.
Plan = tuple[frozenset[tuple[int, int]], ...]


class PlanError(ConfigError):
    """The workers cannot hold what a plan needs; the plan in force stays."""


class WorkerHandle(Protocol):
    """A started worker, as its host lets the engine reach it beside the exchanges."""

    def put(self, experts: Sequence[tuple[int, int, Source]]) -> None:
        """Hand over experts as (layer, expert, weights). Raises if the worker is gone or has no room."""

    def drop(self, experts: Sequence[tuple[int, int]]) -> None:
        """Have it forget (layer, expert) copies."""

    def stop(self) -> None:
        """End it, whatever it does; never raises."""


class WorkerHost(Protocol):
    """Starts workers somewhere."""

    def start(self, name: str, shape: WorkerShape, store_port: int, timeout_s: float) -> WorkerHandle:
        """A worker that meets the engine under `name` in the engine's store. Raises if none can be started."""


@dataclass
class _Member:
    handle: WorkerHandle
    link: Link


def make_plan(loads: np.ndarray, capacity: int, num_workers: int, former: Plan | None = None) -> Plan:
    """Copies of each layer's experts for loads [L, E]; `capacity` copies of a layer fit into each worker.

    Every expert gets at least one copy; what room is left goes to the most loaded ones. Copies of `former` stay where that keeps
    the balance. Raises PlanError if the workers do not hold one copy of each expert.
    """
    num_experts, budget = loads.shape[1], capacity * num_workers
    if budget < num_experts:
        raise PlanError(
            f"{num_workers} workers with room for {capacity} experts of each layer cannot hold {num_experts}: more workers "
            "(parameter expert_pool) or a larger share in each (resident_experts) are needed"
        )
    plan = []
    for layer, row in enumerate(loads):
        # An expert without tokens now may have some in the next step.
        wanted = np.maximum(row, 1e-6 + 0.01 * row.mean()).tolist()
        bound = straggler_bound(wanted, num_workers, _STRAGGLER_FACTOR)
        replicas = scale(wanted, budget=budget, max_replicas=num_workers, bound=bound)
        costs = [load / max(1, count) for load, count in zip(wanted, replicas, strict=True)]
        warm = former[layer] if former else ()
        plan.append(place(replicas, costs, [capacity] * num_workers, warm).copies)
    return tuple(plan)


class WorkerPool:
    """All layers' experts on `num_workers` workers. The engine's thread calls everything."""

    always_waits = True  # a missing expert is run by somebody else, never replaced

    def __init__(
        self,
        host: WorkerHost,
        num_workers: int,
        shape: WorkerShape,
        kernels: ModuleType,
        waits: Sequence[bool],
        timeout_s: float,
    ) -> None:
        """`shape` of every worker; `timeout_s` of an exchange: a worker that takes longer counts as lost."""
        self._host, self._num_workers, self._shape, self.kernels = host, num_workers, shape, kernels
        self.waits = list(waits)
        self._timeout_s = timeout_s
        self.layers: list[WorkerExperts] = []
        self._telemetry = ExpertTelemetry()
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=_START_TIMEOUT_S))
        self._background = ThreadPoolExecutor(num_workers + 1, thread_name_prefix="expert workers")
        self._members: dict[int, _Member] = {}
        self._starting: dict[int, Future[_Member]] = {}
        self._generation = self._failures = self._steps = 0
        uniform = np.ones((shape.num_layers, shape.num_experts))
        self._plan = make_plan(uniform, shape.capacity, num_workers)
        self._next_plan: tuple[Plan, Future[None]] | None = None
        self._holders: list[list[list[int]]] = []
        self._scratch: ExpertWeights | None = None

    # --- making ---------------------------------------------------------------------------------------------------

    def add_layer(self, weights: ExpertWeights, expert_map: ExpertMap, sources: Sequence[Source]) -> WorkerExperts:
        """The pool of the next layer with experts, to be its block's."""
        self.layers.append(WorkerExperts(self, len(self.layers), weights, expert_map, sources))
        return self.layers[-1]

    def start(self) -> None:
        """Start all workers and wait until they hold their experts. Raises what kept one from starting."""
        for worker in range(self._num_workers):
            self._begin(worker)
        try:
            for worker, future in list(self._starting.items()):
                self._members[worker] = future.result()
        except BaseException:
            self.close()
            raise
        finally:
            self._starting.clear()
        self._write_holders()

    def close(self) -> None:
        """End all workers."""
        for member in self._members.values():
            member.handle.stop()
        self._members.clear()
        self._background.shutdown(wait=False, cancel_futures=True)

    # --- between steps --------------------------------------------------------------------------------------------

    def between_steps(self, captured: bool = False) -> None:
        """To be called before every step: workers that are ready join, plans that are loaded come into force.

        Raises RuntimeError when workers could not be started several times in a row.
        """
        for worker, future in [(w, f) for w, f in self._starting.items() if f.done()]:
            del self._starting[worker]
            try:
                self._members[worker] = future.result()
                self._failures = 0
                log.info("expert worker %d has joined", worker)
            except Exception as error:
                self._failures += 1
                if self._failures >= _ATTEMPTS:
                    raise RuntimeError(f"expert workers cannot be started any more: {error}") from error
                log.error("expert worker %d could not be started: %s", worker, error)
                self._begin(worker)
            self._write_holders()
        if self._next_plan is not None and self._next_plan[1].done():
            self._commit_plan()
        self._steps += 1
        if self._steps % _PLAN_PERIOD == 0:
            try:
                self.replan()
            except PlanError as error:
                log.error("%s", error)

    def replan(self, loads: np.ndarray | None = None, capacity: int | None = None) -> None:
        """Begin a plan for loads [L, E] (default: those of the past); it comes into force when its copies are loaded.

        Raises PlanError, and the present plan stays, if it cannot be met. While workers or another plan are on their way nothing
        is planned.
        """
        if loads is None:
            loads = np.stack([layer.expected() for layer in self.layers])
        room = self._shape.capacity if capacity is None else capacity
        plan = make_plan(loads, room, self._num_workers, self._plan)
        if self._next_plan is not None or len(self._members) < self._num_workers or plan == self._plan:
            return
        # What the new plan has no more gives way first; until the new copies are there, others or the store serve.
        gone = self._plan
        self._plan = tuple(new & old for new, old in zip(plan, gone, strict=True))
        self._write_holders()
        members = dict(self._members)
        self._next_plan = plan, self._background.submit(self._load_plan, members, gone, plan)

    def telemetry(self) -> ExpertTelemetry:
        """The totals, with the share of experts that workers hold now."""
        held = sum(bool(devices) for layer in self._holders for devices in layer)
        experts = self._shape.num_layers * self._shape.num_experts
        return replace(self._telemetry, resident_share=held / experts)

    def count(self, assignments: int) -> None:
        """So many more assignments were routed."""
        self._telemetry.assignments += assignments

    def widen(self, times: int) -> None:
        """Workers that start from now on hold experts widened as ExpertWeights.widen says."""
        self._shape = replace(self._shape, expert_size=self._shape.expert_size * times)

    def _begin(self, worker: int) -> None:
        self._generation += 1
        self._starting[worker] = self._background.submit(
            self._start, worker, f"worker-{worker}-{self._generation}", self._plan
        )

    def _start(self, worker: int, name: str, plan: Plan) -> _Member:
        handle = self._host.start(name, self._shape, self._store.port, self._timeout_s)
        try:
            # A connection of its own: while one thread waits on a store, others cannot use it.
            store = dist.TCPStore("127.0.0.1", self._store.port, is_master=False)
            link = Link(store, name, ENGINE, self._timeout_s)
            handle.put(self._sources(plan, worker))
        except BaseException:
            handle.stop()
            raise
        return _Member(handle, link)

    def _sources(self, plan: Plan, worker: int) -> list[tuple[int, int, Source]]:
        copies = [(layer, e) for layer, pairs in enumerate(plan) for e, device in sorted(pairs) if device == worker]
        return [(layer, e, self.layers[layer].sources[e]) for layer, e in copies]

    def _load_plan(self, members: dict[int, _Member], former: Plan, plan: Plan) -> None:
        for worker, member in members.items():
            gone = tuple(old - new for old, new in zip(former, plan, strict=True))
            member.handle.drop(
                [(layer, e) for layer, pairs in enumerate(gone) for e, w in sorted(pairs) if w == worker]
            )
            member.handle.put(self._sources(tuple(new - old for old, new in zip(former, plan, strict=True)), worker))

    def _commit_plan(self) -> None:
        assert self._next_plan is not None
        plan, loading = self._next_plan
        self._next_plan = None
        try:
            loading.result()
        except Exception as error:
            # Which copies have arrived is not known: only those that both plans have count.
            log.error("a plan could not be loaded, the experts that did not move stay: %s", error)
        else:
            self._plan = plan
            self._telemetry.plan_changes += 1
        self._write_holders()

    def _write_holders(self) -> None:
        """[L][E] the workers that hold each expert and are there."""
        self._holders = [[[] for _ in range(self._shape.num_experts)] for _ in range(self._shape.num_layers)]
        for layer, pairs in enumerate(self._plan):
            for expert, worker in sorted(pairs):
                if worker in self._members:
                    self._holders[layer][expert].append(worker)

    # --- a layer of a step ----------------------------------------------------------------------------------------

    def run(self, layer: int, hidden: Tensor, experts: np.ndarray, weights: Tensor, out: Tensor) -> None:
        """Add to out [T, M] what experts [T, K] (-1: none) make of hidden [T, M] with weights [T, K]."""
        open_ = experts >= 0
        while open_.any():
            owner = self._owners(layer, experts, open_)
            sent: dict[int, np.ndarray] = {}
            for worker in np.unique(owner[owner >= 0]).tolist():
                mine = owner == worker
                if self._send(worker, layer, hidden, np.where(mine, experts, -1), weights):
                    sent[worker] = mine
            own = open_ & (owner < 0)
            if own.any():
                self._run_own(layer, hidden, np.where(own, experts, -1), weights, out)
                open_ &= ~own
            for worker, mine in sent.items():
                rows = torch.from_numpy(np.flatnonzero(mine.any(1)))
                results = torch.empty(len(rows), hidden.shape[1])
                try:
                    self._members[worker].link.receive_results(results)
                except LinkError as error:
                    self._lost(worker, error)
                    continue
                out.index_add_(0, rows.to(out.device), results.to(out))
                open_ &= ~mine
            self._telemetry.redone += bool(open_.any())

    def _owners(self, layer: int, experts: np.ndarray, open_: np.ndarray) -> np.ndarray:
        """[T, K] the worker of each open assignment, the copies of an expert in turn; -1: the engine itself, or not open."""
        owner = np.full(experts.shape, -1)
        for expert in np.unique(experts[open_]).tolist():
            if holders := self._holders[layer][expert]:
                places = np.nonzero(open_ & (experts == expert))
                owner[places] = np.array(holders)[np.arange(len(places[0])) % len(holders)]
        return owner

    def _send(self, worker: int, layer: int, hidden: Tensor, experts: np.ndarray, weights: Tensor) -> bool:
        rows = torch.from_numpy(np.flatnonzero((experts >= 0).any(1)))
        parts = (hidden.cpu().float(), torch.from_numpy(experts).float(), weights.cpu())
        try:
            self._members[worker].link.send_rows(layer, torch.cat([part[rows] for part in parts], dim=1))
        except LinkError as error:
            self._lost(worker, error)
            return False
        self._telemetry.bytes_exchanged += 4 * len(rows) * (self._shape.row_width + self._shape.hidden_size)
        return True

    def _lost(self, worker: int, error: LinkError) -> None:
        """A worker has failed: its part is for others to do, and a new one is started in its place."""
        log.error("expert worker %d is lost: %s", worker, error)
        self._telemetry.workers_lost += 1
        member = self._members.pop(worker)
        self._write_holders()
        self._background.submit(member.handle.stop)
        self._begin(worker)

    def _run_own(self, layer: int, hidden: Tensor, experts: np.ndarray, weights: Tensor, out: Tensor) -> None:
        """Run experts that no worker holds, a few at a time, from the engine's own store."""
        if self._scratch is None:
            like, shape = self.layers[layer].weights, self._shape
            self._scratch = ExpertWeights(
                _STORE_SLOTS, shape.hidden_size, shape.expert_size, like.w13.dtype, like.w13.device
            )
        scratch = self._scratch
        wanted = np.unique(experts[experts >= 0])
        for begin in range(0, len(wanted), _STORE_SLOTS):
            table = np.full(self._shape.num_experts, MISSING)
            for slot, expert in enumerate(wanted[begin : begin + _STORE_SLOTS].tolist()):
                scratch.put(slot, *self.layers[layer].sources[expert])
                table[expert] = slot
                self._telemetry.bytes_moved += scratch.slot_bytes
            slots = torch.from_numpy(np.where(experts >= 0, table[experts], MISSING)).to(out.device)
            out += self.kernels.grouped_experts_forward(hidden, scratch.w13, scratch.w2, slots, weights)


class WorkerExperts:
    """One layer of a WorkerPool; an ExpertPool. Slots `num_slots + e` of the map's table stand for expert e on some worker."""

    def __init__(
        self, pool: WorkerPool, layer: int, weights: ExpertWeights, expert_map: ExpertMap, sources: Sequence[Source]
    ) -> None:
        self._pool, self._layer, self._first = pool, layer, expert_map.num_slots
        self.weights, self.sources = weights, sources
        self._use = Ewma(expert_map.num_experts)
        expert_map.expert_slots.copy_(expert_map.num_slots + torch.arange(expert_map.num_experts))

    def admit(self, hidden: Tensor, experts: Tensor, token_class: Tensor, num_tokens: Tensor | None) -> None:
        """See ExpertPool; an exchange cannot be captured."""
        assert num_tokens is None
        loads = torch.bincount(experts.flatten().cpu(), minlength=len(self.sources))
        self._pool.count(int(loads.sum()))
        self._use.observe(loads)

    def expected(self) -> np.ndarray:
        """[E] share of assignments expected of each expert, from past steps."""
        return self._use.predict(1.0).numpy()

    def forward(self, hidden: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """See ExpertPool."""
        remote = (slots - self._first).cpu().numpy()
        local = torch.where(slots < self._first, slots, MISSING)
        if len(self.weights.w2):
            run = self._pool.kernels.grouped_experts_forward
            out = run(hidden, self.weights.w13, self.weights.w2, local, weights)
        else:
            out = torch.zeros_like(hidden)
        self._pool.run(self._layer, hidden, np.where(remote >= 0, remote, -1), weights, out)
        return out

    def original_weights(self) -> tuple[Tensor, Tensor]:
        """Copies w13 [E, 2 * I, M] and w2 [E, M, I] of all experts."""
        w13 = torch.stack([torch.cat((gate, up)) for gate, up, _ in self.sources])
        return w13, torch.stack([down for _, _, down in self.sources])
