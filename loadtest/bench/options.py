"""Options that several benchmarks have."""

from __future__ import annotations

import argparse
from pathlib import Path

from backend.config import DTYPES
from backend.models.dummy import PREFIX, SHAPES
from loadtest.bench.budget import budget_seconds
from loadtest.bench.workload import Workload

#: What is measured unless something else is asked for.
DEFAULT_WORK = Workload(requests=32, prompt_tokens=128, new_tokens=128)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    return _at_least(text, 1)


def at_least_two(text: str) -> int:
    """A whole number of at least 2, for argparse."""
    return _at_least(text, 2)


def _at_least(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return number


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="write the figures to this file, as they come")


def add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget",
        type=budget_seconds,
        metavar="TIME",
        help="begin no new measurement after this time (90, 90s, 8m), and write what there is",
    )


def add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="type of the weights (default auto)")


def add_runs(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument(
        "--runs",
        type=positive,
        default=default,
        help=f"measured runs after one that warms up; medians are reported (default {default})",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=sorted(SHAPES), default="cpu-s", help="seeded random weights of this shape")
    model.add_argument("--checkpoint", help="a Hugging Face checkpoint folder")


def add_workload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--requests", type=positive, default=DEFAULT_WORK.requests, help="requests at once (default %(default)s)"
    )
    parser.add_argument(
        "--prompt-tokens", type=positive, default=DEFAULT_WORK.prompt_tokens, help="per request (default %(default)s)"
    )
    parser.add_argument(
        "--new-tokens",
        type=at_least_two,
        default=DEFAULT_WORK.new_tokens,
        help="made per request, at least 2 (default %(default)s)",
    )


def checkpoint_of(args: argparse.Namespace) -> str:
    return args.checkpoint or PREFIX + args.shape


def workload_of(args: argparse.Namespace) -> Workload:
    return Workload(requests=args.requests, prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens)
