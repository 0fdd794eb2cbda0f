"""One layer's resident pool: whatever moves when, every expert is computed with its own weights or is said to be missing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from backend.experts.expert_map import MISSING, ExpertMap
from backend.experts.resident import ResidentPool
from backend.experts.telemetry import ExpertTelemetry
from backend.experts.weight_store import ExpertWeights
from backend.kernels import reference

EXPERTS, HIDDEN, SIZE, UNITED = 9, 6, 4, 3
WAITS = np.array([False, False, True, True])


class LateMove:
    """Runs its copy when somebody waits, or when it is told to."""

    def __init__(self, copy: Callable[[], None]) -> None:
        self._copy, self._done = copy, False

    def done(self) -> bool:
        return self._done

    def wait(self) -> None:
        if not self._done:
            self._copy()
            self._done = True


class LateMover:
    def __init__(self) -> None:
        self.moves: list[LateMove] = []

    def start(self, copy: Callable[[], None], num_bytes: int) -> LateMove:
        self.moves.append(LateMove(copy))
        return self.moves[-1]


class Layer:
    """A resident layer beside the same experts all in one place."""

    def __init__(self, num_slots: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.w13 = torch.randn(EXPERTS + UNITED, 2 * SIZE, HIDDEN, generator=generator)
        self.w2 = torch.randn(EXPERTS + UNITED, HIDDEN, SIZE, generator=generator)
        self.map = ExpertMap(EXPERTS, num_slots + UNITED, torch.device("cpu"), num_slots)
        self.map.add_way(3, torch.arange(EXPERTS) // 3, num_slots)
        self.map.use_way(3)
        weights = ExpertWeights(num_slots + UNITED, HIDDEN, SIZE, torch.float32, torch.device("cpu"))
        weights.w13[num_slots:], weights.w2[num_slots:] = self.w13[EXPERTS:], self.w2[EXPERTS:]
        self.sources = [(self.w13[e, :SIZE], self.w13[e, SIZE:], self.w2[e]) for e in range(EXPERTS)]
        self.weights, self.mover = weights, LateMover()
        self.whole = ResidentPool(self.mover, reference, WAITS, None, prefetch=False, num_layers=1)
        self.pool = self.whole.add_layer(weights, self.map, self.sources)

    @property
    def telemetry(self) -> ExpertTelemetry:
        return self.whole.telemetry()

    @property
    def expected(self) -> np.ndarray:
        return self.whole.ledger.expected[0]

    def check(self) -> None:
        """Mapped slots hold their experts' weights, one each, and united slots are as they were."""
        slots = self.map.expert_slots.tolist()
        mapped = [slot for slot in slots if slot != MISSING]
        assert len(set(mapped)) == len(mapped) and all(0 <= slot < self.map.num_resident for slot in mapped)
        for expert, slot in enumerate(slots):
            if slot != MISSING:
                assert torch.equal(self.weights.w13[slot], self.w13[expert])
                assert torch.equal(self.weights.w2[slot], self.w2[expert])
        assert torch.equal(self.weights.w13[self.map.num_resident :], self.w13[EXPERTS:])
        found = self.telemetry
        assert found.warm == len(mapped) and found.cold == EXPERTS - found.warm - found.loading
        assert found.loads == found.warm + found.loading + found.failures + found.evictions, (
            "loaded: there, or has left"
        )

    def step(self, experts: Tensor, token_class: Tensor) -> Tensor:
        """Run one step and compare it with the experts that should have served; returns [T, K] which were missing."""
        rows = len(experts)
        hidden, gates = torch.randn(rows, HIDDEN), torch.rand(experts.shape)
        self.whole.between_steps(captured=False)
        self.pool.admit(hidden, experts, token_class, None)
        table = self.map.expert_slots.clone()
        slots, weights = reference.remap_experts(
            experts, gates, table, torch.ones(4), token_class, united_slots=self.map.united_slots
        )
        out = self.pool.forward(hidden, slots, weights)
        absent = table[experts] == MISSING
        served = torch.where(absent, EXPERTS + experts // 3, experts)
        expected = reference.grouped_experts_forward(hidden, self.w13, self.w2, served, gates)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        self.check()
        return absent


def draw_step(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    rows = int(rng.integers(1, 12))
    chosen = np.stack([rng.choice(EXPERTS, 3, replace=False) for _ in range(rows)])
    return torch.from_numpy(chosen), torch.from_numpy(rng.integers(0, 4, rows).astype(np.int8))


@given(
    st.integers(1, EXPERTS),
    st.integers(0, 2**32),
    st.lists(st.sampled_from(["step", "fetch", "arrive", "share"]), max_size=25),
)
def test_steps_are_right_whatever_moves_when(num_slots: int, seed: int, actions: list[str]) -> None:
    torch.manual_seed(seed)
    rng, layer = np.random.default_rng(seed), Layer(num_slots)
    layer.check()
    for action in actions:
        if action == "step":
            experts, token_class = draw_step(rng)
            absent = layer.step(experts, token_class)
            waiting = experts[torch.from_numpy(WAITS)[token_class.long()]]
            assert not torch.isin(experts[absent], waiting).any(), "what one token waits for serves all"
        elif action == "fetch":
            layer.pool.prefetch(rng.random(EXPERTS), EXPERTS)
        elif action == "share":
            layer.whole.use_share(rng.random())
            in_use = layer.whole.ledger.slots_in_use
            assert 1 <= in_use <= num_slots and layer.map.expert_slots.max() < in_use
        elif moves := [move for move in layer.mover.moves if not move.done()]:
            moves[0].wait()
        layer.check()
    assert layer.telemetry.prefetch_hits <= layer.telemetry.prefetches


def test_more_experts_than_slots_are_waited_for_in_rounds() -> None:
    layer = Layer(2)
    experts = torch.arange(EXPERTS).view(3, 3)
    assert not layer.step(experts, torch.full((3,), 2, dtype=torch.int8)).any()
    assert layer.telemetry.stalls == 1 and layer.telemetry.misses == 0
    assert layer.telemetry.bytes_moved == (EXPERTS - 2) * layer.weights.slot_bytes


def test_missing_experts_are_counted_fetched_and_then_serve() -> None:
    layer = Layer(8)
    experts, browned = torch.tensor([[8, 0, 1], [8, 2, 1]]), torch.zeros(2, dtype=torch.int8)
    assert layer.step(experts, browned).tolist() == [[True, False, False]] * 2
    assert (layer.telemetry.misses, layer.telemetry.assignments, layer.telemetry.stalls) == (2, 6, 0)
    for _ in range(20):
        layer.step(experts, browned)
    layer.pool.prefetch(layer.expected, 1)
    assert layer.map.expert_slots.tolist().count(MISSING) == 2, (
        "the one that gives way is unmapped before it is overwritten"
    )
    assert layer.step(experts, browned).any(), "not there yet"
    layer.mover.moves[0].wait()
    assert not layer.step(experts, browned).any()
    assert (layer.telemetry.prefetches, layer.telemetry.prefetch_hits) == (1, 1)


def test_waiting_takes_an_expert_that_is_on_its_way() -> None:
    layer = Layer(8)
    layer.pool.prefetch(np.eye(EXPERTS)[8], 1)
    assert not layer.step(torch.tensor([[8, 1, 2]]), torch.tensor([3], dtype=torch.int8)).any()
    assert layer.telemetry.bytes_moved == layer.weights.slot_bytes, "not copied twice"


def test_past_loads_move_a_bounded_part_in_a_step() -> None:
    layer = Layer(4)
    layer.whole._prefetches = True
    experts, browned = torch.tensor([[5, 6, 7], [6, 7, 8]]), torch.zeros(2, dtype=torch.int8)
    for step in range(1, 6):
        layer.step(experts, browned)
        assert layer.telemetry.prefetches <= step
        for move in layer.mover.moves:
            move.wait()
    assert layer.telemetry.prefetches == 4
    assert not layer.step(experts, browned).any(), "all that are used are there"
    layer.whole.between_steps(captured=False)
    assert layer.telemetry.prefetches == 4, "nothing is gained by moving more"


def test_small_steps_predict_their_layers_in_turns_and_large_ones_all_by_some_rows() -> None:
    asked: list[tuple[int, int]] = []

    def loads(hidden: Tensor, layer: int, distance: int) -> Tensor:
        assert distance == 1, "of two distances the nearer one"
        asked.append((layer, len(hidden)))
        return torch.ones(EXPERTS)

    predictor = SimpleNamespace(pairs=[(1, 1), (2, 1), (2, 2)], loads=loads)
    pool = ResidentPool(LateMover(), reference, WAITS, predictor, prefetch=True, num_layers=3)
    for part in (Layer(4), Layer(4), Layer(4)):
        pool.add_layer(part.weights, part.map, part.sources)

    def step(num_tokens: int) -> list[tuple[int, int]]:
        asked.clear()
        pool.between_steps(captured=False)
        for layer in range(3):
            pool.runs(layer, torch.zeros(num_tokens, HIDDEN))
        return list(asked)

    small = [step(4) for _ in range(16)]
    assert max(map(len, small)) == 1 and sorted(chain.from_iterable(small)) == [(1, 4), (1, 4), (2, 4), (2, 4)]
    assert [layer for layer, rows in step(1000) if 64 <= rows <= 128] == [1, 2]


def test_failed_fetch_leaves_the_expert_missing_until_the_next_one() -> None:
    layer = Layer(8)
    layer.pool.prefetch(np.eye(EXPERTS)[8], 1)
    move = layer.mover.moves[0]
    move._done, move.wait = True, lambda: (_ for _ in ()).throw(OSError("gone"))
    layer.pool.commit()
    layer.check()
    assert layer.map.expert_slots[8] == MISSING and layer.telemetry.failures == 1
    layer.pool.prefetch(np.eye(EXPERTS)[8], 1)
    layer.mover.moves[1].wait()
    layer.pool.commit()
    assert layer.map.expert_slots[8] != MISSING


def test_captured_step_changes_nothing_and_its_loads_are_read_afterwards() -> None:
    layer = Layer(4)
    before = layer.map.expert_slots.clone()
    layer.whole.between_steps(captured=True)
    experts = torch.tensor([[7, 8, 0], [8, 7, 1], [5, 6, 2]])
    layer.pool.admit(torch.randn(3, HIDDEN), experts, torch.full((3,), 2, dtype=torch.int8), torch.tensor(2))
    assert torch.equal(layer.map.expert_slots, before)
    layer.whole.between_steps(captured=False)
    assert (layer.telemetry.assignments, layer.telemetry.misses) == (6, 4), "padding does not count"
    assert set(np.argsort(-layer.expected, kind="stable")[:2].tolist()) == {7, 8}


@pytest.mark.parametrize("times", [1, 3])
def test_weights_fetched_later_are_widened_as_the_others(times: int) -> None:
    layer, whole = Layer(2), ExpertWeights(EXPERTS, HIDDEN, SIZE, torch.float32, torch.device("cpu"))
    whole.w13.copy_(layer.w13[:EXPERTS])
    whole.w2.copy_(layer.w2[:EXPERTS])
    if times > 1:
        whole.widen(times)
        layer.weights.widen(times)
    layer.pool.prefetch(np.eye(EXPERTS)[8], 1)
    layer.mover.moves[0].wait()
    layer.pool.commit()
    slot = layer.map.expert_slots[8]
    assert torch.equal(layer.weights.w13[slot], whole.w13[8]) and torch.equal(layer.weights.w2[slot], whole.w2[8])
