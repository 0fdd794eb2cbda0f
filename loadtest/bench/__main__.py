"""Benchmarks of the engine and the server; each prints a table and, with --json, writes its figures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from backend.brownout.settings import MECHANISMS, Settings
from backend.config import DTYPES
from backend.errors import ConfigError
from backend.models.dummy import PREFIX, SHAPES
from loadtest.bench import engine, server
from loadtest.bench.workload import Workload, write_json


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="loadtest.bench", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    model = common.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=sorted(SHAPES), default="cpu-s", help="seeded random weights of this shape")
    model.add_argument("--checkpoint", help="a Hugging Face checkpoint folder")
    common.add_argument("--requests", type=int, default=32, help="requests at once (default 32)")
    common.add_argument("--prompt-tokens", type=int, default=128)
    common.add_argument("--new-tokens", type=int, default=128, help="tokens made per request, at least 2")
    common.add_argument("--device", default="auto")
    common.add_argument("--dtype", choices=DTYPES, default="auto")
    common.add_argument(
        "--runs", type=int, default=3, help="measured runs after one that warms up; medians are reported"
    )
    common.add_argument("--json", type=Path, help="write the figures to this file")
    one = commands.add_parser("engine", parents=[common], help="the engine alone, with or without peers")
    one.add_argument("--threshold-prefill", type=float, default=1.0)
    one.add_argument("--threshold-decode", type=float, default=1.0)
    one.add_argument(
        "--way", type=int, default=0, help="experts per united expert (default: the largest loaded way; 8 for a shape)"
    )
    one.add_argument("--mechanism", choices=MECHANISMS, default="united")
    one.add_argument("--routing", default="uniform", help="expert skew of a shape: uniform or zipf:S")
    one.add_argument("--peer", action="append", choices=["transformers"], default=[], help="measure this one in turn")
    commands.add_parser("server", parents=[common], help="through Triton Inference Server, against the engine alone")
    return top


def main(argv: list[str] | None = None) -> int:
    top = parser()
    args = top.parse_args(argv)
    if min(args.requests, args.prompt_tokens, args.runs) < 1 or args.new_tokens < 2:
        top.error("--requests, --prompt-tokens and --runs must be at least 1, --new-tokens at least 2")
    checkpoint = args.checkpoint or PREFIX + args.shape
    work = Workload(requests=args.requests, prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens)
    console = Console()
    try:
        with console.status(f"measuring {checkpoint}: {args.runs} runs and one to warm up"):
            if args.command == "engine":
                settings = Settings(
                    threshold_prefill=args.threshold_prefill,
                    threshold_decode=args.threshold_decode,
                    mechanism=args.mechanism,
                    way=args.way,
                )
                result = engine.run(
                    checkpoint=checkpoint,
                    work=work,
                    settings=settings,
                    device=args.device,
                    dtype=args.dtype,
                    routing=args.routing,
                    runs=args.runs,
                    peers=args.peer,
                )
            else:
                result = server.run(
                    checkpoint=checkpoint, work=work, dtype=args.dtype, device=args.device, runs=args.runs
                )
    except (ConfigError, ValueError) as error:
        console.print(f"[red]{error}[/red]")
        return 1
    console.print(engine_table(result, checkpoint) if args.command == "engine" else server_table(result, checkpoint))
    if args.json:
        write_json(args.json, result)
        console.print(f"Wrote {args.json}.")
    return 0


def engine_table(result: dict, checkpoint: str) -> Table:
    table = Table(title=f"{checkpoint}, tokens per second, medians")
    table.add_column("")
    for name in ("prefill", "decode", "output"):
        table.add_column(name, justify="right")
    keys = ("prefill_tokens_per_s", "decode_tokens_per_s", "output_tokens_per_s")
    table.add_row("ours", *(f"{result[key]:.0f}" for key in keys))
    for name, peer in result.get("peers", {}).items():
        rates = [getattr(peer["median"], key) for key in keys]
        table.add_row(name, *(f"{rate:.0f}" for rate in rates))
        table.add_row(f"ours / {name}", *(f"{result[key] / rate:.2f}" for key, rate in zip(keys, rates, strict=True)))
    return table


def server_table(result: dict, checkpoint: str) -> Table:
    table = Table(title=f"{checkpoint}, output tokens per second, medians")
    for name in ("engine alone", "through Triton", "ratio"):
        table.add_column(name, justify="right")
    table.add_row(
        f"{result['engine_tokens_per_s']:.0f}", f"{result['server_tokens_per_s']:.0f}", f"{result['ratio']:.2f}"
    )
    return table


if __name__ == "__main__":
    sys.exit(main())
