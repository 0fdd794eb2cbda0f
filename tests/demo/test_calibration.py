"""Calibration questions: every family and form, none of them held out."""

import json

import pytest

from backend.demo.calibration import calibration_texts, main
from backend.demo.families import FAMILIES
from backend.demo.quality import held_out_questions
from backend.demo.template import prompt_text


def test_questions_are_fixed_by_the_seed_and_none_is_held_out(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "q.jsonl"), "--questions", "3"]) == 0
    texts = [json.loads(line)["text"] for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert texts == calibration_texts(3, 0) != calibration_texts(3, 1)
    assert len(texts) == 3 * 2 * len(FAMILIES)
    held_out = {prompt_text(prompt) for family in FAMILIES for prompt, _ in held_out_questions(family, "free", 20)}
    assert not any(text.startswith(prompt) for text in texts for prompt in held_out)


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / "q.txt")])
    assert stop.value.code == 2
