"""Resident expert pool beside the local one: quality, speed and memory, with and without prediction.

The names say what serves a missing expert and what is fetched ahead. The variants answer the same questions with the same number
of requests running (--questions), and then complete the same random prompts in turn (--runs), on engines that live side by side.
`predictor` is measured where the checkpoint has one.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from backend.brownout import measure
from backend.config import DEMO_CHECKPOINT, EngineConfig
from backend.elastic.predictor import FILE_NAME
from backend.engine.llm import LLM
from backend.models.model import MoeModel
from loadtest.bench.options import add_output, add_workload, at_least_two, positive, workload_of
from loadtest.bench.our_engine import OurEngine
from loadtest.bench.workload import machine, write_json

HELP = "resident expert pool beside the local one"

#: Parameters of the engines by name; `local` is what the others are compared with.
VARIANTS: dict[str, dict[str, object]] = {
    "local": {},
    "united-none": {"expert_pool": "resident", "expert_prefetch": "none"},
    "united-ewma": {"expert_pool": "resident", "expert_prefetch": "ewma"},
    "united-predictor": {"expert_pool": "resident", "expert_prefetch": "predictor"},
    "wait-none": {"expert_pool": "resident", "expert_miss": "wait", "expert_prefetch": "none"},
    "wait": {"expert_pool": "resident", "expert_miss": "wait"},
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", default=str(DEMO_CHECKPOINT), help="folder (default: the demo's)")
    parser.add_argument("--resident", default="0.5", help="the parameter resident_experts (default 0.5)")
    parser.add_argument("--united", default="", help="the parameter united (default: all that are there)")
    parser.add_argument(
        "--widen-experts", type=positive, default=1, help="repeat the experts' neurons so often (default 1)"
    )
    parser.add_argument("--dtype", default="auto", help="type of the weights (default: the checkpoint's)")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="default: all")
    parser.add_argument(
        "--questions", type=int, default=0, help="of every family and form of the demo (default 0: none)"
    )
    add_workload(parser)
    parser.add_argument("--runs", type=at_least_two, help="timed runs after one that warms up (default: no timing)")
    add_output(parser)


def main(args: argparse.Namespace, console: Console) -> int:
    work, rows = workload_of(args), {}
    names = [name for name in args.variants if "predictor" not in name or (Path(args.checkpoint) / FILE_NAME).exists()]

    def parameters(name: str) -> dict[str, object]:
        shared = {
            "united": args.united,
            "dtype": args.dtype,
            "widen_experts": args.widen_experts,
            "max_running": work.requests,
        }
        return {**shared, **VARIANTS[name], "resident_experts": args.resident}

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("variants", total=len(names) + len(names) * (args.runs or 0))
        for name in names:
            llm = LLM(args.checkpoint, **parameters(name))
            rows[name] = _memory(llm.engine.runner.model)
            if args.questions:
                asked = measure.demo_questions(llm, args.questions, 0)
                rows[name]["quality"] = measure.ask(llm, asked)
                rows[name]["telemetry"] = asdict(llm.engine.expert_telemetry())
            progress.advance(task)
        if args.runs:
            _time({name: OurEngine(EngineConfig(args.checkpoint, **parameters(name))) for name in names}, work, args.runs, rows,
                  lambda: progress.advance(task))  # fmt: skip
    _compare(rows)
    _show(rows, console)
    if args.json is not None:
        workload = {"requests": work.requests, "prompt_tokens": work.prompt_tokens, "new_tokens": work.new_tokens}
        write_json(
            args.json, {"machine": machine(), "workload": workload, "questions": args.questions, "variants": rows}
        )
        console.print(f"Wrote {args.json}.")
    return 0


def _memory(model: MoeModel) -> dict[str, object]:
    originals = sum(3 * block.experts.expert_size * model.config.hidden_size for block in model.moe_blocks)
    return {
        "resident_bytes": model.resident_bytes(),
        "united_bytes": model.united_bytes(),
        "all_experts_bytes": originals * model.config.num_experts * model.dtype.itemsize,
    }


def _time(engines: dict[str, OurEngine], work, runs: int, rows: dict, advance) -> None:
    """Runs of all engines in turn, so that what else the machine does hits all alike."""
    prompts = {name: work.prompts(ours.engine.vocab_size) for name, ours in engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    before = {}
    for turn in range(runs + 1):
        for name, ours in engines.items():
            if turn == 1:
                before[name] = asdict(ours.engine.expert_telemetry())
            elapsed = ours.run(prompts[name], work.new_tokens).seconds
            if turn:
                seconds[name].append(elapsed)
                advance()
    for name, ours in engines.items():
        after = asdict(ours.engine.expert_telemetry())
        rows[name]["runs_s"] = seconds[name]
        rows[name]["output_tokens_per_s"] = work.requests * work.new_tokens / statistics.median(seconds[name])
        rows[name]["timed"] = {key: (after[key] - before[name][key]) / runs for key in after if key != "resident_share"}


def _compare(rows: dict[str, dict]) -> None:
    """Add losses and speeds relative to `local`, if it was measured."""
    local = rows.get("local")
    for row in rows.values() if local else ():
        if "quality" in row:
            scores = (local["quality"]["accuracy"], row["quality"]["accuracy"])
            row["loss"] = {form: measure.relative_loss(scores[0][form], scores[1][form]) for form in scores[0]}
        if "runs_s" in row:
            row["relative_speed"] = row["output_tokens_per_s"] / local["output_tokens_per_s"]


def _show(rows: dict[str, dict], console: Console) -> None:
    table = Table(title="Expert pools", box=SIMPLE_HEAD, pad_edge=False)
    columns = (
        "own %",
        "united %",
        "repl. %",
        "letter loss %",
        "exact loss %",
        "tokens/s",
        "of local",
        "stalls",
        "stalled s",
        "MB moved",
    )
    table.add_column("pool", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        shares = (row[key] / row["all_experts_bytes"] for key in ("resident_bytes", "united_bytes"))
        cells = [f"{100 * share:.0f}" for share in shares]
        cells += [f"{100 * row['quality']['united_share']:.1f}"] if "quality" in row else [""]
        cells += [f"{row['loss'][form]['mean']:.2f}" if "loss" in row else "" for form in ("letter", "free")]
        timed = row.get("timed")
        cells += [
            f"{row['output_tokens_per_s']:.0f}" if timed else "",
            f"{row['relative_speed']:.3f}" if "relative_speed" in row else "",
        ]
        cells += (
            [f"{timed['stalls']:.0f}", f"{timed['stall_s']:.2f}", f"{timed['bytes_moved'] / 1e6:.1f}"]
            if timed
            else [""] * 3
        )
        table.add_row(name, *cells)
    console.print(table)
