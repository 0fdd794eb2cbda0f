"""Settings: what is allowed, and what a model with or without united experts can follow."""

import pytest

from backend.brownout.settings import MECHANISMS, Available, Settings
from backend.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold_prefill": 1.5}, "threshold_prefill must be between 0 and 1, got 1.5"),
        ({"threshold_decode": float("nan")}, "threshold_decode must be between 0 and 1, got nan"),
        ({"similarity_min": -0.1}, "similarity_min must be between 0 and 1"),
        ({"resident_share": 1.1}, "resident_share must be between 0 and 1, got 1.1"),
        ({"mechanism": "merge"}, "mechanism must be one of united, united_top_k, .* got 'merge'"),
        ({"ranking": "size"}, "ranking must be one of count, gate_mass, got 'size'"),
        ({"way": 1}, "way must be 0 .* or from 2 to 64, got 1"),
    ],
)
def test_unusable_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**values)


def test_never_classes_stay_at_one():
    settings = Settings(threshold_prefill=0.5, threshold_decode=0.25)
    assert settings.by_class() == (0.5, 0.25, 1.0, 1.0)
    assert settings.dims and not Settings().dims


def test_what_is_loaded_decides_what_can_be_followed():
    bare, full = Available(), Available((2, 8), similarity=True)
    assert bare.mechanisms == ("piggyback", "top_k", "drop")
    assert full.mechanisms == MECHANISMS
    assert bare.way_of(Settings()) == 0
    assert full.way_of(Settings()) == full.way_of(Settings(threshold_decode=0.0)) == 8
    assert full.way_of(Settings(way=2, mechanism="drop")) == 2
    assert bare.way_of(Settings(threshold_decode=0.0, mechanism="top_k")) == 0
    for settings in (Settings(threshold_decode=0.0), Settings(way=8), Settings(mechanism="reroute")):
        with pytest.raises(ConfigError, match="loaded"):
            bare.way_of(settings)


def test_fewer_resident_experts_need_a_resident_pool():
    assert Available((2,), resident=True).way_of(Settings(resident_share=0.5)) == 2
    with pytest.raises(ConfigError, match=r"resident_share 0.5 needs a resident expert pool \(parameter expert_pool"):
        Available((2,)).way_of(Settings(resident_share=0.5))


def test_mechanisms_that_choose_by_token_are_refused_where_experts_may_be_missing():
    partly = Available((2,), missing_experts=True)
    assert partly.mechanisms == ("united", "united_top_k", "drop")
    assert partly.way_of(Settings(mechanism="top_k")) == 2, "nothing is dimmed"
    with pytest.raises(ConfigError, match=r"top_k cannot stand in for missing experts.*united, united_top_k, drop"):
        partly.way_of(Settings(mechanism="top_k", threshold_decode=0.5))
