"""The demo: a real Triton server on this machine, clients of every interface at once, a table of what they saw.

python -m loadtest.demo [--requests N] [--output DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path

import msgspec
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from backend.errors import ConfigError
from backend.serving.launch_client import running_server
from loadtest.clients import Clients
from loadtest.record import RequestRecord, summarize, write_records

#: Share of the requests that each interface gets, in turn.
INTERFACES = ("http_stream", "grpc_stream", "http_infer", "grpc_infer")
_WORDS = (
    "the expert router sends every token to a few small networks and the rest of them rest while a burst of requests "
    "waits for its turn so that nobody has to wait for long even when many people ask at once"
).split()


def make_prompts(count: int, seed: int = 0) -> list[str]:
    """Prompts of 3 to 80 words, the same for the same seed."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(_WORDS, k=rng.randint(3, 80))) for _ in range(count)]


async def send_all(http: str, grpc: str, prompts: list[str], console: Console) -> list[RequestRecord]:
    """Send every prompt at once, spread over the interfaces."""
    rng = random.Random(1)
    async with Clients(http, grpc) as clients:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("requests", total=len(prompts))

            async def send(number: int, prompt: str) -> RequestRecord:
                sampling = {"max_tokens": lengths[number], "temperature": 0.8, "seed": number, "ignore_eos": True}
                record = await getattr(clients, INTERFACES[number % len(INTERFACES)])(number, prompt, sampling)
                progress.advance(task)
                return record

            lengths = [rng.randint(16, 96) for _ in prompts]
            return await asyncio.gather(*(send(number, prompt) for number, prompt in enumerate(prompts)))


def table_of(records: list[RequestRecord]) -> Table:
    """One row per interface and one for all. One-response interfaces have no first token of their own."""
    table = Table(
        title=f"{len(records)} requests at once through Triton Inference Server (ms, p50 / p99)", box=box.SIMPLE_HEAD
    )
    table.add_column("interface", no_wrap=True)
    for column in ("ok", "failed", "first", "per token", "latency", "tok/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in (*INTERFACES, "all"):
        rows = [record for record in records if name in (record.protocol, "all")]
        s = summarize(rows)
        stream = summarize([record for record in rows if record.protocol.endswith("stream")])
        table.add_row(
            name,
            str(s.completed),
            str(s.rejected + s.failed),
            _pair(stream.ttft_p50_s, stream.ttft_p99_s),
            _pair(stream.itl_p50_s, stream.itl_p99_s),
            _pair(s.latency_p50_s, s.latency_p99_s),
            f"{s.output_tokens_per_s:.0f}",
            end_section=name == INTERFACES[-1],
        )
    return table


def _pair(p50_s: float, p99_s: float) -> str:
    """Two times in ms; a dash where there is none."""
    return "–" if p50_s != p50_s else f"{p50_s * 1e3:.0f} / {p99_s * 1e3:.0f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="loadtest.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100, help="how many requests to send (default 100)")
    parser.add_argument("--output", type=Path, default=Path("results/demo"), help="folder for the records and summary")
    args = parser.parse_args(argv)
    if args.requests < 1:
        parser.error(f"--requests must be at least 1, got {args.requests}")
    console = Console()
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    console.print("Starting Triton Inference Server with the models moe_llm and moe_llm_infer …")
    try:
        with running_server(log=args.output / "server.log") as server:
            console.print(f"Ready after {time.monotonic() - started:.1f} s: HTTP {server.http}, gRPC {server.grpc}")
            records = asyncio.run(send_all(server.http, server.grpc, make_prompts(args.requests), console))
    except ConfigError as error:
        console.print(f"[red]The server did not start:[/red] {error}")
        return 1
    console.print(table_of(records))
    example = next((record for record in records if record.text), None)
    if example is not None:
        console.print(
            f"A completion (seeded random weights, so not language): {example.text[:120].strip()} …", markup=False
        )
    write_records(args.output / "requests.jsonl", records)
    summary = args.output / "summary.json"
    summary.write_text(json.dumps(msgspec.to_builtins(summarize(records)), indent=2) + "\n")
    console.print(f"Wrote {args.output / 'requests.jsonl'}, {summary} and {args.output / 'server.log'}.")
    failed = [record for record in records if record.outcome != "completed"]
    for record in failed[:3]:
        console.print(f"[red]{record.protocol} request {record.id} {record.outcome}:[/red] {record.error}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
