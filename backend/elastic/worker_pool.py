"""Worker pool: the experts of a model on workers that come, go and fail.

An engine routes and keeps the united experts; the rows of a layer go to the workers that hold the experts they need, at most one
exchange with each. What a worker does not answer in time is done again, by other workers that hold the experts or from the
engine's own store (the memory-mapped checkpoint): nothing of a failed exchange is used, so no result changes but for the order of
sums.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from backend.elastic.exchange import LinkError
from backend.elastic.expert_plan import NOBODY, PlanError
from backend.elastic.expert_worker import WorkerShape
from backend.elastic.functions import STATES
from backend.elastic.stragglers import Stragglers
from backend.elastic.worker_crew import WorkerCrew, WorkerHost
from backend.elastic.worker_layer import OwnStore, WorkerExperts, rows_of
from backend.experts.expert_map import ExpertMap
from backend.experts.telemetry import ExpertTelemetry
from backend.experts.weight_store import ExpertWeights, Source

log = logging.getLogger(__name__)

#: Steps between two plans.
_PLAN_PERIOD = 256
#: A worker for which a layer waits less than this share of the timeout is never slow.
_NEVER_SLOW = 1 / 500


class WorkerPool:
    """All layers' experts on `num_workers` workers. The engine's thread calls everything."""

    always_waits = True  # a missing expert is run by somebody else, never replaced

    def __init__(
        self,
        host: WorkerHost,
        num_workers: int,
        shape: WorkerShape,
        device: torch.device,
        kernels: ModuleType,
        waits: Sequence[bool],
        timeout_s: float,
    ) -> None:
        """`shape` of every worker; `timeout_s` of an exchange: a worker that takes longer counts as lost.

        Raises PlanError if the workers have no room for all experts.
        """
        self._device, self.kernels, self.waits = device, kernels, list(waits)
        #: Seconds of an exchange.
        self.timeout_s = timeout_s
        self.layers: list[WorkerExperts] = []
        self._telemetry = ExpertTelemetry()
        self.crew = WorkerCrew(
            host,
            num_workers,
            shape,
            device,
            self._telemetry,
            source=lambda layer, expert: self.layers[layer].sources[expert],
            loads=lambda: np.stack([layer.expected() for layer in self.layers]),
        )
        self._stragglers = Stragglers(timeout_s * _NEVER_SLOW)
        self._own: OwnStore | None = None
        self._steps = self._turn = 0

    def add_layer(self, weights: ExpertWeights, expert_map: ExpertMap, sources: Sequence[Source]) -> WorkerExperts:
        """The pool of the next layer with experts, to be its block's."""
        self.layers.append(WorkerExperts(self, len(self.layers), weights, expert_map, sources))
        return self.layers[-1]

    def widen(self, times: int) -> None:
        """Workers that start from now on hold experts widened as ExpertWeights.widen says."""
        shape = self.crew.shape
        self.crew.shape = replace(shape, expert_size=shape.expert_size * times)

    def start(self) -> None:
        """Start all workers and wait until they hold their experts. Raises what kept one from starting."""
        self._own = OwnStore(self.kernels, self.crew.shape, self._device)
        self.crew.start()

    def close(self) -> None:
        """End all workers."""
        self.crew.close()

    # --- between steps --------------------------------------------------------------------------------------------

    def between_steps(self, captured: bool = False) -> None:
        """To be called before every step: the workers and what they hold may change.

        Raises RuntimeError when no worker is left and none could be started several times in a row.
        """
        holders = self.crew.holders
        self.crew.between_steps()
        self._steps += 1
        if self._steps % _PLAN_PERIOD == 0:
            try:
                self.crew.replan()
            except PlanError as error:
                log.error("%s", error)
        if self.crew.holders is not holders:
            self._stragglers.forget()

    def telemetry(self) -> ExpertTelemetry:
        """The totals, with the share of experts that workers hold now."""
        self.crew.meter()
        return replace(self._telemetry, resident_share=self.crew.holders.share, workers=len(self.crew.members))

    def forget_counts(self) -> None:
        """Begin the totals anew: what came before was no request."""
        self.crew.meter()
        for entry in fields(ExpertTelemetry):
            if entry.name not in STATES:
                setattr(self._telemetry, entry.name, entry.default)

    def count(self, assignments: int) -> None:
        """So many more assignments were routed."""
        self._telemetry.assignments += assignments

    # --- a layer of a step ----------------------------------------------------------------------------------------

    def run(
        self, layer: int, hidden: Tensor, experts: np.ndarray, weights: Tensor, local: Callable[[], Tensor]
    ) -> Tensor:
        """[T, M]: what `local` makes beside the workers, and what experts [T, K] (-1: none) make of hidden [T, M] with
        weights [T, K]."""
        assert self._own is not None
        open_, out, rows = experts >= 0, None, rows_of(hidden, weights)
        while out is None or open_.any():
            owner = np.full(experts.shape, NOBODY)
            owner[open_] = self.crew.holders.workers_of(layer, experts[open_])
            sent = {w: owner == w for w in np.unique(owner[owner != NOBODY]).tolist()}
            sent = {w: mine for w, mine in sent.items() if self._send(w, layer, rows, np.where(mine, experts, -1))}
            deadline = time.monotonic() + self.timeout_s
            if out is None:
                out = local()
            own = open_ & (owner == NOBODY)
            if own.any():
                out += self._own.run(self.layers[layer].sources, hidden, np.where(own, experts, -1), weights)
                self._telemetry.bytes_moved += len(np.unique(experts[own])) * self.crew.shape.expert_bytes
            open_ = open_ & ~own
            for worker in self._receive(sent, deadline, out):
                open_ &= ~sent[worker]
            self._telemetry.redone += bool(open_.any())
        return out

    def _send(self, worker: int, layer: int, rows: Callable[[np.ndarray], Tensor], experts: np.ndarray) -> bool:
        content = rows(experts)
        try:
            self.crew.members[worker].link.begin(layer, content, self.crew.shape.hidden_size)
        except LinkError as error:
            self.crew.lost(worker, error)
            return False
        self._telemetry.bytes_exchanged += 4 * len(content) * (self.crew.shape.row_width + self.crew.shape.hidden_size)
        return True

    def _receive(self, sent: dict[int, np.ndarray], deadline: float, out: Tensor) -> list[int]:
        """Add the results of what was sent ([T, K] by worker) to out [T, M]; returns the workers whose have come."""
        workers = list(sent)
        waited: dict[int, float] = {}
        results: dict[int, Tensor] = {}
        self._turn = (self._turn + 1) % max(1, len(workers))
        for worker in workers[self._turn :] + workers[: self._turn]:
            started = time.monotonic()
            try:
                results[worker] = self.crew.members[worker].link.finish(deadline)
            except LinkError as error:
                self.crew.lost(worker, error)
                continue
            waited[worker] = time.monotonic() - started
        for worker, part in sorted(results.items()):  # always summed in the same order
            rows = torch.from_numpy(np.flatnonzero(sent[worker].any(1)))
            out.index_add_(0, rows.to(out.device), part.to(out))
        if (slow := self._stragglers.observe(waited)) is not None:
            self.crew.relieve(slow)
        return list(waited)
