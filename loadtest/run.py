"""Send a load to a running server, open loop, and hold what comes back against latency promises.

python -m loadtest.run --http HOST:PORT --metrics HOST:PORT --arrivals step:base=2,duration=60 --record results/run.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import sys
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from backend.errors import ConfigError
from loadtest.clients import INTERFACES, Clients
from loadtest.control_log import read_course
from loadtest.open_loop import LEAD_S, send_open_loop
from loadtest.options import add_load_arguments, describe, make_prompts, plan_load
from loadtest.prompts import Prompts
from loadtest.record import RequestRecord
from loadtest.results import RunInfo, RunSummary, summarize_run, summary_path, telemetry_path, write_run
from loadtest.schedule import Arrival, Schedule
from loadtest.telemetry import record_telemetry
from loadtest.wire import sampling_of


async def run_load(
    schedule: Schedule,
    prompts: Prompts,
    *,
    http: str | None,
    grpc: str | None,
    interfaces: tuple[str, ...],
    info: RunInfo,
    metrics: str | None = None,
    record: Path | None = None,
    console: Console | None = None,
) -> tuple[RunSummary, list[RequestRecord]]:
    """Run a schedule; requests go to the interfaces in turn.

    Writes the records, the summary and, if `metrics` names the metrics port, telemetry beside the file `record`.
    """
    # Made before the run: a tokenizer's work must not delay a request.
    texts = [prompts.text(number, a.input_tokens) for number, a in schedule.numbered()]
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(console=console, transient=True, disable=console is None))
        bar = progress.add_task("requests", total=len(texts))
        async with Clients(http or grpc, grpc or http) as clients:

            async def send(number: int, arrival: Arrival, intended_s: float) -> RequestRecord:
                ask = getattr(clients, interfaces[number % len(interfaces)])
                result = await ask(number, texts[number], sampling_of(number, arrival, info.seed), intended_s)
                result.brownout = arrival.brownout
                progress.advance(bar)
                return result

            watch = None
            if metrics and record:
                watch = asyncio.create_task(record_telemetry(metrics, telemetry_path(record)))
            info.started_monotonic_s = time.monotonic() + LEAD_S
            info.started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            try:
                records = await send_open_loop(schedule.numbered(), send, info.started_monotonic_s)
            finally:
                if watch:
                    watch.cancel()
                    await asyncio.wait([watch])
    summary = summarize_run(info, records, read_course(record) if record else [])
    if record:
        write_run(record, summary, records)
    return summary, records


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="loadtest.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--http", metavar="HOST:PORT", help="the server's HTTP address: streams over generate_stream")
    parser.add_argument("--grpc", metavar="HOST:PORT", help="its gRPC address: gRPC streams; with both, in turn")
    parser.add_argument("--interfaces", help=f"instead, in turn: comma-separated list of {', '.join(INTERFACES)}")
    parser.add_argument("--metrics", metavar="HOST:PORT", help="its metrics port: record thresholds, slots and queue")
    add_load_arguments(parser)
    args = parser.parse_args(argv)
    addresses = {"http": args.http, "grpc": args.grpc}
    given = tuple(f"{protocol}_stream" for protocol, address in addresses.items() if address)
    interfaces = tuple(args.interfaces.split(",")) if args.interfaces else given
    if not interfaces:
        parser.error("name the server: --http HOST:PORT, --grpc HOST:PORT or both")
    for name in interfaces:
        if name not in INTERFACES or not addresses[name.partition("_")[0]]:
            parser.error(f"--interfaces: {name!r} is none of {', '.join(INTERFACES)} with its address given")
    console = Console()
    record = Path(args.record) if args.record else None
    try:
        schedule, info = plan_load(args)
        prompts = make_prompts(args)
    except ConfigError as error:
        parser.error(str(error))
    load = run_load(
        schedule,
        prompts,
        http=args.http,
        grpc=args.grpc,
        interfaces=interfaces,
        info=info,
        metrics=args.metrics,
        record=record,
        console=console,
    )
    try:
        summary, records = asyncio.run(load)
    except KeyboardInterrupt:
        console.print("Stopped; nothing was written but telemetry.")
        return 1
    for line in describe(summary):
        console.print(line, highlight=False)
    errors = Counter((result.outcome, result.error) for result in records if result.error)
    for (outcome, error), count in errors.most_common(3):
        console.print(f"{count} × {outcome}: {error}", highlight=False, markup=False)
    if record:
        console.print(f"Wrote {record} and {summary_path(record)}.")
    return 0 if summary.valid and not summary.result.failed else 1


if __name__ == "__main__":
    sys.exit(main())
