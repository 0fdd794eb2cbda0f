"""Thresholds by layer: one number dims them all, and the engine serves with what the profile says."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.brownout.fingerprint import checkpoint_fingerprint
from backend.brownout.layer_thresholds import LayerThresholds
from backend.brownout.measure import nominal_share
from backend.brownout.profile import PROFILE_NAME, Level, Profile, read_profile, write_profile
from backend.brownout.settings import Settings
from backend.engine.llm import LLM
from backend.errors import ConfigError

TABLE = LayerThresholds((0.0, 0.5, 1.0), ((0.0, 0.0), (0.25, 0.75), (1.0, 1.0)))
_FRACTIONS = st.floats(0, 1)


@given(st.lists(_FRACTIONS, min_size=6, max_size=6), _FRACTIONS, _FRACTIONS, st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_every_layer_rises_with_theta_and_is_exact_at_the_rows(values, one, other, middle):
    first, second = sorted(values[:2]), sorted(values[2:4])
    table = LayerThresholds((0.0, middle, 1.0), (*zip(first, second, strict=True), (1.0, 1.0)))
    low, high = table.at(min(one, other)), table.at(max(one, other))
    assert all(0 <= a <= b + 1e-12 and b <= 1 for a, b in zip(low, high, strict=True))
    assert [table.at(theta) for theta in table.thetas] == list(table.by_layer)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "must be an object with thetas and by_layer"),
        ({"thetas": [0, 1], "by_layer": [[0, "0"], [1, 1]]}, "a list of such lists"),
        ({"thetas": [0, 0.9], "by_layer": [[0], [1]]}, "begin with 0 and end with 1"),
        ({"thetas": [0, 0.5, 0.5, 1], "by_layer": [[0], [0], [0], [1]]}, "must ascend"),
        ({"thetas": [0, 1], "by_layer": [[0, 0], [1]]}, "a row for each of thetas"),
        ({"thetas": [0, 1], "by_layer": [[-0.1], [1]]}, "between 0 and 1"),
        ({"thetas": [0, 0.5, 1], "by_layer": [[0.4], [0.3], [1]]}, "may fall"),
        ({"thetas": [0, 1], "by_layer": [[0, 0], [1, 0.9]]}, "must be 1 at theta = 1"),
    ],
)
def test_a_wrong_table_is_named(raw, message):
    with pytest.raises(ValueError, match=message):
        LayerThresholds.from_json(raw)


@pytest.fixture(scope="module")
def served(text_checkpoint, tmp_path_factory):
    """A copy of the checkpoint with a profile that has a table for the 4-way united experts."""
    folder = tmp_path_factory.mktemp("served") / "checkpoint"
    shutil.copytree(text_checkpoint, folder)
    full = Level("united", 0, 1.0, 1.0, 0.0, 8.0, 2.0, 1.0)
    profile = Profile("checkpoint", checkpoint_fingerprint(folder), 4, "letter", (full,), {4: TABLE})
    write_profile(folder / PROFILE_NAME, profile)
    assert read_profile(folder / PROFILE_NAME) == profile
    return folder


def test_the_engine_follows_the_profile(served):
    llm = LLM(str(served), max_running=4)
    model = llm.engine.runner.model

    def layers(**values):
        llm.set_settings(Settings(**values))
        return model.thresholds.tolist()

    dimmed = {"threshold_prefill": 0.5, "threshold_decode": 0.0}
    assert layers(**dimmed, way=4) == layers(**dimmed) == [[0.25, 0.0, 1.0, 1.0], [0.75, 0.0, 1.0, 1.0]]
    assert nominal_share(llm.engine, 1, 0) == 0.5 and nominal_share(llm.engine, 0, 1) == 1.0
    assert layers() == [[1.0] * 4] * 2
    # What the table was not made for has one threshold for all layers.
    for other in ({"way": 2}, {"mechanism": "drop"}, {"mechanism": "reroute"}):
        assert layers(**dimmed, **other) == [[0.5, 0.0, 1.0, 1.0]] * 2
    without = LLM(str(served), max_running=4, profile="none")
    without.set_settings(Settings(**dimmed))
    assert without.engine.runner.model.thresholds.tolist() == [[0.5, 0.0, 1.0, 1.0]] * 2


def test_a_profile_with_a_table_that_does_not_fit_is_named(served, tmp_path):
    profile = read_profile(served / PROFILE_NAME)
    path = tmp_path / "p.json"
    narrow = LayerThresholds((0.0, 1.0), ((0.0,), (1.0,)))
    write_profile(path, replace(profile, layer_thresholds={4: narrow}))
    with pytest.raises(ConfigError, match="for way 4 are for 1 MoE layers, the model has 2"):
        LLM(str(served), profile=str(path))
    write_profile(path, replace(profile, fingerprint="0" * 32))
    with pytest.raises(ConfigError, match="was made for another checkpoint"):
        LLM(str(served), profile=str(path))
    path.write_text(path.read_text().replace('"thetas"', '"theta"'))
    with pytest.raises(ConfigError, match=r"layer_thresholds\['4'\]: must be an object with thetas and by_layer"):
        read_profile(path)
