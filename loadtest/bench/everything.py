"""All benchmarks in one run: correctness first, then kernels, engine with and without brownout, server, and host path.

`--device interpreter` runs the GPU kernels in Triton's interpreter, to see without a GPU that all of it works.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from backend.brownout.settings import Settings
from backend.errors import ConfigError
from backend.kernels import kernels_for
from backend.models.dummy import SHAPES
from loadtest.bench import engine, kernels, options, scheduler, server
from loadtest.bench.budget import Budget
from loadtest.bench.engine_tables import show
from loadtest.bench.interpreter import INTERPRETER, kernels_on
from loadtest.bench.rounds import not_measured
from loadtest.bench.workload import Workload, machine, write_json

HELP = "all of them, correctness first"
#: Engine points beside no brownout: way and threshold of both phases.
BROWNOUT_POINTS = ((2, 0.0), (4, 0.2), (8, 0.4), (8, 0.0))
#: Share of what is left of the budget that each part may take, in order; what it leaves goes to the later ones.
_SHARES = {"kernels": 0.3, "engine": 0.6, "engine, skewed routing": 0.6, "server": 0.7, "scheduler": 1.0}
SKEWED = "zipf:1"
#: What the targets of a GPU are for, and what an interpreter gets through.
_GPU_WORK = Workload(requests=64, prompt_tokens=448, new_tokens=128)
_INTERPRETED_WORK = Workload(requests=2, prompt_tokens=6, new_tokens=4)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), help="default: cpu-m, on a GPU qwen1.5-moe-a2.7b, interpreted tiny"
    )
    options.add_workload(parser)
    options.add_place(parser)
    engine.add_peer(parser)
    options.add_runs(parser, 3)
    options.add_budget(parser)
    options.add_output(parser)
    parser.set_defaults(json=Path("results/bench/bench.json"))


def main(args: argparse.Namespace, console: Console) -> int:
    with kernels_on(args.device) as device:
        kind = INTERPRETER if args.device == INTERPRETER else device.type
        shapes = {"cpu": "cpu-m", INTERPRETER: "tiny"}
        result = run(
            shape=args.shape or shapes.get(kind, "qwen1.5-moe-a2.7b"),
            work=_work(args, kind),
            device=device,
            dtype=args.dtype,
            runs=args.runs,
            peers=args.peer,
            skewed=kind != "cpu",
            budget=Budget(args.budget),
            write=lambda partial: write_json(args.json, partial),
            console=console,
        )
    console.print(summary(result))
    console.print(f"Wrote {args.json}.")
    return 0 if result["ok"] else 1


def _work(args: argparse.Namespace, kind: str) -> Workload:
    """As asked for; where nothing is, what suits the device."""
    given = options.workload_of(args)
    default = {"cpu": given, INTERPRETER: _INTERPRETED_WORK}.get(kind, _GPU_WORK)
    return default if given == options.DEFAULT_WORK else given


def run(
    *,
    shape: str,
    work: Workload,
    device: torch.device,
    dtype: str,
    runs: int,
    peers: list,
    skewed: bool = False,
    budget: Budget,
    write: Callable[[dict], None],
    console: Console,
) -> dict:
    """Run the parts in turn; one that fails or finds the budget spent is entered with the reason, and the next one begins.

    With `skewed` the engine is also measured with skewed routing, without peers. `write` is called with the result whenever
    it has grown. `ok`: nothing failed and every kernel is right.
    """
    result: dict = {"shape": shape, "workload": work, "machine": machine(), "ok": True}
    checkpoint = f"dummy:{shape}"

    def part(name: str, measure: Callable[[Budget], None]) -> None:
        if budget.spent:
            result[name] = {"skipped": "the budget was spent"}
            return
        share = None if budget.seconds is None else budget.left_s * _SHARES[name]
        started = time.monotonic()
        with console.status(f"{name} of {checkpoint}"):
            try:
                measure(Budget(share))
            except Exception as error:  # the other parts are to be measured whatever happens in this one
                result["ok"] = False
                result[name] = {**_as_dict(result.get(name)), "error": f"{type(error).__name__}: {error}"}
                console.print(f"{name}: {error}", style="red", markup=False)
        result.setdefault("seconds", {})[name] = time.monotonic() - started
        gc.collect()  # an engine of the part before
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write(result)

    def enter(name: str) -> Callable[[object], None]:
        def keep(partial: object) -> None:
            result[name] = partial
            write(result)

        return keep

    def measure_kernels(limit: Budget) -> None:
        kind = kernels.dtype_of(dtype, device)
        for report in kernels.measure(kernels_for(device), device, kind, [shape], runs, limit):
            enter("kernels")(report)
        result["ok"] &= report.correct
        kernels.show(report, console, None)

    def measure_scheduler(limit: Budget) -> None:
        for report in scheduler.measure(
            running=256, waiting=10_000, prompt_tokens=128, steps=200, vocab=8192, budget=limit
        ):
            enter("scheduler")(report)
        console.print(scheduler.table(report))

    def measure_engine(name: str, routing: str, beside: list) -> Callable[[Budget], None]:
        points = {
            f"{way}-way, threshold {threshold:g}": Settings(
                threshold_prefill=threshold, threshold_decode=threshold, way=way
            )
            for way, threshold in BROWNOUT_POINTS
        }

        def measure(limit: Budget) -> None:
            measured = engine.run(
                checkpoint=checkpoint,
                work=work,
                settings=Settings(),
                device=str(device),
                dtype=dtype,
                routing=routing,
                runs=runs,
                peers=beside,
                points=points,
                profile=True,
                kernel_profile=True,
                budget=limit,
                write=enter(name),
            )
            result["ok"] &= not any("error" in peer for peer in measured.get("peers", {}).values())
            add_floors(measured, result.get("kernels"))
            enter(name)(measured)
            show(measured, f"{checkpoint}, routing {routing}", console)

        return measure

    def measure_server(limit: Budget) -> None:
        try:
            measured = server.run(
                checkpoint=checkpoint, work=work, dtype=dtype, device=str(device), runs=runs, budget=limit
            )
        except (ConfigError, ImportError) as error:  # not every machine has what a server needs
            measured = {"skipped": f"{type(error).__name__}: {error}"}
        enter("server")(measured)

    part("kernels", measure_kernels)
    part("engine", measure_engine("engine", "uniform", peers))
    if skewed:
        part("engine, skewed routing", measure_engine("engine, skewed routing", SKEWED, []))
    part("server", measure_server)
    part("scheduler", measure_scheduler)
    write(result)
    return result


def add_floors(measured: dict, report: object) -> None:
    """To the engine's figures the least time of a decode step at the bandwidth that was measured, and the step's over it."""
    if not isinstance(report, kernels.KernelReport) or not report.floors:
        return
    floors = next(iter(report.floors.values()))
    for figures in (measured, *measured.get("points", {}).values()):
        tokens_per_s = measured["decode_tokens_per_s"]
        if figures is not measured and "median" in figures:
            tokens_per_s = figures["median"].decode_tokens_per_s
        if "decode_step_bytes" in figures:
            floor_s = figures["decode_step_bytes"] / floors.bytes_per_s
            figures["decode_floor_ms"] = floor_s * 1e3
            figures["decode_step_over_floor"] = measured["workload"].requests / tokens_per_s / floor_s


def _as_dict(partial: object) -> dict:
    return partial if isinstance(partial, dict) else {} if partial is None else {"partial": partial}


def summary(result: dict) -> Table:
    """One line for each part."""
    table = Table(title=f"Benchmarks of {result['shape']}")
    for name in ("part", "result"):
        table.add_column(name)
    for name in _SHARES:
        if name in result:
            table.add_row(name, _line(name, result[name]))
    return table


def _line(name: str, part: object) -> str:
    if isinstance(part, dict) and ("error" in part or "skipped" in part):
        return str(part.get("error") or part["skipped"])
    if isinstance(part, kernels.KernelReport):
        wrong = sum(not case.correct for case in part.cases)
        timed = sum(case.time_us is not None for case in part.cases)
        return f"{len(part.cases)} cases compared, {wrong} wrong, {timed} timed"
    if isinstance(part, scheduler.SchedulerReport):
        costs = [
            f"{label} {cost.scheduler_and_batch_us:.0f} µs, {cost.share_of_step:.1%} of {part.step_ms:g} ms"
            for label, cost in (("steady", part.steady), ("turnover", part.turnover))
            if cost is not None
        ]
        return "scheduler and batch: " + "; ".join(costs)
    assert isinstance(part, dict)
    if name.startswith("engine"):
        lines = [f"decode {part['decode_tokens_per_s']:.0f}, prefill {part['prefill_tokens_per_s']:.0f} tokens/s"]
        if "decode_step_over_floor" in part:
            lines[0] += f", decode step {part['decode_step_over_floor']:.2f} × its floor"
        for kind, label in (("points", "{}: decode {:.2f} × ours without"), ("peers", "decode {1:.2f} × {0}")):
            for other, figures in part.get(kind, {}).items():
                if reason := not_measured(figures):
                    lines.append(f"{other}: {reason.splitlines()[0]}")
                else:
                    lines.append(label.format(other, figures["ratio"]["decode_tokens_per_s"]))
        return "\n".join(lines)
    return f"through Triton {part['ratio']:.2f} of the engine alone"
