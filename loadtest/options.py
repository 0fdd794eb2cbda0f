"""The options of a load run, shared by `python -m loadtest.run` and Locust, and what they make."""

from __future__ import annotations

import argparse
from pathlib import Path

from backend.tokenizer import DUMMY_PREFIX, Tokenizer, load_tokenizer
from loadtest.load_spec import HELP, build_schedule
from loadtest.prompts import FilePrompts, GeneratedPrompts, Prompts
from loadtest.record import Slo
from loadtest.results import RunInfo, RunSummary, why_invalid
from loadtest.schedule import Schedule


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what to send."""
    add = parser.add_argument
    add("--arrivals", default="step:base=2,duration=60", help=f"the load, {HELP}")
    add("--seed", type=int, default=0, help="seed of times, lengths and prompts")
    add("--input-tokens", default="128", metavar="N[-M]", help="prompt length: tokens, or bounds to draw between")
    add("--output-tokens", default="64", metavar="N[-M]", help="answer length: tokens, or bounds to draw between")
    add("--never-share", type=float, default=0.0, help="share of requests that are exempt from brownout")
    add("--prompts", default="", metavar="FILE", help='JSON lines with "text" to use as prompts')
    add(
        "--checkpoint",
        default="",
        metavar="NAME",
        help="the served checkpoint: its tokenizer makes prompt lengths exact",
    )
    add("--slo-ttft", type=float, default=1.0, metavar="S", help="promised time to the first token")
    add("--slo-itl", type=float, default=0.1, metavar="S", help="promised time between tokens")
    add("--record", default="", metavar="FILE", help="file for the records (JSON lines); a summary goes beside it")
    add("--name", default="", help="what the run is called in reports")


def plan_load(args: argparse.Namespace, arrivals: str | None = None) -> tuple[Schedule, RunInfo]:
    """What the options ask for; `arrivals` replaces the option of that name. The run's start is filled in later.

    Raises:
        ConfigError: what is wrong and what is allowed.
    """
    spec = arrivals or args.arrivals
    schedule = build_schedule(
        spec,
        seed=args.seed,
        input_tokens=args.input_tokens,
        output_tokens=args.output_tokens,
        never_share=args.never_share,
    )
    name = args.name or (Path(args.record).stem if args.record else "run")
    slo = Slo(ttft_s=args.slo_ttft, itl_s=args.slo_itl)
    return schedule, RunInfo.of(schedule, name=name, arrivals=spec, seed=args.seed, slo=slo)


def make_prompts(args: argparse.Namespace) -> Prompts:
    """Prompts from the file if one is named, else generated; raises ConfigError for an unusable file or checkpoint."""
    if args.prompts:
        return FilePrompts(Path(args.prompts), args.seed)
    return GeneratedPrompts(args.seed, _tokenizer(args.checkpoint) if args.checkpoint else None)


def _tokenizer(checkpoint: str) -> Tokenizer:
    if not checkpoint.startswith(DUMMY_PREFIX):
        return load_tokenizer(checkpoint, None)
    from backend.models.dummy import raw_config  # here because it imports torch

    return load_tokenizer(checkpoint, raw_config(checkpoint)["vocab_size"])


def describe(summary: RunSummary) -> list[str]:
    """The run in a few lines of text."""
    r, slo = summary.result, summary.run.slo
    lines = [
        f"{r.requests} requests: {r.completed} completed, {r.rejected} rejected, {r.failed} failed; "
        f"{r.output_tokens_per_s:.0f} output tokens/s",
        f"first token p50 {ms(r.ttft_p50_s)}, p99 {ms(r.ttft_p99_s)}; promised {ms(slo.ttft_s)}: "
        f"{percent(r.ttft_violation_ratio)} of requests late",
        f"between tokens p50 {ms(r.itl_p50_s)}, p99 {ms(r.itl_p99_s)}; promised {ms(slo.itl_s)}: "
        f"{percent(r.itl_violation_ratio)} of tokens late",
        f"{percent(r.violating_seconds_ratio)} of seconds broke a promise",
    ]
    if not summary.valid:
        lines.append(f"INVALID: {why_invalid(summary)}")
    return lines


def ms(seconds: float | None) -> str:
    """A time for people: milliseconds, or seconds from one on."""
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def percent(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1%}"
