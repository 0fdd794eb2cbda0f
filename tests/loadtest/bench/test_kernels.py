"""The kernel benchmark counts right, finds a wrong kernel, and keeps its budget; nothing is timed here."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from backend.kernels import cpu
from loadtest.bench import kernel_costs, kernels
from loadtest.bench.__main__ import main
from loadtest.bench.budget import Budget
from loadtest.bench.floors import Cost, Floors, measure_floors
from loadtest.bench.kernel_cases import Sizes
from loadtest.bench.kernel_compare import error

CPU = torch.device("cpu")
SMALL = Sizes(decode_rows=(1, 3), prefill_rows=(20,), contexts=((2, 19),))
FLOORS = Floors(copy_bytes_per_s=10e9, read_bytes_per_s=20e9, matmul_flops_per_s={"float32": 100e9, "bfloat16": 200e9})


def implementation(**changed) -> SimpleNamespace:
    return SimpleNamespace(**{**{name: getattr(cpu, name) for name in cpu.__all__}, **changed})


def run(kernels_used=cpu, budget=None, dtype=torch.float32, runs=1) -> kernels.KernelReport:
    reports = kernels.measure(kernels_used, CPU, dtype, ["tiny"], runs, budget or Budget(), SMALL, FLOORS)
    return list(reports)[-1]


def test_costs_of_a_hand_computed_case():
    # Two of three slots serve three assignments; one assignment is skipped. M = 4, I = 2, bfloat16 weights.
    w13, w2 = torch.zeros(3, 4, 4, dtype=torch.bfloat16), torch.zeros(3, 4, 2, dtype=torch.bfloat16)
    slots = torch.tensor([[0, 2], [2, -1]])
    cost = kernel_costs.grouped_experts_forward(torch.zeros(2, 4), w13, w2, slots, torch.zeros(2, 2))
    weights = 2 * (4 * 4 + 4 * 2) * 2  # two slots, two bytes a number
    assert cost == Cost(weights + 2 * (2 * 4 * 4) + 4 * 8 + 4 * 4, flops=3 * 2 * (4 * 4 + 4 * 2))

    # Contexts 5 and 9 through a window of 6: 5 + 6 tokens of 2 heads of 8 numbers, keys and values, 4 query heads.
    q, cache, tables = torch.zeros(2, 4, 8), torch.zeros(4, 4, 2, 8), torch.zeros(2, 3, dtype=torch.int32)
    lens = torch.tensor([5, 9], dtype=torch.int32)
    cost = kernel_costs.decode_attention(q, cache, cache, tables, lens, 1.0, 6)
    assert cost == Cost(11 * 2 * 16 * 4 + 2 * (2 * 4 * 8 * 4) + 6 * 4 + 2 * 4, flops=4 * 11 * 4 * 8)

    # Two new queries of a context of 5: they see 4 and 5 tokens.
    cost = kernel_costs.prefill_attention(q, cache, cache, tables[:1], [2], [5], 1.0, None)
    assert cost == Cost(5 * 2 * 16 * 4 + 2 * (2 * 4 * 8 * 4) + 3 * 4, flops=4 * 9 * 4 * 8)
    # With a window of 2 they see positions 2, 3 and 3, 4.
    assert kernel_costs.prefill_attention(q, cache, cache, tables[:1], [2], [5], 1.0, 2).flops == 4 * 4 * 4 * 8

    cost = kernel_costs.linear(torch.zeros(3, 8), torch.zeros(5, 8, dtype=torch.bfloat16))
    assert cost == Cost(5 * 8 * 2 + 3 * 8 * 4 + 3 * 5 * 4, flops=2 * 3 * 5 * 8)


def test_floor_is_the_slower_of_memory_and_arithmetic():
    assert FLOORS.seconds(Cost(bytes=20_000, flops=1), "float32") == pytest.approx(1e-6)
    assert FLOORS.bound(Cost(bytes=20_000, flops=1), "float32") == "memory"
    assert FLOORS.seconds(Cost(bytes=1, flops=400_000), "bfloat16") == pytest.approx(2e-6)
    assert FLOORS.bound(Cost(bytes=1, flops=400_000), "bfloat16") == "compute"


def test_rates_of_the_machine_are_measured():
    floors = measure_floors(CPU, torch.bfloat16, runs=1, scale=1e-4)
    assert floors.copy_bytes_per_s > 0 and floors.read_bytes_per_s > 0
    assert set(floors.matmul_flops_per_s) == {"float32", "bfloat16"} and min(floors.matmul_flops_per_s.values()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_is_compared_and_measured(dtype):
    report = run(dtype=dtype)
    assert report.correct and report.complete
    assert {case.kernel for case in report.cases} == {*cpu.__all__, "sample"}
    for case in report.cases:
        assert case.error <= case.tolerance and case.bytes > 0 and case.time_us > 0
        assert case.share_of_floor == pytest.approx(case.floor_us / case.time_us)


def off_by_a_row(x, weight, bias=None):
    out = cpu.linear(x, weight, bias)
    out[-1] = out[0] + 0.1
    return out


def no_such_kernel(*_):
    raise RuntimeError("it cannot be compiled")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("linear", off_by_a_row),
        ("grouped_experts_forward", lambda hidden, *_: torch.full_like(hidden, math.nan)),
        ("remap_experts", lambda experts, weights, *_: (experts.flip(1), weights)),
        ("route", lambda hidden, weight, bias, k, norm: [a.flip(1) for a in cpu.route(hidden, weight, bias, k, norm)]),
        ("store_kv", lambda *_: None),
        ("apply_rope", no_such_kernel),
    ],
)
def test_wrong_kernel_is_named_and_the_others_are_measured(name, wrong, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels, "kernels_for", lambda _: implementation(**{name: wrong}))
    monkeypatch.setattr(kernels, "measure_floors", lambda *_: FLOORS)
    monkeypatch.setattr(Sizes, "for_device", lambda _: SMALL)
    path = tmp_path / "kernels.json"
    assert main(["kernels", "--shape", "tiny", "--device", "cpu", "--runs", "1", "--json", str(path)]) == 1
    cases = json.loads(path.read_text())["cases"]
    assert {case["kernel"] for case in cases if not case["correct"]} == {name}
    assert all((case["time_us"] is not None) == case["correct"] for case in cases)
    assert f"tiny {name}" in capsys.readouterr().out
    if wrong is no_such_kernel:
        assert any("it cannot be compiled" in (case["failure"] or "") for case in cases)


def test_spent_budget_stops_before_the_next_case_and_keeps_what_there_is():
    now = [0.0]
    budget = Budget(10.0, clock=lambda: now[0])
    reports = kernels.measure(cpu, CPU, torch.float32, ["tiny"], 1, budget, SMALL, FLOORS)
    report = next(reports)
    for _ in reports:
        now[0] += 1.0
    assert len(report.cases) == 10 and not report.complete
    assert all(case.correct and case.time_us is None for case in report.cases)


def test_error_is_that_of_the_worst_row():
    expected = torch.ones(100, 4)
    actual = expected.clone()
    actual[7] = 1.5
    assert error(actual, expected) == pytest.approx(0.5)
    assert error(expected[:50], expected) == math.inf
    assert error(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf
