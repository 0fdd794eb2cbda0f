"""The host path's benchmark does real steps and says what each part costs."""

import json

import pytest

from loadtest.bench import scheduler
from loadtest.bench.__main__ import main
from loadtest.bench.budget import Budget


def test_all_parts_are_reported(tmp_path, capsys):
    path = tmp_path / "scheduler.json"
    arguments = ["--running", "3", "--waiting", "40", "--prompt-tokens", "6", "--steps", "5", "--vocab", "300"]
    assert main(["scheduler", *arguments, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    for name in ("steady", "turnover"):
        cost = result[name]
        parts = cost["parts_us"]
        assert cost["steps"] == 5 and min(parts.values()) > 0
        assert cost["scheduler_and_batch_us"] == pytest.approx(
            parts["scheduling"] + parts["booking"] + parts["batch building"]
        )
        assert cost["share_of_step"] == pytest.approx(cost["scheduler_and_batch_us"] / 6000)
    assert set(result["sampling_us"]) == {"greedy", "temperature", "top_p"} and result["detokenizing_us"] > 0
    telemetry = result["telemetry"]
    assert telemetry["per_step_us"] == pytest.approx(telemetry["step_us"] + telemetry["write_us"] * 6 / 20)
    assert telemetry["share_of_step"] == pytest.approx(telemetry["per_step_us"] / 6000)
    assert "steady: scheduler and batch" in capsys.readouterr().out


def test_too_few_waiting_requests_are_an_error():
    with pytest.raises(ValueError, match="too few"):
        scheduler.host_cost(4, 1, 2, 30, turnover=True)


def test_spent_budget_leaves_the_rest_out():
    reports = scheduler.measure(
        running=2, waiting=9, prompt_tokens=4, steps=2, vocab=300, budget=Budget(1.0, clock=iter([0.0, 2.0]).__next__)
    )
    report = list(reports)[-1]
    assert report.steady is None and not report.complete
