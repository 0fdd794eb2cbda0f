"""Resident pool: one device with room for only some of the experts of each layer.

A bounded number of slots holds a layer's experts; the others stay where they were loaded from (the memory-mapped checkpoint on
a CPU, pinned host memory for a CUDA device). Experts that are expected to be needed are fetched beside the running step and take
the slots of those that are expected least. A missing expert that tokens are routed to is served by the united expert of its
group, which is always there, so nothing stalls; or, for classes of tokens that may not be replaced, the step waits for it.

What a step may read changes only where no step reads it: a slot is first unmapped, then filled, then mapped. Without captured
graphs that may happen just before a layer runs; with them the tables change between steps only.

A step must not pay for the bookkeeping: unless it has to wait for experts, its layers only leave behind what their tokens chose,
which is booked for all layers at once before the next step; prediction looks at some rows, and in small steps layers take turns;
what is fetched at once is bounded.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from backend.experts.expert_map import ExpertMap
from backend.experts.ledger import Ledger
from backend.experts.mover import Mover
from backend.experts.resident_layer import ResidentExperts
from backend.experts.telemetry import ExpertTelemetry
from backend.experts.weight_store import ExpertWeights, Source

#: Share of all layers' slots that past loads may have refilled in one step.
_REFILL_STEP = 1 / 32
#: Steps of up to so many tokens are small: each layer is predicted in every `_TURNS`th of them only. Their loads change little
#: from one to the next, and they are short. So many rows are enough to predict the loads of a large one.
_FEW_TOKENS = 64
_TURNS = 8
_ROWS = 128


class Predictor(Protocol):
    """Tells from what a layer sees which experts a later one will need; layers are counted among those with experts."""

    @property
    def pairs(self) -> Collection[tuple[int, int]]:
        """Layers that it can tell of, each with how many layers before them it looks."""

    def loads(self, hidden: Tensor, layer: int, distance: int) -> Tensor:
        """Expected assignments [E] in `layer` of tokens that come to the layer `distance` before it as `hidden` [T, M]."""


class ResidentPool:
    """The resident pool of a whole model: its layers, what they have in common, and what is done between steps."""

    ledger: Ledger

    def __init__(
        self,
        mover: Mover,
        kernels: ModuleType,
        waits: Sequence[bool],
        predictor: Predictor | None,
        prefetch: bool,
        num_layers: int,
    ) -> None:
        """`waits` [classes]: token classes whose missing experts are waited for. Without a predictor past loads tell what to
        fetch; `prefetch` false: nothing is fetched ahead. `num_layers` with experts are to be added."""
        self.mover, self.kernels, self.waiting_classes = mover, kernels, np.array(waits)
        self.counters = ExpertTelemetry()
        self.layers: list[ResidentExperts] = []
        #: By layer the experts [T, K] that a step's tokens chose, not booked yet.
        self.chosen: list[Tensor | None] = [None] * num_layers
        self._predictor, self._prefetches = predictor, prefetch
        self._captured = False
        self._turn = 0
        self._seen: tuple[Tensor | None, bool] = (None, False)
        self._counted_at_s = time.monotonic()
        #: Distance at which each layer is predicted within the step; layers without are fetched for between steps.
        distances: dict[int, int] = {}
        for layer, distance in sorted(predictor.pairs if predictor else (), reverse=True):
            distances[layer] = distance  # the least one wins: it sees most
        self._predicted = set(distances)
        #: Layers that are predicted when a layer runs, with the distance.
        self._predicted_at: dict[int, list[tuple[int, int]]] = {}
        for layer, distance in distances.items():
            self._predicted_at.setdefault(layer - distance, []).append((layer, distance))

    @property
    def always_waits(self) -> bool:
        """Whether no assignment is ever served by another expert because its own is missing."""
        return bool(self.waiting_classes.all())

    @property
    def waits(self) -> list[bool]:
        """[classes] whether a missing expert is waited for."""
        return self.waiting_classes.tolist()

    def add_layer(self, weights: ExpertWeights, expert_map: ExpertMap, sources: Sequence[Source]) -> ResidentExperts:
        """The pool of the next layer with experts, to be its block's."""
        if not self.layers:
            self.ledger = Ledger(len(self.chosen), expert_map.num_experts, expert_map.num_resident)
            #: [L, E] assignments of the last captured step.
            self.captured_loads = torch.zeros(self.ledger.slot_of.shape, dtype=torch.int64, device=weights.w13.device)
        self.layers.append(ResidentExperts(self, len(self.layers), weights, expert_map, sources))
        return self.layers[-1]

    # --- within a step --------------------------------------------------------------------------------------------

    def waits_for_any(self, token_class: Tensor) -> bool:
        """Whether missing experts are waited for in the step of these tokens; all its layers ask for the same tensor."""
        if self._seen[0] is not token_class:
            self._seen = (token_class, bool(self.waiting_classes[token_class.cpu().numpy()].any()))
        return self._seen[1]

    def runs(self, layer: int, hidden: Tensor) -> None:
        """`layer` is about to run on hidden [T, M]: fetch what later layers are predicted to need in this step."""
        if not self._prefetches or self._predictor is None:
            return
        num_tokens = len(hidden)
        for later, distance in self._predicted_at.get(layer, ()):
            if num_tokens <= _FEW_TOKENS and (later + self._turn) % _TURNS:
                continue
            rows = hidden[:: -(-num_tokens // _ROWS)].cpu()
            loads = self._predictor.loads(rows, later, distance).numpy()
            # Ties, of which there are many, are for the past to decide; it also keeps what comes back every few steps.
            self.layers[later].prefetch(loads / loads.sum() + self.ledger.expected[later], self.ledger.slots_in_use)

    # --- between steps --------------------------------------------------------------------------------------------

    def between_steps(self, captured: bool) -> None:
        """To be called before every step. `captured`: the step will replay a graph."""
        if self._captured:
            self.ledger.observe(self.captured_loads.cpu().numpy(), self.counters)
        else:
            self._book()
        for layer in self.layers:
            layer.commit()
        if self._prefetches:
            self._refill(captured)
        self._captured = captured
        self._turn += 1
        self._seen = (None, False)

    def use_share(self, share: float) -> None:
        """Hold at most this share of each layer's experts, but at least one of each, and no more than there are slots for.

        From the next step on: what lies in the slots that are given up is missing, slots that are taken into use again fill as
        others do. Not to be called while a step runs.
        """
        ledger = self.ledger
        num_slots = min(ledger.expert_in.shape[1], max(1, int(share * ledger.slot_of.shape[1] + 1e-9)))
        if num_slots == ledger.slots_in_use:
            return
        self._count_memory()
        if num_slots < ledger.slots_in_use:
            self._book()
            for layer in self.layers:
                layer.leave_slots(num_slots)
        ledger.slots_in_use = num_slots

    def forget_counts(self) -> None:
        """Begin the totals anew: what came before was no request."""
        self.chosen = [None] * len(self.chosen)
        self._counted_at_s = time.monotonic()
        for field in fields(ExpertTelemetry):
            setattr(self.counters, field.name, field.default)

    def telemetry(self) -> ExpertTelemetry:
        """The totals, with the share as of now. Not to be called while a step runs."""
        self._book()
        self._count_memory()
        ledger = self.ledger
        warm, loading = int(np.count_nonzero(ledger.slot_of >= 0)), int(np.count_nonzero(ledger.moving))
        size = ledger.slot_of.size
        return replace(
            self.counters, resident_share=warm / size, warm=warm, loading=loading, cold=size - warm - loading
        )

    def _refill(self, captured: bool) -> None:
        """Fetch what past steps make worth having, within this step's bounds."""
        ledger = self.ledger
        left = max(1, int(_REFILL_STEP * ledger.slots_in_use * len(self.layers)))
        for layer in ledger.worth_filling():
            # Within a captured step nothing can be fetched.
            if captured or layer not in self._predicted:
                left -= self.layers[layer].prefetch(ledger.expected[layer], left)
                if left <= 0:
                    break

    def _book(self) -> None:
        """Take note of what the last step's tokens chose."""
        chosen = [experts for experts in self.chosen if experts is not None]
        if len(chosen) == len(self.chosen):
            loads = self.ledger.loads(torch.stack(chosen).flatten(1).cpu().numpy())
            self.ledger.observe(loads, self.counters)
        if chosen:
            self.chosen = [None] * len(self.chosen)

    def _count_memory(self) -> None:
        now = time.monotonic()
        byte_s = sum(layer.slot_bytes for layer in self.layers) * (now - self._counted_at_s)
        self.counters.slot_byte_s += self.ledger.slots_in_use * byte_s
        self.counters.always_on_byte_s += self.ledger.slot_of.shape[1] * byte_s
        self._counted_at_s = now
