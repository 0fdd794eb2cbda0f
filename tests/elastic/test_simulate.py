"""The command: its file, its determinism, its complaints."""

import json
import sys

import pytest

from backend.elastic.experiment import ABLATIONS, POLICIES, WINDOWED, front
from backend.elastic.simulate import main

SMALL = "--shape tiny --seconds 0.1 --rate 40 --input-tokens 20 --output-tokens 4 --devices 2 --pool-layers 2 --drift 0"


def test_the_file_has_every_policy_with_its_figures(tmp_path, capsys):
    first, second = tmp_path / "a.json", tmp_path / "sub" / "b.json"
    assert main([*SMALL.split(), "--json", str(first)]) == 0
    assert main([*SMALL.split(), "--json", str(second)]) == 0
    assert first.read_text() == second.read_text()
    result = json.loads(first.read_text())
    assert set(result["policies"]) == set(POLICIES) and set(result["ablations"]) == set(ABLATIONS)
    for row in result["policies"].values():
        for key in ("layer_ms_p50", "layer_ms_p99", "e2e_ms_p50", "cost_gb_s"):
            assert row[key] > 0
        assert row["quality_loss_percent"] >= 0
    assert {name for name, row in result["policies"].items() if "functions" in row} == {"moeless", "moeless_brownout"}
    functions = result["policies"]["moeless"]["functions"]
    assert functions["loads"] == sum(functions[key] for key in ("warm", "loading", "evictions", "expiries"))
    assert result["cost_model"]["assumed"] is True and result["cost_model"]["kernels"] is None
    text = capsys.readouterr().out
    assert "Expert functions" in text
    assert "assumed constants" in text and str(first) in text.replace("\n", "")


def test_experts_cost_what_measured_kernels_say(tmp_path, capsys):
    kernels, path = tmp_path / "k.json", tmp_path / "r.json"
    # 40 µs, and the longer of 2 µs a kB and 1 µs a MFLOP.
    sizes = {"1 token": (10e3, 1e6), "8 tokens": (80e3, 8e6), "few slots": (5e3, 90e6), "512 tokens": (90e3, 900e6)}
    cases = [
        {"kernel": "grouped_experts_forward", "shape": "tiny", "dtype": "float32", "case": label}
        | {"bytes": size, "flops": flops, "time_us": 40 + max(2e-3 * size, 1e-6 * flops)}
        for label, (size, flops) in sizes.items()
    ]
    kernels.write_text(json.dumps({"device": "cpu", "machine": {"processor": "by hand"}, "cases": cases}))
    options = ["--no-ablations", "--policies", "static", "--hardware", "cpu", "--json", str(path)]
    assert main([*SMALL.split(), *options, "--kernels", str(kernels), "--constant", "exchange_s=1e-5"]) == 0
    model = json.loads(path.read_text())["cost_model"]
    fitted = {"experts_s": 40e-6, "memory_bandwidth": 5e8, "matmul_rate": 1e12}
    assert {key: model[key] for key in fitted} == pytest.approx(fitted)
    assert model["assumed"] is False and model["exchange_s"] == 1e-5 and model["given"] == ["exchange_s"]
    text = " ".join(capsys.readouterr().out.split())
    assert "40 µs, 2e+03 µs a MB" in text and "k.json: 4 cases of tiny" in text and "experts fitted as below" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is no report of loadtest.bench kernels"),
        ('{"cases": []}', "has no times of grouped_experts_forward for tiny"),
        (
            '{"cases": [{"kernel": "grouped_experts_forward", "shape": "tiny", "dtype": "float32", "case": "1 token", '
            '"bytes": 1, "flops": 1, "time_us": 1}]}',
            "has 1 times of grouped_experts_forward for tiny, at least 4 are needed",
        ),
    ],
)
def test_a_kernel_report_without_what_is_needed_is_named(content, message, tmp_path, capsys):
    path = tmp_path / "k.json"
    path.write_text(content)
    assert main([*SMALL.split(), "--kernels", str(path)]) == 1
    assert message in " ".join(capsys.readouterr().out.split())


def test_the_sensitivity_varies_every_constant(tmp_path):
    path = tmp_path / "s.json"
    assert (
        main([*SMALL.split(), "--no-ablations", "--sensitivity", "--policies", "static,moeless", "--json", str(path)])
        == 0
    )
    rows = json.loads(path.read_text())["sensitivity"]
    assert {"none", "memory_bandwidth", "host_bandwidth", "keep_alive_s"} <= {row["constant"] for row in rows}
    assert all(set(row["policies"]) == {"static", "moeless"} for row in rows)


def test_windows_are_compared_with_both_baselines_and_ablations_with_the_whole(tmp_path, capsys):
    path = tmp_path / "w.json"
    options = "--windows 3 --policies static".split()
    assert main([*SMALL.split(), *options, "--json", str(path)]) == 0
    windows = json.loads(path.read_text())["windows"]
    assert set(windows["static"]) == set(windows["eplb"]) == set(WINDOWED) and set(windows["moeless"]) == set(ABLATIONS)
    assert windows["eplb"]["eplb"]["layer_ms_p99"] == [0.0, 0.0, 0.0]
    least, median, most = windows["static"]["moeless"]["layer_ms_p99"]
    assert least <= median <= most and "over 3 windows" in capsys.readouterr().out


def test_the_front_has_no_policy_that_another_beats_in_everything():
    def row(latency, cost, loss):
        return {"layer_ms_p99": latency, "cost_gb_s": cost, "quality_loss_percent": loss}

    rows = {
        "static": row(3.0, 5.0, 0.0),
        "eplb": row(2.0, 6.0, 0.0),
        "moeless": row(2.0, 5.0, 0.0),
        "moeless_brownout": row(2.5, 3.0, 1.0),
        "oracle": row(1.0, 1.0, 0.0),
    }
    assert front(rows, "layer_ms_p99") == ["moeless", "moeless_brownout"]


def test_without_matplotlib_the_requirement_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = [*SMALL.split(), "--no-ablations", "--policies", "static", "--picture", str(tmp_path / "p.png")]
    assert main(arguments) == 0
    assert "pip install matplotlib" in capsys.readouterr().out and not (tmp_path / "p.png").exists()


def test_with_matplotlib_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    assert main([*SMALL.split(), "--policies", "static,moeless", "--picture", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slots", "1"], "do not hold 8 experts"),
        (["--constant", "warp=9"], "unknown name 'warp'"),
        (["--constant", "exchange_s"], "NAME=VALUE"),
        (["--constant", "matmul_rate=0"], "matmul_rate must be positive"),
        (["--trace", "absent.csv"], "cannot be read"),
        (["--profile", "absent.json"], "absent.json"),
    ],
)
def test_unusable_input_ends_with_its_reason(arguments, message, capsys):
    assert main([*SMALL.split(), *arguments]) == 1
    assert message in " ".join(capsys.readouterr().out.split())


def test_wrong_usage_is_told_apart(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--policies", "static,magic"])
    assert "unknown policy 'magic'" in capsys.readouterr().err
