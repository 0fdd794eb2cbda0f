"""Leases: who holds the settings, until when, and what an engine does when it cannot read them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.brownout import block as layout
from backend.brownout import control
from backend.brownout.block import Block, BlockError
from backend.brownout.control import Lease, SettingsReader
from backend.brownout.settings import MECHANISMS, Settings

BASELINE = Settings(version=1)
DIM = Settings(threshold_prefill=0.5, threshold_decode=0.25)


@pytest.fixture
def block(tmp_path: Path) -> Block:
    return Block(tmp_path / "block", os.getpid())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(control.time, "monotonic", lambda: now[0])
    return now


values = st.builds(
    Settings,
    threshold_prefill=st.floats(0, 1),
    threshold_decode=st.floats(0, 1),
    mechanism=st.sampled_from(MECHANISMS),
    way=st.sampled_from([0, 2, 8, 64]),
    similarity_min=st.floats(0, 1),
    resident_share=st.floats(0, 1),
)


@settings(max_examples=30)
@given(values, values, st.text(max_size=20), st.floats(0.1, 100))
def test_a_lease_survives_the_block(
    tmp_path_factory: pytest.TempPathFactory, chosen: Settings, baseline: Settings, owner: str, lease_s: float
) -> None:
    block = Block(tmp_path_factory.getbasetemp() / "leases", os.getpid())
    owner = owner.replace("\0", "")
    lease = Lease.none(replace(baseline, version=7)).granted(chosen, owner, lease_s, 50.0)
    lease.write(block)
    assert Lease.read(block) == lease


@given(st.lists(st.tuples(values, st.floats(0, 20), st.floats(0, 20)), max_size=20))
def test_a_version_stands_for_one_set_of_values(series: list[tuple[Settings, float, float]]) -> None:
    lease, now, seen = Lease.none(BASELINE), 0.0, {}
    last = 0
    for chosen, lease_s, passed_s in series:
        lease = lease.granted(chosen, "a", lease_s, now)
        for moment in (now, now + passed_s):
            active = lease.in_force(moment)
            assert seen.setdefault(active.version, active) == active
            assert active.version >= last
            last = active.version
        now += passed_s


def test_a_renewal_is_no_change() -> None:
    first = Lease.none(BASELINE).granted(DIM, "a", 10, 0.0)
    renewed = first.granted(DIM, "a", 10, 5.0)
    assert renewed.in_force(12.0) == first.in_force(5.0)
    assert renewed.left_s(5.0) == 10


def test_an_engine_returns_to_the_baseline_when_the_lease_ends(block: Block, clock: list[float]) -> None:
    reader = SettingsReader(block)
    assert reader.changed() == Settings()  # at first, and nobody has written anything
    lease = Lease.none(BASELINE)
    lease.write(block)
    assert reader.changed() == BASELINE
    lease.granted(DIM, "a", 10, clock[0]).write(block)
    assert reader.changed() == replace(DIM, version=2)
    assert reader.changed() is None
    clock[0] += 9.9
    assert reader.changed() is None
    clock[0] += 0.1
    assert reader.changed() == replace(BASELINE, version=3)


def test_an_engine_holds_what_it_has_while_the_block_is_damaged(block: Block, clock: list[float]) -> None:
    reader = SettingsReader(block)
    lease = Lease.none(BASELINE).granted(DIM, "a", 10, clock[0])
    lease.write(block)
    assert reader.changed().threshold_prefill == 0.5
    with open(block.path, "r+b") as file:
        file.seek(layout._SETTINGS_AT)
        file.write((9).to_bytes(8, "little") + b"\xff" * 40)
    assert reader.changed() is None
    assert "settings" in reader.error
    clock[0] += 10
    assert reader.changed() == replace(BASELINE, version=3)
    lease.granted(DIM, "a", 10, clock[0]).write(block)
    assert reader.changed().threshold_prefill == 0.5
    assert reader.error == ""


def test_a_clock_that_jumps_far_ahead_ends_the_lease_once(block: Block, clock: list[float]) -> None:
    reader = SettingsReader(block)
    Lease.none(BASELINE).granted(DIM, "a", 10, clock[0]).write(block)
    reader.changed()
    clock[0] += 1e6
    assert reader.changed().threshold_prefill == 1.0
    assert reader.changed() is None


def test_nonsense_with_a_right_checksum_is_refused(block: Block) -> None:
    lease = Lease.none(BASELINE)
    lease.write(block)
    record = block.read_settings().reshape(1).copy()
    record["values"]["threshold_prefill"] = 7.0
    block.write_settings(record)
    with pytest.raises(BlockError, match="make no sense: threshold_prefill"):
        Lease.read(block)
