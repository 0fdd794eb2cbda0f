"""All benchmarks in one run: correctness first, then kernels, engine with and without brownout, server, and host path.

`--device interpreter` runs the GPU kernels in Triton's interpreter, to see without a GPU that all of it works.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from backend.brownout.settings import Settings
from backend.config import EngineConfig
from backend.errors import ConfigError
from backend.kernels import kernels_for
from backend.models.dummy import SHAPES
from loadtest.bench import engine, kernels, options, precompile, scheduler, server
from loadtest.bench.budget import Budget
from loadtest.bench.engine_tables import show
from loadtest.bench.interpreter import INTERPRETER, interpreting, kernels_on
from loadtest.bench.peer_process import PeerSpec
from loadtest.bench.rounds import not_measured
from loadtest.bench.workload import Workload, machine, write_json

HELP = "all of them, correctness first"
#: Engine points beside no brownout: way and threshold of both phases.
BROWNOUT_POINTS = ((2, 0.0), (4, 0.2), (8, 0.4), (8, 0.0))
#: Share of what is left of the budget that each part may take, in order; what it leaves goes to the later ones.
_SHARES = {
    "compile": 0.2,
    "kernels": 0.3,
    "engine": 0.6,
    "engine, skewed routing": 0.6,
    "server": 0.7,
    "scheduler": 1.0,
}
SKEWED = "zipf:1"
#: What the targets of a GPU are for, and what an interpreter gets through.
_GPU_WORK = Workload(requests=64, prompt_tokens=448, new_tokens=128)
_INTERPRETED_WORK = Workload(requests=2, prompt_tokens=6, new_tokens=3)


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
        result = AllBenchmarks(
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
        ).run()
    console.print(summary(result))
    console.print(f"Wrote {args.json}.")
    return 0 if result["ok"] else 1


def _work(args: argparse.Namespace, kind: str) -> Workload:
    """As asked for; where nothing is, what suits the device."""
    given = options.workload_of(args)
    default = {"cpu": given, INTERPRETER: _INTERPRETED_WORK}.get(kind, _GPU_WORK)
    return default if given == options.DEFAULT_WORK else given


@dataclass
class AllBenchmarks:
    """The parts in turn; one that fails or finds the budget spent is entered with the reason, and the next one begins.

    With `skewed` the engine is also measured with skewed routing, without peers. `write` is called with the result whenever
    it has grown.
    """

    shape: str
    work: Workload
    device: torch.device
    dtype: str
    runs: int
    peers: list[PeerSpec]
    budget: Budget
    write: Callable[[dict], None]
    console: Console
    skewed: bool = False
    #: What has been measured so far, by part; `ok`: nothing failed and every kernel is right.
    result: dict = field(default_factory=dict)

    def run(self) -> dict:
        """Measure everything; returns `result`."""
        self.result |= {"shape": self.shape, "workload": self.work, "machine": machine(), "ok": True}
        if self.device.type == "cuda":
            self._part("compile", self._compile)
        self._part("kernels", self._kernels)
        self._part("engine", lambda limit: self._engine(limit, "engine", "uniform", self.peers))
        if self.skewed:
            name = "engine, skewed routing"
            self._part(name, lambda limit: self._engine(limit, name, SKEWED, []))
        self._part("server", self._server)
        self._part("scheduler", self._scheduler)
        self.write(self.result)
        return self.result

    @property
    def _checkpoint(self) -> str:
        return f"dummy:{self.shape}"

    def _part(self, name: str, measure: Callable[[Budget], None]) -> None:
        if self.budget.spent:
            self.result[name] = {"skipped": "the budget was spent"}
            return
        share = None if self.budget.seconds is None else self.budget.left_s * _SHARES[name]
        started = time.monotonic()
        with self.console.status(f"{name} of {self._checkpoint}"):
            try:
                measure(Budget(share))
            except Exception as error:  # the other parts are to be measured whatever happens in this one
                self.result["ok"] = False
                self.result[name] = {**_as_dict(self.result.get(name)), "error": f"{type(error).__name__}: {error}"}
                self.console.print(f"{name}: {error}", style="red", markup=False)
        self.result.setdefault("seconds", {})[name] = time.monotonic() - started
        gc.collect()  # an engine of the part before
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.write(self.result)

    def _enter(self, name: str, partial: object) -> None:
        self.result[name] = partial
        self.write(self.result)

    def _compile(self, limit: Budget) -> None:
        ways = ",".join(str(way) for way in sorted({way for way, _ in BROWNOUT_POINTS}))
        config = EngineConfig(
            checkpoint=self._checkpoint,
            device=str(self.device),
            dtype=self.dtype,
            united=ways,
            **engine.sizes_for(self.work, on_gpu=True),
        )
        pieces = precompile.compile_all(config, kernels.dtype_of(self.dtype, self.device), limit.left_s)
        self._enter("compile", {"pieces": pieces})

    def _kernels(self, limit: Budget) -> None:
        dtype = kernels.dtype_of(self.dtype, self.device)
        for report in kernels.measure(kernels_for(self.device), self.device, dtype, [self.shape], self.runs, limit):
            self._enter("kernels", report)
        self.result["ok"] &= report.correct
        kernels.show(report, self.console, None)

    def _engine(self, limit: Budget, name: str, routing: str, peers: list[PeerSpec]) -> None:
        measured = engine.run(
            checkpoint=self._checkpoint,
            work=self.work,
            settings=Settings(),
            device=str(self.device),
            dtype=self.dtype,
            routing=routing,
            runs=self.runs,
            peers=peers,
            points={
                f"{way}-way, threshold {theta:g}": Settings(threshold_prefill=theta, threshold_decode=theta, way=way)
                for way, theta in BROWNOUT_POINTS
            },
            profile=True,
            kernel_profile=True,
            budget=limit,
            write=lambda partial: self._enter(name, partial),
        )
        self.result["ok"] &= not any("error" in peer for peer in measured.get("peers", {}).values())
        add_floors(measured, self.result.get("kernels"))
        self._enter(name, measured)
        show(measured, f"{self._checkpoint}, routing {routing}", self.console)

    def _server(self, limit: Budget) -> None:
        try:
            measured = server.run(
                checkpoint=self._checkpoint,
                work=self.work,
                dtype=self.dtype,
                device=str(self.device),
                runs=self.runs,
                budget=limit,
            )
        except (ConfigError, ImportError) as error:  # not every machine has what a server needs
            measured = {"skipped": f"{type(error).__name__}: {error}"}
        # The server's engine is a process of its own, whose kernels are not interpreted.
        self._enter("server", {**measured, "engine_alone_interpreted": interpreting()})

    def _scheduler(self, limit: Budget) -> None:
        for report in scheduler.measure(
            running=256, waiting=10_000, prompt_tokens=128, steps=200, vocab=8192, budget=limit
        ):
            self._enter("scheduler", report)
        self.console.print(scheduler.table(report))


def add_floors(measured: dict, report: object) -> None:
    """To the engine's figures the least time of a decode step at the bandwidth that was measured, and the step's over it."""
    if not isinstance(report, kernels.KernelReport) or not report.floors:
        return
    floors = next(iter(report.floors.values()))
    for figures in (measured, *measured.get("points", {}).values()):
        if (step_ms := figures.get("decode_step_ms")) is not None:
            floor_ms = figures["decode_step_bytes"] / floors.bytes_per_s * 1e3
            figures["decode_floor_ms"] = floor_ms
            figures["decode_step_over_floor"] = step_ms / floor_ms


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
    if name == "compile":
        return f"{part['pieces']} pieces"
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
    if part.get("engine_alone_interpreted"):
        return f"through Triton {part['server_tokens_per_s']:.0f} tokens/s, on CPU kernels"
    return f"through Triton {part['ratio']:.2f} of the engine alone"
