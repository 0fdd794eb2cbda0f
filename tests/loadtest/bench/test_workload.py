"""What all benchmarks share: workload, rates, budget, options, the file of figures."""

import argparse
import json
import math

import pytest

from loadtest.bench.__main__ import main
from loadtest.bench.budget import Budget, budget_seconds
from loadtest.bench.workload import Rates, Workload, write_json


def test_rates_follow_their_definitions():
    work = Workload(requests=4, prompt_tokens=100, new_tokens=11)
    rates = Rates.of(work, first_s=2.0, all_s=7.0)
    assert rates.prefill_tokens_per_s == 200
    assert rates.decode_tokens_per_s == 8
    assert rates.output_tokens_per_s == pytest.approx(44 / 7)


def test_prompts_are_the_same_for_every_engine():
    work = Workload(requests=3, prompt_tokens=5, new_tokens=2)
    assert work.prompts(1000) == work.prompts(1000)
    assert all(300 <= token < 1000 for prompt in work.prompts(1000) for token in prompt)


def test_json_is_replaced_at_once_and_has_no_infinity(tmp_path):
    path = tmp_path / "deep" / "result.json"
    write_json(path, {"error": math.inf, "rates": Rates.of(Workload(requests=1, prompt_tokens=1, new_tokens=2), 1, 2)})
    assert json.loads(path.read_text())["error"] is None
    assert [entry.name for entry in path.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    "arguments", [["engine", "--new-tokens", "1"], ["server", "--runs", "0"], ["kernels", "--budget", "soon"], ["none"]]
)
def test_unusable_arguments_are_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2 and arguments[-1] in capsys.readouterr().err


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("8m", 480), ("1.5h", 5400)])
def test_budget_is_a_time(text, seconds):
    assert budget_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-1s", "0", "nan", "inf"])
def test_budget_that_is_no_time_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="8m"):
        budget_seconds(text)


def test_budget_is_spent_when_its_time_is_over():
    now = [100.0]
    budget = Budget(5.0, clock=lambda: now[0])
    assert not budget.spent and budget.left_s == 5.0
    now[0] = 105.0
    assert budget.spent
    assert not Budget(None, clock=lambda: now[0]).spent
