"""Resident pool: one device with room for only some of the experts of each layer.

A bounded number of slots holds a layer's experts; the others stay where they were loaded from (the memory-mapped checkpoint on
a CPU, pinned host memory for a CUDA device). Experts that are expected to be needed are fetched beside the running step and take
the slots of those that are expected least. A missing expert that tokens are routed to is served by the united expert of its
group, which is always there, so nothing stalls; or, for classes of tokens that may not be replaced, the step waits for it.

What a step may read changes only where no step reads it: a slot is first unmapped, then filled, then mapped. Without captured
graphs that may happen just before a layer runs; with them the tables change between steps only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from backend.elastic.predictor import Ewma, LoadPredictor
from backend.experts.expert_map import MISSING, ExpertMap
from backend.experts.mover import Move, Mover, mover_for
from backend.experts.weight_store import ExpertWeights

log = logging.getLogger(__name__)

#: gate [I, M], up [I, M], down [M, I] of one expert, wherever they lie.
Source = tuple[Tensor, Tensor, Tensor]
#: How many times as much use must be expected of an expert as of the one whose slot it takes.
_MARGIN = 1.25
#: Share of a layer's slots that may be refilled at once; the rest goes on serving.
_REFILL = 1 / 8


@dataclass
class ExpertTelemetry:
    """Totals since the start, over all layers; zeros where all experts are always there."""

    #: Share of the experts that can serve now.
    resident_share: float = 1.0
    #: Assignments whose own expert was missing and which others served.
    misses: int = 0
    #: Layers of steps that waited for weights, and how long in all.
    stalls: int = 0
    stall_s: float = 0.0
    #: Experts fetched ahead; those of them that were then used before they had to go.
    prefetches: int = 0
    prefetch_hits: int = 0
    #: Bytes copied into slots since the model was loaded.
    bytes_moved: int = 0
    #: Assignments in all.
    assignments: int = 0
    #: Workers that take part now; workers that were lost or too slow and had others take their place.
    workers: int = 0
    workers_lost: int = 0
    workers_relieved: int = 0
    #: Layers of steps of which a part was done again, and changes of what the workers hold.
    redone: int = 0
    plan_changes: int = 0
    #: Bytes of tokens and results sent and received, and the memory of the copies that workers hold × time, in GB·s.
    bytes_exchanged: int = 0
    gb_s: float = 0.0


class ResidentExperts:
    """One layer's experts; an ExpertPool. The engine's thread calls everything.

    Slots `num_slots + e` in the table of an ExpertMap stand for expert e, for which the step waits although all slots are in
    use: `forward` runs such experts after the others, in as many rounds as it takes.
    """

    def __init__(
        self,
        weights: ExpertWeights,
        expert_map: ExpertMap,
        sources: Sequence[Source],
        waits: np.ndarray,
        kernels: ModuleType,
        mover: Mover,
        counters: ExpertTelemetry,
        announce: Callable[[Tensor], None],
    ) -> None:
        """`waits` [classes] bool: token classes whose missing experts are waited for; `announce` is told what hidden states
        [T, M] this layer is about to run on. The first experts become resident."""
        self._weights, self._map, self._sources = weights, expert_map, sources
        self._waits, self._kernels, self._mover, self._counters = waits, kernels, mover, counters
        self._announce = announce
        self.num_experts, self.num_slots = expert_map.num_experts, expert_map.num_resident
        #: [E] the mapped slot of each expert or MISSING, and [S] the mapped expert of each slot or MISSING.
        self.slot_of = np.full(self.num_experts, MISSING)
        self.expert_in = np.full(self.num_slots, MISSING)
        #: Slot and copy by expert that is being fetched.
        self._moving: dict[int, tuple[int, Move]] = {}
        self._fresh = np.zeros(self.num_experts, bool)  # fetched ahead and not used yet
        self._late = np.empty(0, np.int64)  # experts that this step has to run after the others
        self._use = Ewma(self.num_experts)
        #: [E] assignments of the last captured step.
        self._captured_loads = torch.zeros(self.num_experts, dtype=torch.int64, device=weights.w13.device)
        for expert in range(self.num_slots):
            self._fetch(expert, expert)
        self._write_table()

    # --- a step ---------------------------------------------------------------------------------------------------

    def admit(self, hidden: Tensor, experts: Tensor, token_class: Tensor, num_tokens: Tensor | None) -> None:
        """See ExpertPool. Afterwards every expert that must not be missing is in a slot or will be run late."""
        if num_tokens is not None:
            rows = torch.arange(len(experts), device=experts.device).unsqueeze(1)
            counted = (rows < num_tokens).expand_as(experts).flatten().long()
            self._captured_loads.zero_().index_add_(0, experts.flatten(), counted)
            return
        self._announce(hidden)
        chosen = experts.cpu().numpy()
        loads = np.bincount(chosen.ravel(), minlength=self.num_experts)
        self.commit()
        missing = (loads > 0) & (self.slot_of < 0)
        if missing.any():
            waiting = self._waits[token_class.cpu().numpy()]
            needed = missing & (np.bincount(chosen[waiting].ravel(), minlength=self.num_experts) > 0)
            if needed.any():
                self._wait_for(np.flatnonzero(needed), loads)
        self._observe(loads)

    def forward(self, hidden: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """See ExpertPool."""
        w13, w2, run = self._weights.w13, self._weights.w2, self._kernels.grouped_experts_forward
        late = self._late
        if not len(late):
            return run(hidden, w13, w2, slots, weights)
        started = time.perf_counter()
        first_late = self._map.num_slots
        out = run(hidden, w13, w2, torch.where(slots < first_late, slots, MISSING), weights)
        # All slots have been read: now these experts take those of the least used ones.
        self._late = np.empty(0, np.int64)
        while len(late):
            free = self._free_slots(np.zeros(self.num_experts, np.int64))
            now, late = late[: len(free)], late[len(free) :]
            slot_of_late = torch.full((self.num_experts,), MISSING)
            for expert, slot in zip(now.tolist(), free, strict=False):
                self._replace(slot, expert)
                slot_of_late[expert] = slot
            is_late = slots >= first_late
            places = slot_of_late.to(slots.device)[torch.where(is_late, slots - first_late, 0)]
            out += run(hidden, w13, w2, torch.where(is_late, places, MISSING), weights)
        self._write_table()
        self._counters.stall_s += time.perf_counter() - started
        return out

    def original_weights(self) -> tuple[Tensor, Tensor]:
        """Copies w13 [E, 2 * I, M] and w2 [E, M, I] of all experts."""
        w13 = torch.stack([torch.cat((gate, up)) for gate, up, _ in self._sources])
        return w13, torch.stack([down for _, _, down in self._sources])

    # --- beside the steps -----------------------------------------------------------------------------------------

    def observe_captured(self) -> None:
        """Take note of the loads of the captured step that has just ended. Reads the device."""
        self._observe(self._captured_loads.cpu().numpy())

    def expected(self) -> np.ndarray:
        """[E] share of assignments expected of each expert, from past steps."""
        return self._use.predict(1.0).numpy()

    def prefetch(self, expected: np.ndarray) -> None:
        """Start fetching missing experts of which more use is expected, in `expected` [E], than of those they replace.

        The replaced ones are missing from now on. Not to be called while this layer runs.
        """
        self.commit()
        room = max(1, int(self.num_slots * _REFILL)) - len(self._moving)
        absent = self.slot_of < 0
        absent[list(self._moving)] = False
        wanted = np.flatnonzero(absent)
        wanted = wanted[np.argsort(-expected[wanted], kind="stable")][: max(0, room)]
        present = np.flatnonzero(self.slot_of >= 0)
        present = present[np.argsort(expected[present], kind="stable")]
        filling = {slot for slot, _ in self._moving.values()}
        free = [slot for slot in np.flatnonzero(self.expert_in < 0).tolist() if slot not in filling]
        places = [(slot, 0.0) for slot in free]
        places += [(int(self.slot_of[expert]), float(expected[expert])) for expert in present.tolist()]
        pairs = zip(wanted.tolist(), places, strict=False)
        fetched = [(expert, slot) for expert, (slot, lost) in pairs if expected[expert] > _MARGIN * lost]
        if not fetched:
            return
        # The table before the weights: nothing may read a slot that is being filled.
        for _, slot in fetched:
            self._unmap(slot)
        self._write_table()
        for expert, slot in fetched:
            move = self._mover.start(lambda expert=expert, slot=slot: self._fetch_weights(expert, slot))
            self._moving[expert] = (slot, move)
        self._counters.prefetches += len(fetched)
        self._counters.bytes_moved += len(fetched) * self._weights.slot_bytes

    def commit(self) -> None:
        """Map the experts whose weights have arrived. Not to be called while this layer runs."""
        arrived = [expert for expert, (_, move) in self._moving.items() if move.done()]
        for expert in arrived:
            self._settle(expert)
        if arrived:
            self._write_table()

    # --- inner workings -------------------------------------------------------------------------------------------

    def _observe(self, loads: np.ndarray) -> None:
        counters, used = self._counters, loads > 0
        counters.assignments += int(loads.sum())
        absent = used & (self.slot_of < 0)
        absent[self._late] = False
        counters.misses += int(loads[absent].sum())
        hits = used & self._fresh
        counters.prefetch_hits += int(hits.sum())
        self._fresh &= ~hits
        self._use.observe(torch.from_numpy(loads))

    def _wait_for(self, experts: np.ndarray, loads: np.ndarray) -> None:
        """Bring the experts into slots that this step does not read; those for which there is none will run late."""
        started = time.perf_counter()
        for expert in experts.tolist():
            if expert in self._moving:
                self._settle(expert)
        rest = experts[self.slot_of[experts] < 0]
        free = self._free_slots(loads)
        for expert, slot in zip(rest.tolist(), free, strict=False):
            self._replace(slot, expert)
        self._late = rest[len(free) :]
        self._write_table()
        self._counters.stalls += 1
        self._counters.stall_s += time.perf_counter() - started

    def _free_slots(self, loads: np.ndarray) -> list[int]:
        """Slots of experts without load in `loads` [E], empty ones first, then those of least expected use."""
        if len(self._moving) == self.num_slots:
            for expert in list(self._moving):
                self._settle(expert)
        filling = {slot for slot, _ in self._moving.values()}
        expected = self.expected()
        idle = []
        for slot, expert in enumerate(self.expert_in.tolist()):
            if slot not in filling and (expert < 0 or not loads[expert]):
                idle.append((-1.0 if expert < 0 else float(expected[expert]), slot))
        return [slot for _, slot in sorted(idle)]

    def _settle(self, expert: int) -> None:
        """Map an expert that was being fetched, as soon as it is there."""
        slot, move = self._moving.pop(expert)
        try:
            move.wait()
        except Exception:
            log.exception("expert %d could not be fetched", expert)
            return
        self.slot_of[expert], self.expert_in[slot] = slot, expert
        self._fresh[expert] = True

    def _replace(self, slot: int, expert: int) -> None:
        """Fetch an expert into a slot at once."""
        self._unmap(slot)
        self._fetch(expert, slot)
        self._counters.bytes_moved += self._weights.slot_bytes

    def _unmap(self, slot: int) -> None:
        former = self.expert_in[slot]
        if former >= 0:
            self.slot_of[former] = self.expert_in[slot] = MISSING
            self._fresh[former] = False

    def _fetch(self, expert: int, slot: int) -> None:
        self._fetch_weights(expert, slot)
        self.slot_of[expert], self.expert_in[slot] = slot, expert

    def _fetch_weights(self, expert: int, slot: int) -> None:
        self._weights.put(slot, *self._sources[expert])

    def _write_table(self) -> None:
        table = self.slot_of.copy()
        table[self._late] = self._map.num_slots + self._late
        self._map.expert_slots.copy_(torch.from_numpy(table))


class ResidentPool:
    """The resident pool of a whole model: its layers, what they have in common, and what is done between steps."""

    def __init__(
        self,
        device: torch.device,
        kernels: ModuleType,
        waits: Sequence[bool],
        predictor: LoadPredictor | None,
        prefetch: bool,
    ) -> None:
        """`waits` [classes] as in ResidentExperts. Without a predictor past loads tell what to fetch; `prefetch` false: nothing
        is fetched ahead."""
        self._kernels, self._waits, self._predictor = kernels, np.array(waits), predictor
        self._prefetches = prefetch
        self._mover = mover_for(device)
        self._counters = ExpertTelemetry()
        self.layers: list[ResidentExperts] = []
        self._captured = False
        #: Distance at which each layer is predicted within the step; layers without are fetched for between steps.
        self._distance: dict[int, int] = {}
        for layer, distance in sorted(predictor.weights if predictor else (), reverse=True):
            self._distance[layer] = distance  # the least one wins: it sees most

    @property
    def always_waits(self) -> bool:
        """Whether no assignment is ever served by another expert because its own is missing."""
        return bool(self._waits.all())

    @property
    def waits(self) -> list[bool]:
        """[classes] whether a missing expert is waited for."""
        return self._waits.tolist()

    def add_layer(self, weights: ExpertWeights, expert_map: ExpertMap, sources: Sequence[Source]) -> ResidentExperts:
        """The pool of the next layer with experts, to be its block's."""
        layer = ResidentExperts(
            weights,
            expert_map,
            sources,
            self._waits,
            self._kernels,
            self._mover,
            self._counters,
            partial(self._predict_from, len(self.layers)),
        )
        self.layers.append(layer)
        return layer

    def _predict_from(self, layer: int, hidden: Tensor) -> None:
        """`layer` is about to run on hidden [T, M]: fetch what later layers are predicted to need in this step."""
        if not self._prefetches or self._predictor is None:
            return
        for later, distance in self._distance.items():
            if later - distance == layer:
                loads = self._predictor.loads(hidden.cpu(), later, distance).numpy()
                of_later = self.layers[later]
                # Ties, of which there are many, are for the past to decide; it also keeps what comes back every few steps.
                of_later.prefetch(loads + of_later.expected() * loads.sum())

    def between_steps(self, captured: bool) -> None:
        """To be called before every step. `captured`: the step will replay a graph."""
        if self._captured:
            for layer in self.layers:
                layer.observe_captured()
        for index, layer in enumerate(self.layers):
            # Within a captured step nothing can be fetched.
            if self._prefetches and (captured or index not in self._distance):
                layer.prefetch(layer.expected())
            else:
                layer.commit()
        self._captured = captured

    def forget_counts(self) -> None:
        """Begin the totals anew: what came before was no request."""
        for field in fields(ExpertTelemetry):
            setattr(self._counters, field.name, field.default)

    def telemetry(self) -> ExpertTelemetry:
        """The totals, with the share as of now."""
        present = sum(int((layer.slot_of >= 0).sum()) for layer in self.layers)
        return replace(self._counters, resident_share=present / sum(layer.num_experts for layer in self.layers))
