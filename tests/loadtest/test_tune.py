"""Tuning: the search finds the fastest tiles, keeps to its time, and its file is the one that kernels read."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from rich.console import Console

from backend.kernels.tuning import ExpertShape, TileConfig, default_tiles, entry, expert_tiles, write_entries
from loadtest.bench import tune

DECODE = ExpertShape(slots=68, hidden=2048, size=1408, tokens=64, top_k=4, dtype="bfloat16", device="some GPU")
PREFILL = ExpertShape(slots=68, hidden=2048, size=1408, tokens=8192, top_k=4, dtype="bfloat16", device="some GPU")


def cost(shape: ExpertShape, tiles: dict[str, TileConfig]) -> float | None:
    """A made-up device that likes 128 columns, 5 or 4 stages, and tiles of 128 rows; 256 columns do not fit."""
    if any(t.columns > 128 for t in tiles.values()):
        return None
    return sum(1000 / t.columns + 10 / t.num_stages + 1000 / t.rows + t.num_warps for t in tiles.values())


def test_the_fastest_tiles_are_found_and_read_back(tmp_path: Path) -> None:
    results = list(tune.tune([DECODE, PREFILL], cost, 60.0, Console(quiet=True)))
    for result, shape in zip(results, (DECODE, PREFILL), strict=True):
        assert result.seconds < cost(shape, default_tiles(shape))
        for kernel, tile in result.tiles.items():
            every = [c for rows in (64, 128) for c in tune.candidates(shape, kernel, rows) if cost(shape, {kernel: c})]
            of_phase = [c for c in every if c.rows == 64] if shape.phase == "decode" else every
            assert cost(shape, {kernel: tile}) == min(cost(shape, {kernel: c}) for c in of_phase)
    write_entries(tmp_path, DECODE, [entry(result.shape, result.tiles) for result in results])
    for result in results:
        assert expert_tiles(result.shape, tmp_path) == result.tiles


def test_what_fits_nowhere_is_left_out() -> None:
    assert not list(tune.tune([DECODE], lambda *_: None, 5.0, Console(quiet=True)))


def test_without_time_nothing_is_measured() -> None:
    def measure(*_: object) -> float:
        raise AssertionError("the time is over")

    assert not list(tune.tune([DECODE, PREFILL], measure, 0.0, Console(quiet=True)))


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [(["--tokens", "0"], 2, "--tokens must be at least 1"), (["--device", "cpu"], 1, "tune needs a CUDA device")],
)
def test_the_command_says_what_is_wrong(capsys, options: list[str], status: int, message: str) -> None:
    parser = argparse.ArgumentParser()
    tune.add_options(parser)
    assert tune.main(parser.parse_args(options), Console()) == status
    assert message in " ".join(capsys.readouterr().out.split())


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
def test_tuning_runs_to_its_end_on_interpreted_kernels(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("triton")
    few = {"decode": TileConfig(16, 32, 32), "prefill": TileConfig(64, 64, 32)}
    monkeypatch.setattr(tune, "candidates", lambda shape, kernel, rows: [few[shape.phase]] if rows < 128 else [])
    parser = argparse.ArgumentParser()
    tune.add_options(parser)
    options = ["--device", "interpreter", "--shape", "tiny", "--tokens", "3", "--united-ways", "4"]
    args = parser.parse_args([*options, "--folder", str(tmp_path), "--budget-s", "20"])
    assert tune.main(args, Console(quiet=True)) == 0
    shape = ExpertShape(12, 32, 16, 3, 4, "bfloat16", "interpreter")
    assert set(expert_tiles(shape, tmp_path)) == {"gate_up", "down"}
    assert len(list(tmp_path.iterdir())) == 1
