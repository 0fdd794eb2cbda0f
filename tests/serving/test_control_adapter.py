"""The control plane's rules: all or nothing, leases, owners, the token, and a status that is true."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.brownout import block as layout
from backend.brownout.block import TELEMETRY, Block
from backend.brownout.control import Lease
from backend.brownout.profile import Level
from backend.brownout.settings import Settings
from backend.errors import ConfigError, InvalidRequestError, UnavailableError
from backend.serving.control_adapter import KEYS, ControlPlane, baseline_settings, parse_change

#: Of every type that JSON has for one value, and the strings that stand for numbers, near the limits and not.
VALUES = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        2,
        64,
        65,
        2**70,
        -0.5,
        0.5,
        1.5,
        4.0,
        float("nan"),
        float("inf"),
        "",
        "0.5",
        "1e999",
        "united",
    ]
)
LEVELS = (Level("united", 0, 1.0, 1.0, 0.0, 50, 4, 1.0), Level("united", 4, 0.5, 0.25, 3.0, 20, 3, 0.7))


@pytest.fixture
def block(tmp_path: Path) -> Block:
    return Block(tmp_path / "block", 1)


@pytest.fixture
def plane(block: Block) -> ControlPlane:
    record = np.zeros(1, TELEMETRY)
    record["ways"], record["similarity"] = 1 << 2 | 1 << 4, 0
    block.write_telemetry(0, record)
    return ControlPlane(block, Settings(), LEVELS)


def test_a_call_sets_and_tells(plane: ControlPlane, block: Block) -> None:
    values = {"threshold_prefill": "0.5", "threshold_decode": 0.25, "mechanism": "united", "way": 4.0, "lease_s": "3"}
    status = plane.call({**values, "owner": "me", "triton_enable_empty_final_response": False})
    settings = status["settings"]
    assert (settings["threshold_prefill"], settings["threshold_decode"], settings["way"]) == (0.5, 0.25, 4)
    assert settings["owner"] == "me"
    assert 2.9 < settings["lease_left_s"] <= 3
    assert Lease.read(block).in_force(status["time_s"]).threshold_prefill == 0.5
    assert status["available"]["ways"] == [2, 4]
    assert "reroute" not in status["available"]["mechanisms"]
    assert [level["level"] for level in status["available"]["levels"]] == [0, 1]
    assert json.loads(json.dumps(status)) == status


def test_the_share_of_resident_experts_is_set_where_there_is_a_pool(plane: ControlPlane, block: Block) -> None:
    assert plane.call({"resident_share": 1})["available"]["resident_share"] is False
    record = np.zeros(1, TELEMETRY)
    record["ways"], record["resident"] = 1 << 2 | 1 << 4, 1
    block.write_telemetry(0, record)
    status = plane.call({"resident_share": "0.25", "level": 1})
    assert (status["settings"]["resident_share"], status["settings"]["way"]) == (0.25, 4)
    assert status["available"]["resident_share"] is True
    assert Lease.read(block).values.resident_share == 0.25


def test_values_that_are_not_given_stay(plane: ControlPlane) -> None:
    plane.call({"threshold_prefill": 0.5})
    settings = plane.call({"threshold_decode": 0.25})["settings"]
    assert (settings["threshold_prefill"], settings["threshold_decode"]) == (0.5, 0.25)


def test_a_level_is_a_set_of_values(plane: ControlPlane) -> None:
    settings = plane.call({"level": "1"})["settings"]
    assert (settings["threshold_prefill"], settings["threshold_decode"], settings["way"]) == (0.5, 0.25, 4)


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"threshold_prefill": 1.5}, "threshold_prefill must be a number from 0 to 1, got 1.5"),
        ({"threshold_decode": "nan"}, "threshold_decode must be a number"),
        ({"threshold_decode": True}, "threshold_decode must be a number"),
        ({"similarity_min": "high"}, "similarity_min must be a number from 0 to 1, got 'high'"),
        ({"resident_share": 2}, "resident_share must be a number from 0 to 1, got 2"),
        ({"resident_share": 0.5}, "resident_share 0.5 needs a resident expert pool"),
        ({"way": 2.5}, "way must be a whole number"),
        ({"way": 1}, "way must be 0 .* or from 2 to 64"),
        ({"way": 8}, "way 8 is not loaded; loaded ways are 2, 4"),
        ({"mechanism": "reroute"}, "reroute needs expert similarities"),
        ({"mechanism": "magic"}, "mechanism must be one of united, united_top_k"),
        ({"level": 2}, "level must be from 0 to 1, got 2"),
        ({"level": 1, "way": 2}, "level sets way itself"),
        ({"lease_s": -1}, "lease_s must be a number from 0 to 86400"),
        ({"owner": ""}, "owner must be a name"),
        ({"owner": "x" * 200}, "owner must be a name"),
        ({"threshold": 0.5}, "unknown parameter 'threshold': known are threshold_prefill"),
    ],
)
def test_one_bad_value_changes_nothing(plane: ControlPlane, bad: dict, complaint: str) -> None:
    before = plane.call({"similarity_min": 0.3})["settings"]
    with pytest.raises(InvalidRequestError, match=complaint):
        plane.call({"similarity_min": 0.9, **bad})
    after = plane.call({})["settings"]
    assert (after["version"], after["similarity_min"]) == (before["version"], 0.3)


@given(st.dictionaries(st.sampled_from([*KEYS, "other"]), VALUES | st.floats() | st.integers(), max_size=4))
def test_whatever_comes_is_taken_or_refused(parameters: dict) -> None:
    try:
        change = parse_change(parameters, LEVELS, "")
    except InvalidRequestError as error:
        assert str(error)
    else:
        assert change is None or Settings(**change.values)


def test_a_second_owner_is_refused_while_the_lease_lives(plane: ControlPlane) -> None:
    plane.call({"threshold_prefill": 0.5, "owner": "first"})
    for parameters in ({"threshold_prefill": 0.4}, {"lease_s": 0}):
        with pytest.raises(UnavailableError, match=r"held by 'first' for another (10\.0|9\.\d) s"):
            plane.call({**parameters, "owner": "second"})
    assert plane.call({})["settings"]["threshold_prefill"] == 0.5
    status = plane.call({"lease_s": 0, "owner": "first"})
    assert (status["settings"]["threshold_prefill"], status["settings"]["owner"]) == (1.0, None)
    assert plane.call({"threshold_prefill": 0.4, "owner": "second"})["settings"]["owner"] == "second"


def test_changes_need_the_token_and_reading_does_not(block: Block) -> None:
    guarded = ControlPlane(block, Settings(), token="secrét")
    for wrong in ({}, {"token": "secret"}, {"token": 7}):
        with pytest.raises(InvalidRequestError, match="the token is"):
            guarded.call({"threshold_prefill": 0.5, "mechanism": "drop", **wrong})
    assert guarded.call({})["settings"]["threshold_prefill"] == 1.0
    assert guarded.call({"threshold_prefill": 0.5, "token": "secrét"})["settings"]["threshold_prefill"] == 0.5


def test_a_load_ends_leases_and_keeps_counting_versions(plane: ControlPlane, block: Block) -> None:
    version = plane.call({"threshold_prefill": 0.5})["settings"]["version"]
    settings = ControlPlane(block, Settings(threshold_decode=0.9)).call({})["settings"]
    assert (settings["threshold_prefill"], settings["threshold_decode"], settings["owner"]) == (1.0, 0.9, None)
    assert settings["version"] > version


def test_a_damaged_block_is_written_again(plane: ControlPlane, block: Block) -> None:
    plane.call({"threshold_prefill": 0.5})
    with open(block.path, "r+b") as file:
        file.seek(layout._SETTINGS_AT + 16)
        file.write(b"\xff" * 64)
    status = plane.call({})
    assert status["settings"]["threshold_prefill"] == 0.5
    assert Lease.read(block).values.threshold_prefill == 0.5


def test_a_damaged_engine_section_is_left_out(plane: ControlPlane, block: Block) -> None:
    with open(block.path, "r+b") as file:
        file.seek(layout._telemetry_at(0) + 40)
        file.write(b"\xff" * 64)
    assert plane.call({})["telemetry"] == []


def test_the_baseline_comes_from_the_models_parameters() -> None:
    parameters = {"threshold_prefill": "0.9", "threshold_decode": "", "way": " 4 "}
    assert baseline_settings(parameters, ()) == Settings(threshold_prefill=0.9, way=4)
    assert baseline_settings({"level": "1"}, LEVELS).threshold_decode == 0.25
    with pytest.raises(ConfigError, match="parameter threshold_prefill must be a number"):
        baseline_settings({"threshold_prefill": "2"}, ())
    with pytest.raises(ConfigError, match="unknown parameter 'treshold'"):
        baseline_settings({"treshold": "2"}, ())
