"""The planning benchmark reports what its plans are like; how long they take is the benchmark's matter."""

from backend.elastic.planning_bench import main, measure


def test_plans_are_balanced_and_keep_what_is_warm(capsys):
    result = measure(experts=24, devices=4, plans=20)
    assert 0 < result["plan_ms_p50"] <= result["plan_ms_p99"]
    assert 1 <= result["mean_imbalance"] < 1.2 and 0 < result["mean_moves"] < 12
    assert main(["--experts", "8", "--devices", "2", "--plans", "2"]) == 0
    assert "8 experts on 2 devices" in " ".join(capsys.readouterr().out.split())
