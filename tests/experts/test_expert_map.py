"""Tables from logical experts to slots are changed in place and never hold nonsense."""

from __future__ import annotations

import pytest
import torch

from backend.experts.expert_map import ExpertMap


def test_starts_with_each_expert_in_its_own_slot() -> None:
    table = ExpertMap(4, 6, torch.device("cpu"))
    assert table.expert_slots.tolist() == [0, 1, 2, 3]


def test_assign_changes_the_table_in_place() -> None:
    table = ExpertMap(3, 5, torch.device("cpu"))
    address = table.expert_slots.data_ptr()
    table.assign([4, 0, 4])
    assert table.expert_slots.tolist() == [4, 0, 4]
    assert table.expert_slots.data_ptr() == address


@pytest.mark.parametrize("slots", [[0, 1], [0, 1, 5], [0, 1, -1]])
def test_refused_assignment_changes_nothing(slots: list[int]) -> None:
    table = ExpertMap(3, 5, torch.device("cpu"))
    with pytest.raises(ValueError, match="slot"):
        table.assign(slots)
    assert table.expert_slots.tolist() == [0, 1, 2]


def test_way_in_use_is_switched_in_place() -> None:
    table = ExpertMap(4, 7, torch.device("cpu"))
    table.add_way(2, torch.tensor([0, 1, 1, 0]), 4)
    table.add_way(4, torch.tensor([0, 0, 0, 0]), 6)
    address = table.united_slots.data_ptr()
    assert table.ways == (2, 4)
    for way, slots in ((2, [4, 5, 5, 4]), (4, [6, 6, 6, 6]), (0, [0, 1, 2, 3]), (2, [4, 5, 5, 4])):
        table.use_way(way)
        assert table.united_slots.tolist() == slots
    assert table.united_slots.data_ptr() == address
    assert table.expert_slots.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("groups", "first"), [([0, 0, 1], 4), ([0, 0, 1, 1], 3), ([0, 1, 2, 3], 4), ([0, 0, -1, 0], 4)]
)
def test_way_that_does_not_fit_is_refused(groups: list[int], first: int) -> None:
    table = ExpertMap(4, 7, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"group for each|united slots must lie"):
        table.add_way(2, torch.tensor(groups), first)
    assert table.ways == ()


def test_needs_a_slot_for_every_resident_expert() -> None:
    with pytest.raises(ValueError, match="2 slots cannot hold 3 experts"):
        ExpertMap(3, 2, torch.device("cpu"))
    assert ExpertMap(3, 2, torch.device("cpu"), num_resident=2).expert_slots.tolist() == [0, 1, -1]
