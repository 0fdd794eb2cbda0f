"""The demo: a real Triton server on this machine with the model that ships, in a burst of requests without and with brownout.

python -m loadtest.demo [--trace FILE] [--output DIR]

The model answers some questions, over every interface. Then the machine's capacity and a promise of latency are measured, and
the same arrivals are sent to two fresh servers: one at full quality, one with a controller beside it that dims the model just
enough. A machine that bears some seconds of the burst at full quality was slower while it was measured, and is measured
again. The model's experts are widened (the same function at a larger cost), so that they weigh as they do in large
models.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from functools import partial
from pathlib import Path

from rich.console import Console

from backend.brownout.profile import PROFILE_NAME, read_profile
from backend.config import DEMO, DEMO_CHECKPOINT
from backend.demo.prompts import DemoPrompt, demo_prompts
from backend.errors import ConfigError, UnavailableError
from backend.serving.launch_client import RunningServer, running_server
from backend.tokenizer import load_tokenizer
from controller.laws import LAWS
from loadtest.clients import Clients
from loadtest.control_log import read_course
from loadtest.demo.burst import (
    BURST,
    CALM,
    BurstShape,
    Ground,
    burst_schedule,
    measure_ground,
    peak_rps,
    run_against_fresh_server,
    trace_schedule,
)
from loadtest.demo.comparison import Comparison
from loadtest.demo.options import add_shared, check_shared
from loadtest.demo.questions import ConversationPrompts, ask_all, examples, right_answers, show_some, table_of
from loadtest.options import ms
from loadtest.quality import quality_of_run
from loadtest.record import RequestRecord, write_records
from loadtest.report.page import write_report
from loadtest.report.run_data import load_run
from loadtest.results import RunSummary
from loadtest.schedule import Schedule


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    console = Console()
    started = time.monotonic()
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        status = _demo(args, console)
    except (ConfigError, UnavailableError) as error:
        console.print(f"[red]The demo cannot go on:[/red] {error}", highlight=False)
        return 1
    console.print(f"{time.monotonic() - started:.0f} s in all.", highlight=False)
    return status


def _demo(args: argparse.Namespace, console: Console) -> int:
    env = {"MOE_LLM_CHECKPOINT": DEMO, "MOE_LLM_WIDEN_EXPERTS": str(args.widen)}
    conversations = partial(ConversationPrompts, tokenizer=load_tokenizer(str(DEMO_CHECKPOINT), None))
    prompts = conversations(args.seed)
    shape = BurstShape()
    console.print("Starting Triton Inference Server with this repository's models …")
    with running_server(env=env, log=args.output / "ground.server.log") as server:
        console.print(f"Ready: HTTP {server.http}, gRPC {server.grpc}\n", highlight=False)
        lost = asyncio.run(_ask_questions(server, args.output, console))
        if lost:
            for record in lost[:3]:
                console.print(f"[red]{record.protocol} request {record.id} {record.outcome}:[/red] {record.error}")
            return 1
        console.print("\nMeasuring what this machine can do, and how fast it answers at a calm load …")
        ground = asyncio.run(measure_ground(server, conversations, shape, args.seed, console))
    load, rates = _load_of(args, ground, shape, console)

    def run(name: str, law: str | None) -> tuple[RunSummary, list[RequestRecord]]:
        console.print(f"Brownout {name}, fresh server …")
        return run_against_fresh_server(
            name,
            load,
            ground.slo,
            prompts,
            seed=args.seed,
            env=env,
            folder=args.output,
            law=law,
            max_loss_percent=args.max_quality_loss,
            console=console,
        )

    off, _ = run("off", None)
    on, records = run("on", args.law)
    profile = DEMO_CHECKPOINT / PROFILE_NAME
    quality = quality_of_run(records, read_course(args.output / "on.jsonl"), read_profile(profile))
    comparison = Comparison(ground=ground, base_rps=rates[0], burst_rps=rates[1], off=off, on=on, quality=quality)
    console.print(comparison.table())
    summary = args.output / "summary.json"
    summary.write_text(json.dumps(comparison.summary(), indent=2) + "\n")
    runs = [load_run(f"{name}={args.output / f'{name}.jsonl'}", profile) for name in ("off", "on")]
    report = write_report(runs, args.output)
    console.print(f"Wrote {report}, {summary}, and records, telemetry and logs beside them.", highlight=False)
    if not comparison.valid:
        console.print("[red]A run is invalid: the load generator was late, or requests failed.[/red] See the report.")
    return 0 if comparison.valid else 1


def _load_of(
    args: argparse.Namespace, ground: Ground, shape: BurstShape, console: Console
) -> tuple[tuple[str, Schedule], tuple[float, float]]:
    """The load that fits this ground, with its usual and its highest rate, told to the user."""
    if args.trace:
        load = trace_schedule(args.trace, ground, shape, args.seed)
        rates = len(load[1].arrivals) / load[1].duration_s, peak_rps(load[1])
    else:
        load = burst_schedule(ground, shape, args.seed)
        rates = CALM * ground.capacity_rps, BURST * ground.capacity_rps
    console.print(
        f"Capacity {ground.capacity_rps:.1f} requests/s at full quality. Promise (twice the 90th percentile at "
        f"{CALM:g} × capacity): first token {ms(ground.slo.ttft_s)}, between tokens {ms(ground.slo.itl_s)}.\n"
        f"Load: {len(load[1].arrivals)} requests in {load[1].duration_s:.0f} s, {rates[0]:.1f} per second, at most "
        f"{rates[1]:.1f}.",
        highlight=False,
    )
    return load, rates


async def _ask_questions(server: RunningServer, folder: Path, console: Console) -> list[RequestRecord]:
    """Show some answers, ask everything over every interface; the requests that were not completed."""
    prompts: list[DemoPrompt] = demo_prompts()
    async with Clients(server.http, server.grpc) as clients:
        shown = await show_some(clients, examples(prompts), console)
        records = await ask_all(clients, prompts, console)
    console.print()
    console.print(table_of(records))
    right, checked = right_answers(prompts, records)
    console.print(f"{right} of {checked} questions with one right answer were answered right.", highlight=False)
    write_records(folder / "questions.jsonl", records)
    return [record for record in (*shown, *records) if record.outcome != "completed"]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="loadtest.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    laws = [name for name in LAWS if name != "off"]
    parser.add_argument("--law", choices=laws, default="predictive", help="the controller's law (default %(default)s)")
    add_shared(parser, "results/demo")
    args = parser.parse_args(argv)
    check_shared(parser, args)
    return args


if __name__ == "__main__":
    sys.exit(main())
