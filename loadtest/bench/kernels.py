"""Each kernel against its reference, then its time against the least that this machine allows."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import msgspec
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from backend.engine.model_runner import resolve_device
from backend.kernels import kernels_for
from backend.models.dummy import PREFIX, SHAPES, raw_config
from backend.models.registry import parse_config
from loadtest.bench import options
from loadtest.bench.budget import Budget
from loadtest.bench.floors import Floors, cache_bytes, dtype_name, measure_floors
from loadtest.bench.interpreter import interpreting
from loadtest.bench.kernel_cases import Case, Sizes, cases, implementation_of
from loadtest.bench.kernel_compare import TOLERANCES, compare
from loadtest.bench.timing import median_s
from loadtest.bench.workload import machine, write_json

HELP = "each kernel: correctness, then time against the floor"
#: Copies of a kernel's operands that are used in turn hold at least this many times the last cache …
_CACHES = 2
#: … but no more memory and no more copies than this.
_COPIES_BYTES, _MOST_COPIES = 2**30, 16


class KernelResult(msgspec.Struct, kw_only=True):
    """One case. `share_of_floor` is floor / time: 1 is as fast as the machine allows, above 1 it was in the caches."""

    shape: str
    dtype: str
    kernel: str
    case: str
    #: Worst relative error against the reference; infinite, in JSON null, if whole numbers differ or a number is not finite.
    error: float
    tolerance: float
    correct: bool
    #: What the kernel raised.
    failure: str | None = None
    time_us: float | None = None
    bytes: int | None = None
    flops: int | None = None
    floor_us: float | None = None
    bound: str | None = None
    share_of_floor: float | None = None


class KernelReport(msgspec.Struct, kw_only=True):
    """All cases of a run, with the rates that their floors come from."""

    device: str
    floors: dict[str, Floors]
    cases: list[KernelResult]
    machine: dict[str, object]
    #: Whether everything was measured; false if the budget ended before.
    complete: bool = False

    @property
    def correct(self) -> bool:
        return all(result.correct for result in self.cases)


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_place(parser)
    parser.add_argument(
        "--shape",
        action="append",
        choices=sorted(SHAPES),
        help="sizes of this model; may be repeated (default: cpu-m and cpu-s, on a GPU qwen1.5-moe-a2.7b)",
    )
    options.add_runs(parser, 5)
    options.add_budget(parser)
    options.add_output(parser)


def main(args: argparse.Namespace, console: Console) -> int:
    device = resolve_device(args.device)
    shapes = args.shape or (["cpu-m", "cpu-s"] if device.type == "cpu" else ["qwen1.5-moe-a2.7b"])
    with console.status("measuring") as status:
        for report in measure(
            kernels_for(device), device, dtype_of(args.dtype, device), shapes, args.runs, Budget(args.budget)
        ):
            timed = sum(result.time_us is not None for result in report.cases)
            status.update(f"{len(report.cases)} cases compared, {timed} timed")
            if args.json:
                write_json(args.json, report)
    show(report, console, args.json)
    return 0 if report.correct else 1


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """As for a dummy checkpoint: float32 on a CPU and bfloat16 elsewhere, unless named."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


def measure(
    kernels: ModuleType | SimpleNamespace,
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[str],
    runs: int,
    budget: Budget,
    sizes: Sizes | None = None,
    floors: Floors | None = None,
) -> Iterator[KernelReport]:
    """The machine's rates, then all cases compared, then those timed that are right; yields the growing report."""
    name = dtype_name(dtype)
    report = KernelReport(device=str(device), floors={}, cases=[], machine=machine())
    compared: list[tuple[Case, KernelResult]] = []
    yield report
    if budget.spent:
        return
    # First, because the engine's steps are held against them too.
    report.floors[name] = limits = floors or measure_floors(device, dtype)
    for shape in shapes:
        config = parse_config(raw_config(PREFIX + shape))
        for case in cases(config, dtype, device, sizes or Sizes.for_device(device)):
            if budget.spent:
                return
            result = _compared(case, kernels, device, shape, name)
            report.cases.append(result)
            compared.append((case, result))
            yield report
    for case, result in compared:
        if budget.spent:
            return
        if result.correct:
            _time(case, kernels, device, runs, limits, result)
            yield report
    report.complete = True
    yield report


