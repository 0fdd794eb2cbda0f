"""Thresholds by layer: the best ones are found, and the command measures them through the engine."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.brownout.calibrate import main as calibrate
from backend.brownout.layer_thresholds import LayerThresholds
from backend.brownout.measure import Text, apply_by_layer
from backend.brownout.profile import read_profile
from backend.brownout.sensitivity import best_by_layer, layer_losses, main
from backend.brownout.settings import Settings
from backend.engine.llm import LLM

_THETAS = [0.0, 0.3, 0.7, 1.0]
_STEPS = st.tuples(*[st.integers(0, 300)] * 3)


@given(st.lists(st.tuples(_STEPS, _STEPS), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_no_layer_falls_and_no_more_is_lost_with_as_many_slots(layers):
    # From theta = 0 on a layer's slots rise and its loss falls, ever more slowly.
    slots = np.array([np.cumsum([32, *(1 + a for a in widths)]) for widths, _ in layers]) / 4
    falls = np.array([sorted(slopes) for _, slopes in layers])[:, ::-1] / 100 * np.diff(slots)
    loss = np.hstack([np.cumsum(falls[:, ::-1], axis=1)[:, ::-1], np.zeros((len(layers), 1))])
    table = best_by_layer(_THETAS, loss, slots)
    for column, row in enumerate(table.by_layer):
        used, lost = (
            sum(np.interp(t, _THETAS, curve) for t, curve in zip(row, curves, strict=True)) for curves in (slots, loss)
        )
        assert used == pytest.approx(slots[:, column].sum(), abs=0.15)
        within = [c for c in product(range(4), repeat=len(layers)) if _sum(slots, c) <= used]
        assert lost <= min(_sum(loss, c) for c in within) + 0.5


def _sum(table, columns):
    return sum(row[i] for row, i in zip(table, columns, strict=True))


def test_the_sensitive_layer_is_kept():
    slots = np.array([[8.0, 20.0, 40.0]] * 2)
    table = best_by_layer([0.0, 0.4, 1.0], np.array([[4.0, 2.0, 0.0], [1.0, 0.5, 0.0]]), slots)
    assert table.by_layer == ((0.0, 0.0), (0.76, 0.0), (1.0, 1.0))
    # A first part that gains little does not keep from the rest that gains much.
    dent = best_by_layer([0.0, 0.4, 1.0], np.array([[4.0, 3.9, 0.0], [1.0, 0.5, 0.0]]), slots)
    assert dent.at(0.4) == (0.76, 0.0)


@pytest.fixture(scope="module")
def llm(text_checkpoint):
    return LLM(str(text_checkpoint), max_running=4)


def test_a_layer_alone_is_dimmed(llm):
    windows = np.random.default_rng(0).integers(0, 256, (4, 24)).tolist()
    text = Text({"a": windows}, 4, decode=True)
    text.keep_full(llm.engine.vocab_size)
    text.score(llm)
    apply_by_layer(llm, Settings(threshold_prefill=0.5, threshold_decode=0.5, way=4), [0.0, 1.0])
    dimmed, full = text.score(llm)["active_slots_by_layer"]
    assert dimmed <= 2 < full
    loss, slots = layer_losses(llm, text, 4, [0.0, 1.0])
    assert (loss[:, 1] == 0).all() and (loss[:, 0] > 0).all()
    assert slots[0, 0] == dimmed and slots[1, 1] == full and (slots[:, 0] < slots[:, 1]).all()
    assert text.score(llm)["united_share"] == 0  # as before


def test_the_command_compares_at_no_more_slots(text_checkpoint, tmp_path, capsys):
    text = tmp_path / "held_out.txt"
    text.write_text("some words to be predicted " * 10)
    path = tmp_path / "layers.json"
    arguments = [str(text_checkpoint), "--text", f"words={text}", "--text-window", "33", "--batch", "4", "--way", "4"]
    assert main([*arguments, "--thetas", "0,0.5,1", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert np.shape(result["divergence"]) == np.shape(result["active_slots"]) == (2, 3)
    (pair,) = result["comparison"]
    assert pair["uniform"]["thresholds"] == [0.5, 0.5] and len(pair["by_layer"]["thresholds"]) == 2
    assert pair["uniform"]["text"]["divergence"]["words"] > 0
    assert "One layer dimmed alone" in capsys.readouterr().out
    profile = tmp_path / "profile.json"
    arguments = [*arguments[:-2], "--grid", "united:4:0,0.5", "--rounds", "1", "--cost", "slots", "--layers", str(path)]
    assert calibrate([*arguments, "--output", str(profile)]) == 0
    assert read_profile(profile).layer_thresholds == {4: LayerThresholds.from_json(result["layer_thresholds"])}
    path.write_text(json.dumps(result | {"fingerprint": "0"}))
    assert calibrate([*arguments, "--output", str(profile)]) == 1
    assert "were made for another checkpoint" in " ".join(capsys.readouterr().out.split())
    assert main([str(text_checkpoint)]) == 1
    assert "give --questions, --text" in capsys.readouterr().out
