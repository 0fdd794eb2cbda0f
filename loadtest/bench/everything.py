"""All benchmarks in one run: correctness first, then kernels, host path, engine with and without brownout, and server."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from backend.brownout.settings import Settings
from backend.engine.model_runner import resolve_device
from backend.kernels import kernels_for
from backend.models.dummy import SHAPES
from loadtest.bench import engine, kernels, options, scheduler, server
from loadtest.bench.budget import Budget
from loadtest.bench.workload import Workload, machine, write_json

HELP = "all of them, correctness first"
#: Engine points beside no brownout: way and threshold of both phases.
BROWNOUT_POINTS = ((2, 0.0), (4, 0.2), (8, 0.4), (8, 0.0))
#: Share of what is left of the budget that each part may take, in order; what it leaves goes to the later ones.
_SHARES = {"kernels": 0.3, "scheduler": 0.3, "engine": 0.7, "server": 1.0}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=sorted(SHAPES), help="default: cpu-m, on a GPU qwen1.5-moe-a2.7b")
    options.add_workload(parser)
    options.add_place(parser)
    engine.add_peer(parser)
    options.add_runs(parser, 3)
    options.add_budget(parser)
    options.add_output(parser)
    parser.set_defaults(json=Path("results/bench/bench.json"))


def main(args: argparse.Namespace, console: Console) -> int:
    device = resolve_device(args.device)
    shape = args.shape or ("cpu-m" if device.type == "cpu" else "qwen1.5-moe-a2.7b")
    result = run(
        shape=shape,
        work=options.workload_of(args),
        device=device,
        dtype=args.dtype,
        runs=args.runs,
        peers=args.peer,
        budget=Budget(args.budget),
        write=lambda partial: write_json(args.json, partial),
        console=console,
    )
    console.print(summary(result))
    console.print(f"Wrote {args.json}.")
    return 0 if result["ok"] else 1


def run(
    *,
    shape: str,
    work: Workload,
    device: torch.device,
    dtype: str,
    runs: int,
    peers: list,
    budget: Budget,
    write: Callable[[dict], None],
    console: Console,
) -> dict:
    """Run the parts in turn; one that fails or finds the budget spent is entered with the reason, and the next one begins.

    `write` is called with the result whenever it has grown. `ok`: nothing failed and every kernel is right.
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

    def measure_engine(limit: Budget) -> None:
        points = {
            f"{way}-way, threshold {threshold:g}": Settings(
                threshold_prefill=threshold, threshold_decode=threshold, way=way
            )
            for way, threshold in BROWNOUT_POINTS
        }
        measured = engine.run(
            checkpoint=checkpoint,
            work=work,
            settings=Settings(),
            device=str(device),
            dtype=dtype,
            runs=runs,
            peers=peers,
            points=points,
            profile=True,
            budget=limit,
            write=enter("engine"),
        )
        result["ok"] &= not any("error" in peer for peer in measured.get("peers", {}).values())
        engine.show(measured, checkpoint, console)

    def measure_server(limit: Budget) -> None:
        measured = server.run(
            checkpoint=checkpoint, work=work, dtype=dtype, device=str(device), runs=runs, budget=limit
        )
        enter("server")(measured)

    part("kernels", measure_kernels)
    part("scheduler", measure_scheduler)
    part("engine", measure_engine)
    part("server", measure_server)
    write(result)
    return result


def _as_dict(partial: object) -> dict:
    return partial if isinstance(partial, dict) else {} if partial is None else {"partial": partial}


def summary(result: dict) -> Table:
    """One line for each part."""
    table = Table(title=f"Benchmarks of {result['shape']}")
    for name in ("part", "result"):
        table.add_column(name)
    for name in _SHARES:
        table.add_row(name, _line(name, result.get(name, {})))
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
    if name == "engine":
        lines = [f"decode {part['decode_tokens_per_s']:.0f}, prefill {part['prefill_tokens_per_s']:.0f} tokens/s"]
        for kind, label in (("points", "{}: decode {:.2f} × ours without"), ("peers", "decode {1:.2f} × {0}")):
            for other, figures in part.get(kind, {}).items():
                if reason := engine.not_measured(figures):
                    lines.append(f"{other}: {reason.splitlines()[0]}")
                else:
                    lines.append(label.format(other, figures["ratio"]["decode_tokens_per_s"]))
        return "\n".join(lines)
    return f"through Triton {part['ratio']:.2f} of the engine alone"
