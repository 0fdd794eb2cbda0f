"""The block: what is read is what was written, whole or not at all, whatever happens to the file."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import psutil
import pytest

from backend.brownout import block as layout
from backend.brownout.block import SETTINGS, TELEMETRY, Block, BlockEmpty, BlockError, block_path
from backend.serving.triton_server import PRODUCT_ROOT

SETTINGS_AT = layout._SETTINGS_AT


def telemetry(value: int) -> np.ndarray:
    """A section in which every field has the same value."""
    record = np.zeros(1, TELEMETRY)
    for name in ("num_steps", "requests"):
        record[name] = value
    record["ttft_counts"] = value
    record["active_slots"] = value
    return record


@pytest.fixture
def block(tmp_path: Path) -> Block:
    return Block(tmp_path / "block", os.getpid())


def damage(block: Block, at: int, data: bytes) -> None:
    with open(block.path, "r+b") as file:
        file.seek(at)
        file.write(data)


def test_every_process_of_a_server_sees_the_same_block(block: Block) -> None:
    other = Block(block.path, os.getpid())
    block.write_telemetry(3, telemetry(7))
    assert other.read_telemetry(3) == telemetry(7)[0]
    with pytest.raises(BlockEmpty, match="telemetry of engine 2 has not been written"):
        other.read_telemetry(2)


def test_a_clock_that_is_set_makes_no_other_block(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start times in time of day move with the clock; who opens the block then must still find the same one."""
    block.write_telemetry(0, telemetry(7))
    real = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: real(process) + 3600)
    assert Block(block.path, os.getpid()).read_telemetry(0) == telemetry(7)[0]
    assert block.read_telemetry(0) == telemetry(7)[0]


def test_the_settings_number_changes_with_every_write(block: Block) -> None:
    seen = set()
    for _ in range(3):
        seen.add(block.settings_sequence())
        block.write_settings(np.zeros(1, SETTINGS))
    assert len(seen) == 3


def test_a_torn_section_is_an_error_and_the_next_write_heals_it(block: Block) -> None:
    block.write_settings(np.zeros(1, SETTINGS))
    damage(block, SETTINGS_AT, (5).to_bytes(8, "little"))  # its writer died in the middle
    with pytest.raises(BlockError, match=r"settings .* is being written"):
        block.read_settings()
    block.write_settings(np.zeros(1, SETTINGS))
    assert block.read_settings()["version"] == 0


def test_a_damaged_section_is_an_error_and_the_others_are_not(block: Block) -> None:
    block.write_settings(np.zeros(1, SETTINGS))
    block.write_telemetry(0, telemetry(1))
    damage(block, SETTINGS_AT + 20, b"\xff\x00\xff")
    with pytest.raises(BlockError, match="damaged"):
        block.read_settings()
    assert block.read_telemetry(0)["requests"] == 1


@pytest.mark.parametrize("fault", ["removed", "truncated", "replaced", "rubbish"])
def test_a_lost_file_is_made_again_and_found_by_everyone(block: Block, fault: str) -> None:
    other = Block(block.path, os.getpid())
    block.write_telemetry(0, telemetry(1))
    if fault == "removed":
        block.path.unlink()
    elif fault == "truncated":
        os.truncate(block.path, 100)
    else:
        foreign = block.path.with_name("new")
        foreign.write_bytes(b"rubbish" if fault == "rubbish" else bytes(layout._SIZE))
        os.replace(foreign, block.path)
    sequence = block.settings_sequence()
    block.write_telemetry(0, telemetry(2))
    assert other.read_telemetry(0)["requests"] == 2
    assert other.settings_sequence()[0] == sequence[0] == 2


def test_the_block_of_an_earlier_server_is_not_used(tmp_path: Path) -> None:
    old = Block(tmp_path / "block", os.getppid())
    old.write_telemetry(0, telemetry(1))
    with pytest.raises(BlockEmpty):
        Block(tmp_path / "block", os.getpid()).read_telemetry(0)


def test_the_environment_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BROWNOUT_BLOCK", raising=False)
    assert block_path(tmp_path) == tmp_path / "brownout.block"
    monkeypatch.setenv("BROWNOUT_BLOCK", "/somewhere/else")
    assert block_path(tmp_path) == Path("/somewhere/else")


WRITER = """
    import sys
    from pathlib import Path
    from backend.brownout.block import Block
    from tests.brownout.test_block import telemetry
    block = Block(Path(sys.argv[1]), int(sys.argv[2]))
    print("go", flush=True)
    for value in range(1, 4001):
        block.write_telemetry(0, telemetry(value))
"""


def test_a_reader_beside_a_writer_never_sees_a_mixture(block: Block) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(block.path), str(os.getpid())],
        cwd=PRODUCT_ROOT,
        stdout=subprocess.PIPE,
    )
    assert writer.stdout.readline()
    last = 0
    while last < 4000:
        try:
            row = block.read_telemetry(0)
        except BlockError:
            continue  # not written yet, or a busy moment: no answer is allowed, a wrong one is not
        value = row["num_steps"]
        assert value >= last
        assert row["requests"] == value
        assert (row["ttft_counts"] == value).all()
        assert (row["active_slots"] == value).all()
        last = value
    assert writer.wait(30) == 0
