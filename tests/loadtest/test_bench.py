"""The benchmark computes what it says, on a tiny model; it is not timed here."""

import json

import pytest

from loadtest.bench.__main__ import main
from loadtest.bench.workload import Rates, Workload


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


def test_engine_benchmark_writes_its_figures(tmp_path, capsys):
    path = tmp_path / "bench.json"
    arguments = ["engine", "--shape", "tiny", "--requests", "3", "--prompt-tokens", "8", "--new-tokens", "4"]
    assert main([*arguments, "--runs", "2", "--dtype", "float32", "--peer", "transformers", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert len(result["runs"]) == 2 and len(result["peers"]["transformers"]["runs"]) == 2
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "output_tokens_per_s", "step_ms", "peak_memory_bytes"):
        assert result[name] > 0
    assert result["settings"]["dtype"] == "float32" and result["machine"]["cores"] >= 1
    assert "ours / transformers" in capsys.readouterr().out


@pytest.mark.parametrize("peer", [[], ["--peer", "transformers"]], ids=["alone", "beside-a-peer"])
def test_brownout_points_say_what_was_served(tmp_path, peer):
    path = tmp_path / "bench.json"
    arguments = ["engine", "--shape", "tiny", "--requests", "8", "--prompt-tokens", "8", "--new-tokens", "6", *peer]
    arguments += ["--threshold-prefill", "0", "--threshold-decode", "0", "--way", "4", "--dtype", "float32"]
    assert main([*arguments, "--runs", "1", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["active_slots_by_layer"] == [2, 2] and result["active_slots_per_layer"] == 2
    assert result["united_share"] == 1 and 1 <= result["assignments_per_token"] < 2
    assert result["settings"]["way"] == 4 and result["settings"]["mechanism"] == "united"


def test_unusable_arguments_are_usage_errors():
    with pytest.raises(SystemExit) as exit_info:
        main(["engine", "--new-tokens", "1"])
    assert exit_info.value.code == 2