def _compared(
    case: Case, kernels: ModuleType | SimpleNamespace, device: torch.device, shape: str, dtype: str
) -> KernelResult:
    failure = None
    try:
        error = compare(case, kernels, _generator(device))
    except Exception as raised:  # whatever a kernel raises, the others are to be measured
        error, failure = math.inf, f"{type(raised).__name__}: {raised}"
    return KernelResult(
        shape=shape,
        dtype=dtype,
        kernel=case.kernel,
        case=case.label,
        error=error,
        tolerance=TOLERANCES[dtype],
        correct=error <= TOLERANCES[dtype],
        failure=failure,
    )


def _time(
    case: Case, kernels: ModuleType | SimpleNamespace, device: torch.device, runs: int, floors: Floors, to: KernelResult
) -> None:
    generator = _generator(device)
    args = case.make(generator)
    cost = case.cost(args)
    function = implementation_of(case, kernels)
    copies = 1
    if case.streams and not interpreting():  # interpreted kernels are far from any limit
        copies = min(_MOST_COPIES, _COPIES_BYTES // cost.bytes, math.ceil(_CACHES * cache_bytes(device) / cost.bytes))
    operands = [args, *(case.make(generator) for _ in range(copies - 1))]
    with torch.inference_mode():
        seconds = median_s([lambda a=a: function(*a) for a in operands], device, runs, case.captures)
    floor = floors.seconds(cost, to.dtype)
    to.time_us, to.bytes, to.flops = seconds * 1e6, cost.bytes, cost.flops
    to.floor_us, to.bound, to.share_of_floor = floor * 1e6, floors.bound(cost, to.dtype), floor / seconds


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def show(report: KernelReport, console: Console, path: Path | None) -> None:
    """Rates, the table, and what failed."""
    for dtype, floors in report.floors.items():
        rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in floors.matmul_flops_per_s.items())
        console.print(
            f"{report.device}: copy {floors.copy_bytes_per_s / 1e9:.1f} GB/s, read {floors.read_bytes_per_s / 1e9:.1f} GB/s, "
            f"matrix products {rates} (weights {dtype})"
        )
    console.print(table(report))
    wrong = [result for result in report.cases if not result.correct]
    for result in wrong:
        reason = result.failure or f"relative error {result.error:.1e} is above {result.tolerance:.0e}"
        console.print(f"{result.shape} {result.kernel}, {result.case}: {reason}", style="red", markup=False)
    if not report.complete:
        console.print("[yellow]The budget ended before everything was measured.[/yellow]")
    if path:
        console.print(f"Wrote {path}.")


def table(report: KernelReport) -> Table:
    made = Table(
        title="Kernels; floor: the larger of bytes / bandwidth (m) and FLOPs / matrix product rate (c)",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for name in ("kernel", "case"):
        made.add_column(name, no_wrap=True)
    for name in ("error", "µs", "floor µs", "share"):
        made.add_column(name, justify="right", no_wrap=True)
    shape = None
    for result in report.cases:
        if result.shape != shape:
            shape = result.shape
            made.add_section()
            made.add_row(f"[bold]{shape}[/bold]", f"[bold]{result.dtype}[/bold]")
        timed = ("", "", "")
        if result.time_us is not None and result.floor_us is not None and result.share_of_floor is not None:
            floor = f"{_microseconds(result.floor_us)} {str(result.bound)[0]}"
            timed = (_microseconds(result.time_us), floor, f"{result.share_of_floor:.0%}")
        error = f"{result.error:.0e}" if result.correct else f"[red]{result.error:.0e} WRONG[/red]"
        made.add_row(result.kernel.removesuffix("_forward"), result.case, error, *timed)
    return made


def _microseconds(number: float) -> str:
    return f"{number:.1f}" if number < 100 else f"{number:.0f}"
