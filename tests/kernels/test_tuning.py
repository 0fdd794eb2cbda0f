"""Block sizes: the rule fits every GPU, and the nearest tuned entry wins over it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.kernels.tuning import (
    SHARED_MEMORY_BYTES,
    ExpertShape,
    TileConfig,
    default_tiles,
    entry,
    expert_tiles,
    write_entries,
)

SHAPE = ExpertShape(slots=60, hidden=2048, size=1408, tokens=64, top_k=4, dtype="bfloat16", device="NVIDIA H200")


@given(
    slots=st.integers(1, 300),
    tokens=st.integers(1, 20_000),
    top_k=st.integers(1, 8),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_the_rule_fits_shared_memory_and_gives_both_kernels_the_same_rows(slots, tokens, top_k, dtype) -> None:
    tiles = default_tiles(replace(SHAPE, slots=slots, tokens=tokens, top_k=top_k, dtype=dtype))
    itemsize = 4 if dtype == "float32" else 2
    assert tiles["gate_up"].shared_memory_bytes(2, itemsize) <= SHARED_MEMORY_BYTES
    assert tiles["down"].shared_memory_bytes(1, itemsize) <= SHARED_MEMORY_BYTES
    assert tiles["gate_up"].rows == tiles["down"].rows


def test_few_rows_per_slot_are_decode_and_many_are_prefill() -> None:
    assert SHAPE.phase == "decode"
    assert replace(SHAPE, tokens=240).phase == "decode"
    assert replace(SHAPE, tokens=8192).phase == "prefill"
    assert replace(SHAPE, slots=8, tokens=65).phase == "prefill"


def test_the_nearest_tuned_entry_of_the_phase_is_used(tmp_path: Path) -> None:
    assert expert_tiles(SHAPE, tmp_path) == default_tiles(SHAPE)
    tuned = {}
    for tokens in (1, 64, 4096):
        config = TileConfig(16 if tokens < 4096 else 64, 32, 128, 4, 5)
        tuned[tokens] = {"gate_up": config, "down": replace(config, columns=16 * (1 + tokens // 64 % 2))}
    path = write_entries(tmp_path, SHAPE, [entry(replace(SHAPE, tokens=t), tiles) for t, tiles in tuned.items()])
    assert path.name == "experts-2048-1408-bfloat16-NVIDIA_H200.json"
    for tokens, nearest in [(1, 1), (2, 1), (48, 64), (100, 64), (1000, 4096), (20_000, 4096)]:
        assert expert_tiles(replace(SHAPE, tokens=tokens), tmp_path) == tuned[nearest]
    assert expert_tiles(replace(SHAPE, device="other"), tmp_path) == default_tiles(SHAPE)


def test_a_decode_step_gets_tiles_for_all_its_rows_if_some_are_tuned(tmp_path: Path) -> None:
    shapes = [replace(SHAPE, tokens=tokens) for tokens in (16, 64)]
    write_entries(tmp_path, SHAPE, [entry(shape, default_tiles(shape)) for shape in shapes])
    for tokens, rows in [(3, 16), (16, 16), (17, 64), (31, 64)]:
        assert expert_tiles(replace(SHAPE, tokens=tokens), tmp_path)["gate_up"].rows == rows
    few = tmp_path / "few"
    write_entries(few, SHAPE, [entry(shapes[0], default_tiles(shapes[0]))])
    assert expert_tiles(replace(SHAPE, tokens=31), few) == default_tiles(shapes[0]), "better than none"


def test_later_entries_replace_those_of_the_same_sizes_only(tmp_path: Path) -> None:
    first, second = default_tiles(SHAPE), {k: replace(t, num_stages=2) for k, t in default_tiles(SHAPE).items()}
    other = replace(SHAPE, tokens=1)
    for shape, tiles in ((SHAPE, first), (other, first), (SHAPE, second)):
        write_entries(tmp_path, shape, [entry(shape, tiles)])
    assert expert_tiles(SHAPE, tmp_path) == second and expert_tiles(other, tmp_path) == first


@pytest.mark.parametrize("wrong", [{"rows": 24}, {"columns": 8}, {"num_warps": 3}, {"num_stages": 0}])
def test_impossible_tiles_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TileConfig(**{"rows": 16, "columns": 16, "depth": 16, **wrong})
