"""The books of a resident pool: which expert is in which slot, and how much use is expected of each.

All layers lie side by side in numpy arrays on the host, so that what is done for every step is a handful of array operations
however many layers and experts there are.
"""

from __future__ import annotations

import numpy as np

from backend.experts.expert_map import MISSING
from backend.experts.telemetry import ExpertTelemetry

#: Weight of the past at each step in what is expected.
_DECAY = 0.9
#: How many times as much use must be expected of an expert as of the one whose slot it takes.
_MARGIN = 1.25


class Ledger:
    """L layers of E experts and S slots each."""

    def __init__(self, num_layers: int, num_experts: int, num_slots: int) -> None:
        #: [L, E] the mapped slot of each expert or MISSING, and [L, S] the mapped expert of each slot or MISSING.
        self.slot_of = np.full((num_layers, num_experts), MISSING)
        self.expert_in = np.full((num_layers, num_slots), MISSING)
        #: [L, E] whether the expert is on its way, and [L, S] whether one is on its way into the slot.
        self.moving = np.zeros((num_layers, num_experts), bool)
        self.filling = np.zeros((num_layers, num_slots), bool)
        #: [L, E] whether the expert was fetched ahead and has not been used yet.
        self.fresh = np.zeros((num_layers, num_experts), bool)
        #: [L, E] the share of a layer's assignments that goes to each expert, past steps weighted exponentially.
        self.expected = np.full((num_layers, num_experts), 1 / num_experts)
        #: Slots of a layer that may be used, the first ones.
        self.slots_in_use = num_slots
        self._first = np.arange(num_layers)[:, None] * num_experts

    def loads(self, chosen: np.ndarray) -> np.ndarray:
        """Assignments [L, E] of a step whose tokens chose the experts [L, N]."""
        counts = np.bincount((chosen + self._first).ravel(), minlength=self.slot_of.size)
        return counts.reshape(self.slot_of.shape)

    def observe(self, loads: np.ndarray, counters: ExpertTelemetry, layer: int | slice = slice(None)) -> None:
        """Take note of a step's assignments [L, E], or [E] of one layer, before anything moves."""
        used, fresh, expected = loads > 0, self.fresh[layer], self.expected[layer]
        totals = loads.sum(-1, keepdims=True)
        counters.assignments += int(totals.sum())
        counters.misses += int(loads[self.slot_of[layer] < 0].sum())
        counters.prefetch_hits += int(np.count_nonzero(used & fresh))
        fresh &= ~used
        expected *= _DECAY
        expected += loads * ((1 - _DECAY) / np.maximum(totals, 1))

    def empty_slots(self, layer: int | slice = slice(None)) -> np.ndarray:
        """[L, S in use], or [S in use] of one layer: whether nothing is in the slot or on its way there."""
        used = slice(self.slots_in_use)
        return (self.expert_in[layer, used] < 0) & ~self.filling[layer, used]

    def worth_filling(self) -> list[int]:
        """Layers where a missing expert is worth more than a present one by what is expected, most worthwhile first."""
        present = self.slot_of >= 0
        best = np.where(present | self.moving, -1.0, self.expected).max(1)
        worst = np.where(present, self.expected, np.inf).min(1)
        worst[self.empty_slots().any(1)] = 0.0
        gain = best - _MARGIN * worst
        layers = np.flatnonzero(gain > 0)
        return layers[np.argsort(-gain[layers])].tolist()

    def exchanges(self, layer: int, expected: np.ndarray, most: int) -> list[tuple[int, int]]:
        """Up to `most` pairs of a missing expert and the slot that it is to take, by what is `expected` [E] of each."""
        present = self.slot_of[layer] >= 0
        gains = np.where(present | self.moving[layer], -1.0, expected)
        losses = np.where(present, expected, np.inf)
        empty = np.flatnonzero(self.empty_slots(layer)).tolist()
        if most <= 0 or (not empty and gains.max() <= _MARGIN * losses.min()):
            return []
        places = [(slot, 0.0) for slot in empty]
        leaving = np.argsort(losses, kind="stable")[:most].tolist()
        places += [(int(self.slot_of[layer, expert]), float(losses[expert])) for expert in leaving if present[expert]]
        wanted = np.argsort(-gains, kind="stable")[:most].tolist()
        pairs = zip(wanted, places, strict=False)
        return [(expert, slot) for expert, (slot, lost) in pairs if gains[expert] > _MARGIN * lost]

    def idle_slots(self, layer: int, loads: np.ndarray) -> list[int]:
        """Slots that nothing is on its way to and whose experts have no load in `loads` [E]: empty ones first, then those of
        least expected use."""
        experts = self.expert_in[layer, : self.slots_in_use]
        empty = experts < 0
        idle = (empty | (loads[experts] == 0)) & ~self.filling[layer, : self.slots_in_use]
        order = np.argsort(np.where(empty, -1.0, self.expected[layer, experts]), kind="stable")
        return order[idle[order]].tolist()

    def expect(self, layer: int, expert: int, slot: int) -> None:
        """The expert is on its way into the slot, in which nothing is."""
        self.moving[layer, expert] = self.filling[layer, slot] = True

    def arrived(self, layer: int, expert: int, slot: int) -> None:
        """The expert is not on its way any more, wherever it is."""
        self.moving[layer, expert] = self.filling[layer, slot] = False

    def place(self, layer: int, expert: int, slot: int) -> None:
        """The expert is in the slot from now on."""
        self.slot_of[layer, expert], self.expert_in[layer, slot] = slot, expert

    def vacate(self, layer: int, slot: int) -> bool:
        """Nothing is in the slot any more; returns whether something was."""
        former = self.expert_in[layer, slot]
        if former >= 0:
            self.slot_of[layer, former] = self.expert_in[layer, slot] = MISSING
            self.fresh[layer, former] = False
        return bool(former >= 0)
