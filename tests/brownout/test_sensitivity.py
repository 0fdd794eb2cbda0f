"""Thresholds by layer: the best ones are found, and the command measures them through the engine."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.brownout.measure import Text, apply_by_layer
from backend.brownout.sensitivity import layer_losses, least_loss, main
from backend.brownout.settings import Settings
from backend.engine.llm import LLM

_NUMBERS = st.integers(0, 400)


@given(st.lists(st.tuples(*[st.tuples(_NUMBERS, _NUMBERS)] * 3), min_size=1, max_size=4), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_no_other_choice_within_the_budget_loses_less(layers, column):
    loss = np.array([[a for a, _ in layer] for layer in layers], float)
    slots = np.array([[b for _, b in layer] for layer in layers]) / 4
    budget = slots[:, column].sum()
    chosen = least_loss(loss, slots, budget)

    def total(table, columns):
        return sum(row[i] for row, i in zip(table, columns, strict=True))

    within = [c for c in product(range(3), repeat=len(layers)) if total(slots, c) <= budget]
    assert total(loss, chosen) == min(total(loss, c) for c in within)
    assert total(slots, chosen) <= budget + 0.05


def test_a_budget_that_nothing_meets_is_refused():
    with pytest.raises(ValueError, match="no choice is within 3 slots"):
        least_loss(np.zeros((2, 2)), np.full((2, 2), 4.0), 3)


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
    assert main([str(text_checkpoint)]) == 1
    assert "give --questions, --text" in capsys.readouterr().out
