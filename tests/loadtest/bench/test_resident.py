"""The benchmark of the resident pool compares what it says it compares."""

from __future__ import annotations

import json
from pathlib import Path

from loadtest.bench.__main__ import main


def test_variants_are_timed_in_turn_and_compared_with_local(tmp_path: Path, capsys) -> None:
    report = tmp_path / "resident.json"
    sizes = ["--requests", "8", "--prompt-tokens", "40", "--new-tokens", "3", "--runs", "2"]
    chosen = ["--variants", "local", "united-ewma", "wait"]
    assert main(["resident", "--united", "4", *sizes, *chosen, "--json", str(report)]) == 0
    found = json.loads(report.read_text())["variants"]
    assert list(found) == ["local", "united-ewma", "wait"]
    for name, row in found.items():
        assert len(row["runs_s"]) == 2 and row["relative_speed"] > 0
        assert row["resident_bytes"] * (1 if name == "local" else 2) == row["all_experts_bytes"]
    assert found["local"]["timed"]["stalls"] == found["united-ewma"]["timed"]["stalls"] == 0
    assert found["wait"]["timed"]["stalls"] > 0 and found["wait"]["timed"]["misses"] == 0
    assert found["united-ewma"]["timed"]["misses"] > 0
    assert "united-ewma" in capsys.readouterr().out
