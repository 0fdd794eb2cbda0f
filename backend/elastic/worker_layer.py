"""The engine's end of one layer whose experts are on workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from backend.elastic.expert_worker import WorkerShape
from backend.elastic.predictor import Ewma
from backend.experts.expert_map import MISSING, ExpertMap
from backend.experts.weight_store import ExpertWeights, Source

if TYPE_CHECKING:
    from backend.elastic.worker_pool import WorkerPool

#: Experts that the engine's own store runs at once.
_STORE_SLOTS = 4


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
        local = partial(self._local, hidden, slots, weights)
        return self._pool.run(self._layer, hidden, np.where(remote >= 0, remote, -1), weights, local)

    def original_weights(self) -> tuple[Tensor, Tensor]:
        """Copies w13 [E, 2 * I, M] and w2 [E, M, I] of all experts."""
        w13 = torch.stack([torch.cat((gate, up)) for gate, up, _ in self.sources])
        return w13, torch.stack([down for _, _, down in self.sources])

    def _local(self, hidden: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """What the engine's own slots make: the united experts."""
        own = torch.where(slots < self._first, slots, MISSING)
        if not (own >= 0).any():
            return torch.zeros_like(hidden)
        return self._pool.kernels.grouped_experts_forward(hidden, self.weights.w13, self.weights.w2, own, weights)


class OwnStore:
    """Runs experts that no worker holds, a few at a time, from where they were loaded."""

    def __init__(self, kernels: ModuleType, shape: WorkerShape, device: torch.device) -> None:
        self._kernels, self._num_experts = kernels, shape.num_experts
        self._slots = ExpertWeights(_STORE_SLOTS, shape.hidden_size, shape.expert_size, shape.dtype, device)

    def run(self, sources: Sequence[Source], hidden: Tensor, experts: np.ndarray, weights: Tensor) -> Tensor:
        """[T, M]: what experts [T, K] (-1: none) with these weights [E] make of hidden [T, M] with gate weights [T, K]."""
        out, store = torch.zeros_like(hidden), self._slots
        wanted = np.unique(experts[experts >= 0])
        for begin in range(0, len(wanted), _STORE_SLOTS):
            table = np.full(self._num_experts, MISSING)
            for slot, expert in enumerate(wanted[begin : begin + _STORE_SLOTS].tolist()):
                store.put(slot, *sources[expert])
                table[expert] = slot
            slots = torch.from_numpy(np.where(experts >= 0, table[experts], MISSING)).to(hidden.device)
            out += self._kernels.grouped_experts_forward(hidden, store.w13, store.w2, slots, weights)
        return out


def rows_of(hidden: Tensor, weights: Tensor) -> Callable[[np.ndarray], Tensor]:
    """Makes the rows [R, M + 2 * K] float32 (see WorkerShape) of the tokens that have some of the experts [T, K] (-1: none)."""
    tokens, gates = hidden.float(), weights.float()

    def rows(experts: np.ndarray) -> Tensor:
        chosen = np.flatnonzero((experts >= 0).any(1))
        wanted = torch.from_numpy(experts[chosen]).to(tokens)
        places = torch.from_numpy(chosen).to(tokens.device)
        return torch.cat([tokens[places], wanted, gates[places]], dim=1)

    return rows
