"""All benchmarks in one run: what fails or finds no time is entered with its reason, and the rest goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from backend.errors import ConfigError
from loadtest.bench import engine, everything, kernels, scheduler, server
from loadtest.bench.__main__ import main
from loadtest.bench.budget import Budget
from loadtest.bench.workload import Workload, write_json

RATES = {"prefill_tokens_per_s": 2.0, "decode_tokens_per_s": 1.0, "output_tokens_per_s": 1.0}


@pytest.fixture
def quick_parts(monkeypatch):
    """Parts that take no time; the server cannot be started."""

    def report(cls, **fields):
        return iter([cls(machine={}, **fields)])

    def no_server(**_):
        raise RuntimeError("no Triton server here")

    monkeypatch.setattr(
        kernels, "measure", lambda *_: report(kernels.KernelReport, device="cpu", floors={}, cases=[], complete=True)
    )
    monkeypatch.setattr(
        scheduler,
        "measure",
        lambda **_: report(scheduler.SchedulerReport, running=1, waiting=1, prompt_tokens=1, vocab=1),
    )
    slots = {"active_slots_per_layer": 1.0, "united_share": 0.0}
    point = {**slots, "ratio": {"prefill_tokens_per_s": 1.0, "decode_tokens_per_s": 1.5, "output_tokens_per_s": 1.4}}
    measured = {
        **RATES,
        **slots,
        "points": {"8-way": {"error": "not loaded"}, "4-way": {**point, "median": RatesLike()}},
    }
    monkeypatch.setattr(engine, "run", lambda *, write, **_: (write(measured), measured)[1])
    monkeypatch.setattr(server, "run", no_server)


class RatesLike(dict):
    """Rates as the tables read them."""

    prefill_tokens_per_s = decode_tokens_per_s = output_tokens_per_s = 3.0


def run(path, budget) -> dict:
    return everything.AllBenchmarks(
        shape="tiny",
        work=Workload(requests=1, prompt_tokens=1, new_tokens=2),
        device=torch.device("cpu"),
        dtype="auto",
        runs=1,
        peers=[],
        budget=budget,
        write=lambda partial: write_json(path, partial),
        console=Console(quiet=True),
    ).run()


def test_a_part_that_fails_does_not_stop_the_others(quick_parts, tmp_path):
    result = run(tmp_path / "all.json", Budget())
    written = json.loads((tmp_path / "all.json").read_text())
    assert not result["ok"] and written["server"] == {"error": "RuntimeError: no Triton server here"}
    assert written["kernels"]["complete"] and written["engine"]["decode_tokens_per_s"] == 1.0
    console = Console(record=True, width=200)
    console.print(everything.summary(result))
    text = console.export_text()
    assert "no Triton server here" in text and "8-way: not loaded" in text and "1.50" in text


def test_a_machine_without_a_server_is_no_failure(quick_parts, monkeypatch, tmp_path):
    def none_here(**_):
        raise ConfigError("no Triton server is installed")

    monkeypatch.setattr(server, "run", none_here)
    result = run(tmp_path / "all.json", Budget())
    assert result["ok"] and "no Triton server is installed" in result["server"]["skipped"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
def test_everything_runs_to_its_end_on_interpreted_gpu_kernels(monkeypatch, tmp_path):
    """What is done on a GPU, at sizes and with times that say nothing."""
    pytest.importorskip("triton")
    from backend.kernels import gpu

    used = []
    grouped = gpu.grouped_experts_forward
    monkeypatch.setattr(gpu, "grouped_experts_forward", lambda *args: (used.append(1), grouped(*args))[1])
    monkeypatch.setattr(server, "run", lambda **_: {"server_tokens_per_s": 5.0})
    monkeypatch.setattr(
        scheduler,
        "measure",
        lambda **_: iter([scheduler.SchedulerReport(running=1, waiting=1, prompt_tokens=1, vocab=1, machine={})]),
    )
    path = tmp_path / "all.json"
    assert main(["all", "--device", "interpreter", "--runs", "1", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert used and written["ok"] and written["kernels"]["complete"]
    for name in ("engine", "engine, skewed routing"):
        assert written[name]["decode_step_over_floor"] > 0 and written[name]["decode_kernels"]
        assert len(written[name]["points"]) == 4 and all("ratio" in p for p in written[name]["points"].values())


def test_parts_without_time_are_skipped(quick_parts, tmp_path):
    now = iter([0.0, *[1.0] * 2, *[99.0] * 50])
    result = run(tmp_path / "all.json", Budget(10.0, clock=lambda: next(now)))
    assert isinstance(result["kernels"], kernels.KernelReport)
    assert result["server"] == {"skipped": "the budget was spent"}


def test_benchmarks_are_there_where_no_client_or_server_is_installed():
    """A machine lent for measuring on its GPU has little more than torch."""
    absent = "import sys; sys.modules.update(dict.fromkeys(('tritonclient', 'grpc', 'zmq', 'locust', 'gevent')))"
    code = f"{absent}; from loadtest.bench.__main__ import parser; parser().parse_args(['all'])"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
