"""The demo: a real Triton server on this machine with the model that ships, asked over every interface at once.

python -m loadtest.demo [--requests N] [--output DIR]

A few answers are shown as they stream; then all prompts go out at once, and a table says what the clients saw. The prompts
are questions of the model's task families, held out of its training, and chat.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

import msgspec
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from backend.config import DEMO
from backend.demo.prompts import DemoPrompt, demo_prompts
from backend.demo.tasks import is_right
from backend.errors import ConfigError
from backend.serving.launch_client import running_server
from loadtest.clients import Clients
from loadtest.record import RequestRecord, summarize, write_records

#: Share of the requests that each interface gets, in turn.
INTERFACES = ("http_stream", "grpc_stream", "http_infer", "grpc_infer")
_SAMPLING = {"max_tokens": 64, "temperature": 0.0}


async def show_some(clients: Clients, prompts: list[DemoPrompt], console: Console) -> list[RequestRecord]:
    """Ask one after another and print each answer as it streams."""

    def show(piece: str) -> None:
        console.print(piece, end="", style="bold", markup=False, highlight=False, soft_wrap=True)

    records = []
    for number, prompt in enumerate(prompts):
        console.print(prompt.question.replace("\n", "  "), end=" →", markup=False, highlight=False, soft_wrap=True)
        records.append(await clients.http_stream(number, prompt.text, _SAMPLING, on_text=show))
        console.print()
    return records


async def send_all(clients: Clients, prompts: list[DemoPrompt], console: Console) -> list[RequestRecord]:
    """Send every prompt at once, spread over the interfaces."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("requests", total=len(prompts))

        async def send(number: int, prompt: DemoPrompt) -> RequestRecord:
            interface = getattr(clients, INTERFACES[number % len(INTERFACES)])
            record = await interface(number, prompt.text, _SAMPLING)
            progress.advance(task)
            return record

        return await asyncio.gather(*(send(number, prompt) for number, prompt in enumerate(prompts)))


def examples(prompts: list[DemoPrompt], each: int = 2) -> list[DemoPrompt]:
    """The first few prompts of every form: free answers, letters, questions in chat."""
    asked = [p for p in prompts if p.form != "chat" or p.question.endswith("?")]
    return [p for form in ("free", "letter", "chat") for p in [q for q in asked if q.form == form][:each]]


def right_answers(prompts: list[DemoPrompt], records: list[RequestRecord]) -> tuple[int, int]:
    """(right answers, prompts that have one right answer)."""
    checked = [(p, r) for p, r in zip(prompts, records, strict=True) if p.answer is not None]
    return sum(is_right(p.form, r.text, p.answer) for p, r in checked if p.answer is not None), len(checked)


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
    parser = argparse.ArgumentParser(
        prog="loadtest.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shipped = demo_prompts()
    parser.add_argument(
        "--requests", type=int, default=len(shipped), help="how many requests to send (default: every prompt once)"
    )
    parser.add_argument("--output", type=Path, default=Path("results/demo"), help="folder for the records and summary")
    args = parser.parse_args(argv)
    if args.requests < 1:
        parser.error(f"--requests must be at least 1, got {args.requests}")
    console = Console()
    args.output.mkdir(parents=True, exist_ok=True)
    prompts = (shipped * -(-args.requests // len(shipped)))[: args.requests]
    started = time.monotonic()
    console.print("Starting Triton Inference Server with this repository's models …")

    async def ask(http: str, grpc: str) -> tuple[list[RequestRecord], list[RequestRecord]]:
        async with Clients(http, grpc) as clients:
            shown = await show_some(clients, examples(shipped), console)
            return shown, await send_all(clients, prompts, console)

    try:
        with running_server(env={"MOE_LLM_CHECKPOINT": DEMO}, log=args.output / "server.log") as server:
            console.print(f"Ready after {time.monotonic() - started:.1f} s: HTTP {server.http}, gRPC {server.grpc}\n")
            shown, records = asyncio.run(ask(server.http, server.grpc))
    except ConfigError as error:
        console.print(f"[red]The server did not start:[/red] {error}")
        return 1
    console.print()
    console.print(table_of(records))
    right, checked = right_answers(prompts, records)
    console.print(f"{right} of {checked} questions with one right answer were answered right.")
    write_records(args.output / "requests.jsonl", records)
    summary = args.output / "summary.json"
    content = msgspec.to_builtins(summarize(records)) | {"right_answers": right, "checked_answers": checked}
    summary.write_text(json.dumps(content, indent=2) + "\n")
    console.print(f"Wrote {args.output / 'requests.jsonl'}, {summary} and {args.output / 'server.log'}.")
    failed = [record for record in (*shown, *records) if record.outcome != "completed"]
    for record in failed[:3]:
        console.print(f"[red]{record.protocol} request {record.id} {record.outcome}:[/red] {record.error}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
