"""A share or bytes become slots, or an error that says what is needed."""

from __future__ import annotations

import pytest

from backend.errors import ConfigError
from backend.experts.options import PoolOptions


def slots(resident: str) -> int | None:
    return PoolOptions("resident", resident).slots(num_experts=60, num_layers=4, expert_bytes=1000)


@pytest.mark.parametrize(
    ("resident", "expected"),
    [("0.5", 30), ("1", 60), ("0.55", 33), ("0.001", 1), ("4000", 1), ("119999", 29), ("0.1M", 26), ("1G", 60)],
)
def test_slots_of_each_layer(resident: str, expected: int) -> None:
    assert slots(resident) == expected


def test_memory_for_less_than_one_expert_is_refused() -> None:
    with pytest.raises(ConfigError, match="gives 3999 bytes, but one expert of each of the 4 layers needs 4000"):
        slots("3999")


def test_local_pool_has_a_slot_for_every_expert() -> None:
    assert PoolOptions().slots(60, 4, 1000) is None
