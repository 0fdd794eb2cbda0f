"""One layer of a resident pool: its slots, what moves into them, and what a step must wait for."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from backend.experts.expert_map import MISSING, ExpertMap
from backend.experts.mover import Move
from backend.experts.weight_store import ExpertWeights, Source

if TYPE_CHECKING:
    from backend.experts.resident import ResidentPool

log = logging.getLogger(__name__)

#: Share of a layer's slots that may be refilled at once; the rest goes on serving.
_REFILL = 1 / 8


class ResidentExperts:
    """One layer's experts; an ExpertPool. The engine's thread calls everything.

    Slots `num_slots + e` in the table of an ExpertMap stand for expert e, for which the step waits although all slots are in
    use: `forward` runs such experts after the others, in as many rounds as it takes.
    """

    def __init__(
        self, pool: ResidentPool, layer: int, weights: ExpertWeights, expert_map: ExpertMap, sources: Sequence[Source]
    ) -> None:
        """`layer` counts those with experts. The first experts become resident."""
        self._pool, self._layer, self._ledger = pool, layer, pool.ledger
        self._weights, self._map, self._sources = weights, expert_map, sources
        #: [E] the slot of each expert or MISSING: this layer's row of the books.
        self._slot_of = self._ledger.slot_of[layer]
        #: Slot and copy by expert that is being fetched.
        self._moving: dict[int, tuple[int, Move]] = {}
        self._late = np.empty(0, np.int64)  # experts that this step has to run after the others
        for expert in range(expert_map.num_resident):
            self._fetch(expert, expert)
        self._write_table()

    # --- a step ---------------------------------------------------------------------------------------------------

    def admit(self, hidden: Tensor, experts: Tensor, token_class: Tensor, num_tokens: Tensor | None) -> None:
        """See ExpertPool. Afterwards every expert that must not be missing is in a slot or will be run late."""
        pool = self._pool
        if num_tokens is not None:
            rows = torch.arange(len(experts), device=experts.device).unsqueeze(1)
            counted = (rows < num_tokens).expand_as(experts).flatten().long()
            pool.captured_loads[self._layer].zero_().index_add_(0, experts.flatten(), counted)
            return
        pool.runs(self._layer, hidden)
        self.commit()
        if not pool.waits_for_any(token_class):
            pool.chosen[self._layer] = experts
            return
        chosen = experts.cpu().numpy()
        loads = np.bincount(chosen.ravel(), minlength=len(self._slot_of))
        missing = (loads > 0) & (self._slot_of < 0)
        if missing.any():
            waiting = pool.waiting_classes[token_class.cpu().numpy()]
            needed = missing & (np.bincount(chosen[waiting].ravel(), minlength=len(missing)) > 0)
            if needed.any():
                self._wait_for(np.flatnonzero(needed), loads)
        self._ledger.observe(loads, pool.counters, self._layer)
        pool.counters.misses -= int(loads[self._late].sum())

    def forward(self, hidden: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """See ExpertPool."""
        w13, w2, run = self._weights.w13, self._weights.w2, self._pool.kernels.grouped_experts_forward
        late = self._late
        if not len(late):
            return run(hidden, w13, w2, slots, weights)
        started = time.perf_counter()
        first_late = self._map.num_slots
        out = run(hidden, w13, w2, torch.where(slots < first_late, slots, MISSING), weights)
        # All slots have been read: now these experts take those of the least used ones.
        self._late = np.empty(0, np.int64)
        while len(late):
            free = self._idle_slots(np.zeros(len(self._slot_of), np.int64))
            now, late = late[: len(free)], late[len(free) :]
            slot_of_late = torch.full((len(self._slot_of),), MISSING)
            for expert, slot in zip(now.tolist(), free, strict=False):
                self._replace(slot, expert)
                slot_of_late[expert] = slot
            is_late = slots >= first_late
            places = slot_of_late.to(slots.device)[torch.where(is_late, slots - first_late, 0)]
            out += run(hidden, w13, w2, torch.where(is_late, places, MISSING), weights)
        self._write_table()
        self._pool.counters.stall_s += time.perf_counter() - started
        return out

    def original_weights(self) -> tuple[Tensor, Tensor]:
        """Copies w13 [E, 2 * I, M] and w2 [E, M, I] of all experts."""
        w13 = torch.stack([torch.cat((gate, up)) for gate, up, _ in self._sources])
        return w13, torch.stack([down for _, _, down in self._sources])

    # --- beside the steps: none of these while this layer runs ----------------------------------------------------

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return self._weights.slot_bytes

    def prefetch(self, expected: np.ndarray, most: int) -> int:
        """Start fetching up to `most` missing experts of which more use is expected, in `expected` [E], than of those they replace.

        The replaced ones are missing from now on. Returns how many experts are fetched.
        """
        self.commit()
        most = min(most, max(1, int(self._ledger.slots_in_use * _REFILL)) - len(self._moving))
        pairs = self._ledger.exchanges(self._layer, expected, most)
        if not pairs:
            return 0
        # The table before the weights: nothing may read a slot that is being filled.
        for expert, slot in pairs:
            self._vacate(slot)
            self._ledger.expect(self._layer, expert, slot)
        self._write_table()
        num_bytes = len(pairs) * self._weights.slot_bytes

        def copy() -> None:
            for expert, slot in pairs:
                self._weights.put(slot, *self._sources[expert])

        move = self._pool.mover.start(copy, num_bytes)
        self._moving |= {expert: (slot, move) for expert, slot in pairs}
        self._pool.counters.loads += len(pairs)
        self._pool.counters.prefetches += len(pairs)
        self._pool.counters.bytes_moved += num_bytes
        self.commit()
        return len(pairs)

    def commit(self) -> None:
        """Map the experts whose weights have arrived."""
        if not self._moving:
            return
        arrived = [expert for expert, (_, move) in self._moving.items() if move.done()]
        for expert in arrived:
            self._settle(expert)
        if arrived:
            self._write_table()

    def leave_slots(self, first: int) -> None:
        """Have nothing in the slots from `first` on."""
        for expert in [expert for expert, (slot, _) in self._moving.items() if slot >= first]:
            self._settle(expert)
        for slot in range(first, self._map.num_resident):
            self._vacate(slot)
        self._write_table()
        self._weights.release(slice(first, self._map.num_resident))

    # --- inner workings -------------------------------------------------------------------------------------------

    def _wait_for(self, experts: np.ndarray, loads: np.ndarray) -> None:
        """Bring the experts into slots that this step does not read; those for which there is none will run late."""
        started = time.perf_counter()
        for expert in experts.tolist():
            if expert in self._moving:
                self._settle(expert)
        rest = experts[self._slot_of[experts] < 0]
        free = self._idle_slots(loads)
        for expert, slot in zip(rest.tolist(), free, strict=False):
            self._replace(slot, expert)
        self._late = rest[len(free) :]
        self._write_table()
        self._pool.counters.stalls += 1
        self._pool.counters.stall_s += time.perf_counter() - started

    def _idle_slots(self, loads: np.ndarray) -> list[int]:
        """See Ledger. There is at least one if there is no load."""
        if len(self._moving) == self._ledger.slots_in_use:
            for expert in list(self._moving):
                self._settle(expert)
        return self._ledger.idle_slots(self._layer, loads)

    def _settle(self, expert: int) -> None:
        """Map an expert that was being fetched, as soon as it is there."""
        slot, move = self._moving.pop(expert)
        self._ledger.arrived(self._layer, expert, slot)
        try:
            move.wait()
        except Exception:
            log.exception("expert %d could not be fetched", expert)
            self._pool.counters.failures += 1
            return
        self._ledger.place(self._layer, expert, slot)
        self._ledger.fresh[self._layer, expert] = True

    def _replace(self, slot: int, expert: int) -> None:
        """Fetch an expert into a slot at once."""
        self._vacate(slot)
        self._fetch(expert, slot)
        self._pool.counters.bytes_moved += self._weights.slot_bytes

    def _vacate(self, slot: int) -> None:
        self._pool.counters.evictions += self._ledger.vacate(self._layer, slot)

    def _fetch(self, expert: int, slot: int) -> None:
        self._pool.counters.loads += 1
        self._weights.put(slot, *self._sources[expert])
        self._ledger.place(self._layer, expert, slot)

    def _write_table(self) -> None:
        table = self._slot_of
        if len(self._late):
            table = table.copy()
            table[self._late] = self._map.num_slots + self._late
        self._map.expert_slots.copy_(torch.from_numpy(table))
