"""Options that the demo and its study share."""

from __future__ import annotations

import argparse
from pathlib import Path

from loadtest.demo.burst import WIDEN


def add_shared(parser: argparse.ArgumentParser, output: str) -> None:
    """Options of one load on one machine; `output` is the default folder."""
    add = parser.add_argument
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="recorded arrivals, in place of the burst or beside it (docs/loads.md)",
    )
    add("--max-quality-loss", type=float, default=6.0, metavar="PERCENT", help="the most that dimming may cost at any moment "
        "(default %(default)s)")  # fmt: skip
    add(
        "--widen",
        type=int,
        default=WIDEN,
        metavar="N",
        help="repeat the experts' neurons N times (default %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of arrivals, lengths and prompts; further runs have the next ones (default 0)",
    )
    add("--output", type=Path, default=Path(output), help="folder for all that is written (default %(default)s)")


def check_shared(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with a message where a value makes no sense."""
    if args.widen < 1:
        parser.error(f"--widen must be at least 1, got {args.widen}")
    if not 0 <= args.max_quality_loss <= 100:
        parser.error(f"--max-quality-loss must be 0 … 100, got {args.max_quality_loss:g}")
    if args.trace and not args.trace.is_file():
        parser.error(f"--trace: there is no file {args.trace}")
