"""The engine benchmark computes what it says, on a tiny model; it is not timed here."""

import contextlib
import json
from pathlib import Path

import pytest

from backend.brownout.settings import Settings
from backend.brownout.united_file import read_united
from backend.config import EngineConfig
from backend.engine.model_runner import ModelRunner
from backend.errors import ConfigError
from loadtest.bench import engine
from loadtest.bench.__main__ import main
from loadtest.bench.our_engine import OurEngine
from loadtest.bench.workload import Workload

TINY = ["engine", "--shape", "tiny", "--requests", "3", "--prompt-tokens", "8", "--new-tokens", "4"]


def test_figures_are_written_with_a_peer_in_turn(tmp_path, capsys):
    path = tmp_path / "bench.json"
    arguments = [*TINY, "--runs", "2", "--dtype", "float32", "--peer", "transformers", "--json", str(path)]
    assert main(arguments) == 0
    result = json.loads(path.read_text())
    peer = result["peers"]["transformers"]
    assert len(result["runs"]) == 2 and len(peer["runs"]) == 2 and peer["tokens_equal"] == 1.0
    # The decode rate is a difference of times: of so few tokens it may have any sign.
    assert result["step_ms"] == pytest.approx(3e3 / result["decode_tokens_per_s"])
    for name in ("prefill_tokens_per_s", "output_tokens_per_s", "peak_memory_bytes"):
        assert result[name] > 0
    assert result["settings"]["dtype"] == "float32" and result["machine"]["cores"] >= 1
    assert peer["ratio"]["decode_tokens_per_s"] == pytest.approx(
        result["decode_tokens_per_s"] / peer["median"]["decode_tokens_per_s"]
    )
    assert "ours / transformers" in capsys.readouterr().out


def test_profile_memory_and_growth(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert main([*TINY, "--runs", "1", "--profile", "--steps", "20", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    for kind in ("prefill", "decode"):
        step = result["profile"][kind]
        assert 0.5 * step["step_s"] < sum(step["parts"].values()) <= step["step_s"]
        assert {"route", "remap", "grouped experts", "shared expert", "attention", "lm head", "sampling"} <= set(
            step["parts"]
        )
    assert result["profile"]["prefill"]["tokens"] == 24 and result["profile"]["decode"]["tokens"] == 3
    memory, growth = result["memory"], result["memory_growth"]
    held = memory["weight_bytes"] + memory["united_bytes"] + memory["kv_pool_bytes"]
    assert memory["peak_bytes"] == memory["before_bytes"] + held + memory["other_bytes"]
    assert memory["ratio"] == pytest.approx((memory["peak_bytes"] - memory["before_bytes"]) / held)
    assert growth["steps"] == 20
    assert growth["growth_bytes"] == growth["rss_end_bytes"] - growth["rss_after_warm_up_bytes"]
    assert "grouped experts" in capsys.readouterr().out


def test_nothing_of_the_profile_stays_in_the_engine():
    ours = OurEngine(EngineConfig(checkpoint="dummy:tiny", max_model_len=12))
    work = Workload(requests=2, prompt_tokens=8, new_tokens=4)
    kernels = ours.engine.runner.model.kernels
    before = {name: getattr(kernels, name) for name in kernels.__all__}
    plain = ours.run(work.prompts(512), 4).tokens
    ours.profile(work.prompts(512), 4)
    assert {name: getattr(kernels, name) for name in kernels.__all__} == before
    assert not {"step", "_book"} & set(vars(ours.engine))
    assert ours.run(work.prompts(512), 4).tokens == plain and not ours.engine.has_work


def test_refused_settings_are_reported_and_the_rest_is_measured(monkeypatch):
    apply = ModelRunner.apply

    def refuse_way_8(self, settings):
        if settings.way == 8:
            raise ConfigError("no united experts of way 8 are loaded")
        apply(self, settings)

    monkeypatch.setattr(ModelRunner, "apply", refuse_way_8)
    result = engine.run(
        checkpoint="dummy:tiny",
        work=Workload(requests=2, prompt_tokens=4, new_tokens=3),
        settings=Settings(),
        device="cpu",
        dtype="auto",
        runs=1,
        points={"half": Settings(threshold_decode=0.5), "8-way": Settings(way=8)},
    )
    assert result["points"]["8-way"] == {"error": "no united experts of way 8 are loaded"}
    assert result["points"]["half"]["settings"]["threshold_decode"] == 0.5
    assert len(result["points"]["half"]["runs"]) == len(result["runs"]) == 1


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


def test_widened_experts_and_further_points_are_measured_in_one_run(tmp_path, monkeypatch, capsys):
    configs = []
    monkeypatch.setattr(engine, "OurEngine", lambda config: configs.append(config) or OurEngine(config))
    path = tmp_path / "bench.json"
    arguments = [*TINY, "--widen", "3", "--beside", "united:4:0,0.5", "--runs", "1", "--json", str(path)]
    assert main(arguments) == 0
    result = json.loads(path.read_text())
    assert [config.widen_experts for config in configs] == [3] and result["settings"]["widen_experts"] == 3
    points = result["points"]
    assert set(points) == {"united:4:0", "united:4:0.5"} and points["united:4:0"]["united_share"] == 1
    for point in points.values():
        assert point["ratio"]["output_tokens_per_s"] == pytest.approx(
            point["median"]["output_tokens_per_s"] / result["output_tokens_per_s"]
        )
    assert "united:4:0.5 / ours" in capsys.readouterr().out


def test_peers_find_no_united_experts_among_the_weights():
    """vLLM refuses a folder with weights that it does not know."""
    with contextlib.ExitStack() as stack:
        folder, united = engine._export("dummy:tiny", "2,4", "float32", stack)
        assert [path.name for path in Path(folder).rglob("*.safetensors")] == ["model.safetensors"]
        assert [read_united(Path(path)).way for path in united.split(",")] == [2, 4]
    assert not Path(folder).exists()


def test_peers_are_not_compared_with_widened_experts(capsys):
    assert main([*TINY, "--widen", "2", "--peer", "transformers"]) == 1
    assert "without --widen" in capsys.readouterr().out
