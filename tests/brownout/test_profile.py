"""Profiles: written and read alike, bound to their checkpoint, and what is wrong is named."""

import json
from dataclasses import replace

import pytest

from backend.brownout.profile import Level, Profile, deepest_within, read_profile, write_profile
from backend.brownout.settings import Settings
from backend.errors import ConfigError

FULL = Level("united", 0, 1.0, 1.0, 0.0, 50.0, 4.0, 1.0)
LEVELS = (
    FULL,
    Level("united", 8, 0.6, 0.8, 1.5, 20.0, 3.9, 0.8, {"add": 3.0}, united_share=0.3),
    Level("united", 8, 0.2, 0.2, 4.0, 9.0, 3.7, 0.7, other_losses={"exact_match": 9.5}),
    Level("reroute", 0, 0.5, 0.5, 9.0, 8.0, 3.7, 0.6, similarity_min=0.4),
)
PROFILE = Profile("ck", "f" * 32, 32, "letter", LEVELS)


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "sub" / "brownout-profile.json"
    write_profile(path, PROFILE)
    assert read_profile(path, "f" * 32) == PROFILE
    assert json.loads(path.read_text())["united_share"] == [0.0, 0.3, 0.0, 0.0]
    assert LEVELS[3].settings(7) == Settings(7, 0.5, 0.5, "reroute", similarity_min=0.4)


def test_a_budget_bounds_the_level():
    found = [deepest_within(LEVELS, budget) for budget in (0, 1.4, 1.5, 5, 100)]
    assert found == [FULL, FULL, LEVELS[1], LEVELS[2], LEVELS[3]]
    assert deepest_within(LEVELS[1:], 1.4) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(format=9), "format 9, this version reads 1"),
        (lambda raw: raw.pop("batch"), "batch is missing"),
        (lambda raw: raw.update(levels=[]), "has no levels"),
        (lambda raw: raw["levels"][1].update(way="8"), r"levels\[1\]\.way must be of type int, got '8'"),
        (lambda raw: raw["levels"][1].update(loss_percent=float("nan")), r"levels\[1\]\.loss_percent must be of type float"),
        (lambda raw: raw["levels"][1].update(mechanism="magic"), r"levels\[1\]: mechanism must be one of"),
        (lambda raw: raw["levels"][2].update(speed=1), r"levels\[2\]\.speed is not known"),
        (lambda raw: raw["levels"][2].update(loss_percent=1.0), "level 2 loses 1.0 %, less than the 1.5 %"),
        (lambda raw: raw["levels"].pop(0), "level 0 must be full quality"),
    ],
)  # fmt: skip
def test_a_wrong_profile_is_named(tmp_path, change, message):
    path = tmp_path / "p.json"
    write_profile(path, PROFILE)
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=message):
        read_profile(path)


def test_a_profile_of_another_checkpoint_a_missing_and_a_broken_one_are_named(tmp_path):
    path = tmp_path / "p.json"
    with pytest.raises(ConfigError, match=r"p\.json cannot be read"):
        read_profile(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"p\.json is not JSON"):
        read_profile(path)
    write_profile(path, replace(PROFILE, fingerprint="0" * 32))
    with pytest.raises(ConfigError, match="made for another checkpoint"):
        read_profile(path, "f" * 32)
