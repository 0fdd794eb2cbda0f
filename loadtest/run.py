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
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from backend.errors import ConfigError
from backend.serving.tokenizer import load_tokenizer
from loadtest.clients import Clients
from loadtest.load_spec import HELP, build_schedule
from loadtest.open_loop import LEAD_S, MAX_LATENESS_P99_S, send_open_loop
from loadtest.prompts import FilePrompts, GeneratedPrompts, Prompts
from loadtest.record import RequestRecord, Slo
from loadtest.results import RunInfo, RunSummary, summarize_run, summary_path, telemetry_path, write_run
from loadtest.schedule import Arrival, Schedule
from loadtest.telemetry import read_telemetry, record_telemetry

INTERFACES = ("http_stream", "grpc_stream", "http_infer", "grpc_infer")


def sampling_of(number: int, arrival: Arrival, seed: int) -> dict[str, object]:
    """Sampling parameters of a request: exactly the scheduled number of tokens, seeded."""
    return {
        "max_tokens": arrival.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "seed": seed * 1_000_003 + number,
        "brownout": arrival.brownout,
    }


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
    samples = read_telemetry(telemetry_path(record)) if record else []
    summary = summarize_run(info, records, samples)
    if record:
        write_run(record, summary, records)
    return summary, records


def run_info(name: str, spec: str, seed: int, schedule: Schedule, slo: Slo) -> RunInfo:
    """The description of a run that has not started yet."""
    return RunInfo(
        name=name,
        arrivals=spec,
        seed=seed,
        arrivals_sha256=schedule.sha256(),
        slo=slo,
        started_monotonic_s=0.0,
        started_at="",
        duration_s=schedule.duration_s,
        bursts=schedule.bursts,
    )


def make_prompts(file: Path | None, checkpoint: str | None, seed: int) -> Prompts:
    """Prompts of a file, or generated with the tokenizer of the served checkpoint, or of about the length."""
    if file is not None:
        return FilePrompts(file, seed)
    return GeneratedPrompts(seed, load_tokenizer(checkpoint, None) if checkpoint else None)


def print_summary(console: Console, summary: RunSummary) -> None:
    r, slo = summary.result, summary.run.slo
    console.print(
        f"{r.requests} requests: {r.completed} completed, {r.rejected} rejected, {r.failed} failed; "
        f"{r.output_tokens_per_s:.0f} output tokens/s"
    )
    console.print(
        f"first token p50 {_ms(r.ttft_p50_s)}, p99 {_ms(r.ttft_p99_s)}; promised {_ms(slo.ttft_s)}: "
        f"{_percent(r.ttft_violation_ratio)} of requests late"
    )
    console.print(
        f"between tokens p50 {_ms(r.itl_p50_s)}, p99 {_ms(r.itl_p99_s)}; promised {_ms(slo.itl_s)}: "
        f"{_percent(r.itl_violation_ratio)} of tokens late; {_percent(r.violating_seconds_ratio)} of seconds late"
    )
    if not summary.valid:
        console.print(
            f"[red]Invalid run:[/red] the load generator started requests {_ms(summary.generator_lateness_p99_s)} late "
            f"(p99; allowed {_ms(MAX_LATENESS_P99_S)}). Send less, or from another machine."
        )


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.0f} ms"


def _percent(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1%}"


def add_load_arguments(parser) -> None:
    """The options that say what to send; the same for the command and for Locust."""
    parser.add_argument("--arrivals", default="step:base=2,duration=60", help=f"the load: {HELP} (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of times, lengths and prompts (default 0)")
    parser.add_argument("--input-tokens", default="128", help="prompt length, N or LOW-HIGH (default 128)")
    parser.add_argument("--output-tokens", default="64", help="answer length, N or LOW-HIGH (default 64)")
    parser.add_argument(
        "--never-share", type=float, default=0.0, help="share of requests exempt from brownout (default 0)"
    )
    parser.add_argument("--prompts", default="", help='JSON lines with "text" to use as prompts')
    parser.add_argument(
        "--checkpoint", default="", help="served checkpoint folder, whose tokenizer makes lengths exact"
    )
    parser.add_argument("--slo-ttft", type=float, default=1.0, help="promised time to the first token, s (default 1)")
    parser.add_argument("--slo-itl", type=float, default=0.1, help="promised time between tokens, s (default 0.1)")
    parser.add_argument("--record", default="", help="file for the records (JSON lines); the summary goes beside it")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="loadtest.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--http", metavar="HOST:PORT", help="the server's HTTP address: streams over generate_stream")
    parser.add_argument("--grpc", metavar="HOST:PORT", help="its gRPC address: gRPC streams; with both, in turn")
    parser.add_argument("--interfaces", help=f"instead, in turn: comma-separated list of {', '.join(INTERFACES)}")
    parser.add_argument("--metrics", metavar="HOST:PORT", help="its metrics port: record thresholds, slots and queue")
    parser.add_argument("--name", default="", help="what the run is called in reports")
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
        schedule = build_schedule(
            args.arrivals,
            seed=args.seed,
            input_tokens=args.input_tokens,
            output_tokens=args.output_tokens,
            never_share=args.never_share,
        )
        slo = Slo(ttft_s=args.slo_ttft, itl_s=args.slo_itl)
        name = args.name or (record.stem if record else "run")
        info = run_info(name, args.arrivals, args.seed, schedule, slo)
        prompts = make_prompts(Path(args.prompts) if args.prompts else None, args.checkpoint or None, args.seed)
    except ConfigError as error:
        parser.error(str(error))
    summary, _ = asyncio.run(
        run_load(
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
    )
    print_summary(console, summary)
    if record:
        console.print(f"Wrote {record} and {summary_path(record)}.")
    return 0 if summary.valid and not summary.result.failed else 1


if __name__ == "__main__":
    sys.exit(main())
