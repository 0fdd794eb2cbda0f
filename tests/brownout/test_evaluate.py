"""Evaluation and calibration on a tiny checkpoint, from command to file."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from backend.brownout import measure
from backend.brownout.calibrate import front
from backend.brownout.calibrate import main as calibrate
from backend.brownout.evaluate import Measures, evaluate
from backend.brownout.evaluate import main as evaluate_command
from backend.brownout.fingerprint import checkpoint_fingerprint
from backend.brownout.points import describe, parse_points
from backend.brownout.profile import Level, read_profile
from backend.brownout.settings import Settings
from backend.engine.llm import LLM
from backend.engine.sampling_params import SamplingParams
from backend.engine.scoring import Scorer
from backend.errors import ConfigError


@pytest.fixture(scope="module")
def llm(text_checkpoint):
    return LLM(str(text_checkpoint), max_running=8)


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    path = tmp_path_factory.mktemp("choices") / "some.jsonl"
    rows = [{"question": f"{i} and one is", "choices": [str(i + 1), str(i + 3)], "label": 0} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _measures(llm, choices):
    windows = [llm.tokenizer.encode(text * 3) for text in ("a quick brown fox ", "1 + 2 = 3, ")]
    questions = measure.demo_questions(llm, 1, 0)[:12]
    text = measure.Text({"words": [windows[0]], "sums": [windows[1]]}, 8)
    text.keep_full(llm.engine.vocab_size)
    return Measures(questions, text, {"some": measure.read_choices(choices)}, 1, None, 8)


def test_threshold_one_of_every_mechanism_is_no_brownout(llm, choices):
    points = [Settings(mechanism=mechanism, way=4) for mechanism in ("united", "drop", "top_k", "piggyback", "reroute")]
    full, *others = evaluate(llm, points, _measures(llm, choices))
    for point in others:
        for name in ("united_share", "active_slots", "assignments_per_token", "tokens_per_step"):
            assert point["questions"][name] == full["questions"][name]
        assert point["text"]["perplexity"] == full["text"]["perplexity"]
        assert max(point["text"]["divergence"].values()) < 1e-5
        assert point["choices"]["some"]["summed"] == full["choices"]["some"]["summed"]
        assert point["exact_match"]["by_task"] == full["exact_match"]["by_task"]
        assert point["questions"]["united_share"] == 0.0


def test_deeper_dimming_shows_in_slots_share_and_perplexity(llm, choices):
    results = evaluate(llm, parse_points(["united:4:0.5,0"]), _measures(llm, choices))
    for part in ("questions", "text"):
        slots = [point[part]["active_slots"] for point in results]
        share = [point[part]["united_share"] for point in results]
        assert slots == sorted(slots, reverse=True) and slots[0] > slots[-1]
        assert share[0] == 0 < share[1] < share[2] <= 1
    assert results[2]["text"]["comparable"] and results[2]["text"]["nominal_share"] == 1.0
    for name in ("words", "sums"):
        assert results[2]["text"]["perplexity"][name] != results[0]["text"]["perplexity"][name]
        assert results[0]["text"]["divergence"][name] == 0 < results[2]["text"]["divergence"][name]


def test_a_share_well_below_nominal_is_not_comparable(llm):
    measure.apply(llm, Settings(threshold_prefill=0.0, threshold_decode=0.0, way=2))
    found = measure.Text({"one": [llm.tokenizer.encode("ab")]}, 1, decode=True).score(llm)
    measure.apply(llm, Settings())
    assert found["united_share"] < 0.95 and not found["comparable"]


def test_a_meter_sees_the_steps_that_were_asked_for(text_checkpoint):
    """Also where the engine would launch the next one before."""
    llm = LLM(str(text_checkpoint), dtype="float32", device="cpu", max_batch_tokens=16, async_scheduling="on")
    meter, launched, run = measure.Meter(llm.engine), [], llm.engine.runner.run
    llm.engine.runner.run = lambda schedule, *previous: (
        launched.append(sum(schedule.num_tokens)),
        run(schedule, *previous),
    )[1]
    seen = []
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    made = measure.complete(
        llm, [[5] * 20, [6] * 3], params, lambda: (meter.observe(), seen.append(meter.tokens - sum(seen)))
    )
    assert [len(tokens) for tokens in made] == [4, 4]
    assert seen == launched and sum(seen) == 20 + 3 + 2 * 3
    assert llm.engine.overlap, "as before"


def test_domains_and_families_stand_side_by_side_or_one_after_another(llm):
    windows = {"a": [[1, 2], [3, 4]], "b": [[5, 6], [7, 8], [9, 10]]}
    assert [name for name, _ in measure.Text(windows, 2).order] == ["a", "b", "a", "b", "b"]
    apart = measure.Text(windows, 2, mixed=False)
    assert [name for name, _ in apart.order] == ["a", "a", "b", "b", "b"]
    mixed, sorted_ = (measure.demo_questions(llm, 1, 0, mixed) for mixed in (True, False))
    families = [asked.family for asked in sorted_]
    assert families[::2] == families[1::2] and families != [asked.family for asked in mixed]
    assert {(a.family, a.form) for a in mixed} == {(a.family, a.form) for a in sorted_}
    scores = [text.score(llm)["perplexity"] for text in (measure.Text(windows, 2), apart)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_of_chats_only_the_last_answer_is_scored(llm, text_checkpoint, tmp_path, capsys):
    begin = llm.tokenizer.encode("<|im_start|>", add_special_tokens=False)
    question, answer = llm.tokenizer.encode("one and one"), llm.tokenizer.encode(" is two")
    chat = [*begin, *question, *begin, *answer]
    text = measure.Text({"chats": [chat]}, 1, after=begin[0])
    text.keep_full(llm.engine.vocab_size)
    measure.apply(llm, Settings())
    found = text.score(llm)
    (scored,) = Scorer(llm.engine, 1).score([(chat, len(chat) - len(answer))])
    assert len(begin) == 1 and found["perplexity"]["chats"] == pytest.approx(np.exp(-scored.logprobs.mean()), rel=1e-4)
    whole = measure.Text({"chats": [chat[1:]]}, 1, after=299).score(llm)  # a token that it does not have
    assert whole["perplexity"]["chats"] != pytest.approx(found["perplexity"]["chats"], rel=1e-3)
    path = tmp_path / "text.txt"
    path.write_text("some words")
    assert evaluate_command([str(text_checkpoint), "--text", str(path), "--score-after", "one two"]) == 1
    assert "--score-after must be one token of the checkpoint" in " ".join(capsys.readouterr().out.split())


def test_losses_are_relative_to_the_full_model():
    loss = measure.relative_loss({"a": 50.0, "b": 80.0, "c": 0.0}, {"a": 25.0, "b": 84.0, "c": 10.0})
    assert loss["mean"] == pytest.approx(22.5) and loss["worst_task"] == "a" and loss["worst"] == 50.0


def test_choices_are_scored_by_what_the_model_gives_them(llm):
    question = measure.Choice("x y", ("abc", "z"), 0)
    found = measure.multiple_choice(llm, [question], 0, 4)
    sums = []
    for choice in question.choices:
        context, ids = llm.tokenizer.encode("x y"), llm.tokenizer.encode(f"x y {choice}")
        windows = measure.Scorer(llm.engine).score([(ids, len(context))])
        sums.append(windows[0].logprobs.sum())
    assert found["summed"] == 100.0 * (sums[0] > sums[1])
    assert found["normalised"] == 100.0 * (sums[0] / 3 > sums[1])


def test_points_are_grids_written_short():
    points = parse_points(["united/gate_mass:2,4:0.5:0,1", "top_k:0:0.5", "reroute/0.3:0:0.25", "top_k:0:0.5"])
    assert [describe(point) for point in points] == [
        "united/gate_mass:2:0.5:0", "united/gate_mass:2:0.5:1", "united/gate_mass:4:0.5:0", "united/gate_mass:4:0.5:1",
        "top_k:0:0.5", "reroute/0.3:0:0.25",
    ]  # fmt: skip
    assert parse_points([describe(point) for point in points]) == points
    for text, message in (("united:8", "must be MECHANISM"), ("magic:8:0", "mechanism must be one of"),
                          ("top_k/x:0:1", "option 'x' is not known"), ("united:a:0", "invalid literal"),
                          ("united:8:2", "must be between 0 and 1")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            parse_points([text])


def test_unusable_questions_are_named(tmp_path):
    path = tmp_path / "q.jsonl"
    for content, message in (('{"question": "a"}', "line 1 is not an object"), ("", "has no questions"),
                             ('{"question": "a", "choices": ["b"], "label": 1}', "label 1 is not one")):  # fmt: skip
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            measure.read_choices(path)


def test_the_front_keeps_what_no_other_point_beats():
    full = Level("united", 0, 1.0, 1.0, 0.0, 50.0, 4.0, 1.0)
    points = [(3.0, 0.8), (2.0, 0.7), (5.0, 0.6), (5.0, 0.9), (0.0, 1.1), (6.0, 0.6)]
    levels = [full] + [replace(full, way=8, loss_percent=loss, relative_step_time=time) for loss, time in points]
    assert [(x.loss_percent, x.relative_step_time) for x in front(levels, "relative_step_time")] == [
        (0.0, 1.0), (2.0, 0.7), (5.0, 0.6)
    ]  # fmt: skip


def test_the_commands_write_their_files(text_checkpoint, choices, tmp_path, capsys):
    text = tmp_path / "held_out.txt"
    text.write_text("some words to be predicted " * 10)
    common = [str(text_checkpoint), "--text", f"words={text}", "--text-window", "33", "--batch", "4"]
    assert evaluate_command([*common, "--choices", str(choices), "--settings", "united:2:0", "--json", str(tmp_path / "e.json")]) == 0  # fmt: skip
    assert [p["settings"] for p in json.loads((tmp_path / "e.json").read_text())["points"]] == [
        "united:0:1",
        "united:2:0",
    ]
    path = tmp_path / "profile.json"
    assert (
        calibrate(
            [
                *common,
                "--grid",
                "united:2,4:0,0.5",
                "--rounds",
                "1",
                "--cost",
                "slots",
                "--output",
                str(path),
                "--json",
                str(tmp_path / "all.json"),
            ]
        )
        == 0
    )
    assert len(json.loads((tmp_path / "all.json").read_text())["points"]) == 5
    profile = read_profile(path, checkpoint_fingerprint(text_checkpoint))
    assert profile.batch == 4 and profile.measure == "perplexity" and len(profile.levels) >= 2
    slots = [level.active_slots for level in profile.levels]
    assert slots == sorted(slots, reverse=True)


def test_the_commands_say_what_is_wrong(text_checkpoint, checkpoint, capsys):
    for arguments, message in (
        ([str(text_checkpoint)], "nothing to measure"),
        (
            [str(text_checkpoint), "--questions", "1", "--grid", "united:8:0"],
            "way 8 is not loaded; loaded ways are 2, 4",
        ),
        ([str(checkpoint), "--questions", "1"], "has no tokenizer"),
    ):
        assert evaluate_command(arguments) == 1
        assert message in " ".join(capsys.readouterr().out.split())
    assert torch.is_inference_mode_enabled() is False
