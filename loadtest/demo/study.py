"""Laws against loads: every law meets the same arrivals several times, always on a fresh server.

python -m loadtest.demo.study --output results/study --runs 3 [--trace FILE]

Rates and promises come from the machine, as in the demo. Writes every run's records, study.json and a table in Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
from rich.console import Console

from backend.brownout.profile import PROFILE_NAME, read_profile
from backend.config import DEMO, DEMO_CHECKPOINT
from backend.errors import ConfigError, UnavailableError
from backend.serving.launch_client import running_server
from backend.tokenizer import load_tokenizer
from controller.laws import LAWS
from loadtest.control_log import read_course
from loadtest.demo.burst import (
    BurstShape,
    Ground,
    burst_schedule,
    measure_ground,
    run_against_fresh_server,
    trace_schedule,
)
from loadtest.demo.options import add_shared, check_shared
from loadtest.demo.questions import ConversationPrompts
from loadtest.load_spec import build_schedule
from loadtest.options import ms, percent
from loadtest.quality import Quality, quality_of_run
from loadtest.results import RunSummary
from loadtest.schedule import Schedule

#: Loads besides the demo's burst and a trace; rates are multiples of capacity, S is the duration in seconds.
_LOADS = {
    "spike": lambda c, s: f"spike:base={0.5 * c:.4f},peak={2 * c:.4f},width=4,every=20,duration={s:g}",
    "diurnal": lambda c, s: f"diurnal:rate={0.8 * c:.4f},swing=0.6,duration={s:g}",
}


class StudyRun(msgspec.Struct, kw_only=True):
    """One run: its load and law, what came of it, and what its thresholds cost."""

    load: str
    law: str
    number: int
    summary: RunSummary
    quality: Quality | None


def schedules(ground: Ground, shape: BurstShape, trace: Path | None, seed: int) -> dict[str, tuple[str, Schedule]]:
    """The loads by name."""
    found = {"step": burst_schedule(ground, shape, seed)}
    duration = found["step"][1].duration_s
    for name, spec_of in _LOADS.items():
        spec = spec_of(ground.capacity_rps, duration)
        found[name] = (
            spec,
            build_schedule(spec, seed=seed, input_tokens=shape.input_tokens, output_tokens=shape.output_tokens),
        )
    if trace:
        found["trace"] = trace_schedule(trace, ground, shape, seed)
    return found


def markdown(runs: list[StudyRun]) -> str:
    """Medians over runs, with the least and the most in brackets."""
    rows: list[tuple[str, Callable[[StudyRun], float | None], Callable[[float | None], str]]] = [
        ("late first tokens", lambda r: r.summary.result.ttft_violation_ratio, percent),
        ("late tokens", lambda r: r.summary.result.itl_violation_ratio, percent),
        ("seconds that broke a promise", lambda r: r.summary.result.violating_seconds_ratio, percent),
        ("first token p99", lambda r: r.summary.result.ttft_p99_s, ms),
        ("between tokens p99", lambda r: r.summary.result.itl_p99_s, ms),
        ("united share", lambda r: r.summary.result.united_share, percent),
        ("quality lost", lambda r: (r.quality.mean_loss_percent if r.quality else 0.0) / 100, percent),
    ]
    lines = ["| load | law | " + " | ".join(title for title, _, _ in rows) + " |", "|---|---|" + "---|" * len(rows)]
    for load, law in dict.fromkeys((run.load, run.law) for run in runs):
        own = [run for run in runs if (run.load, run.law) == (load, law)]
        cells = [_spread([value_of(run) for run in own], text) for _, value_of, text in rows]
        lines.append(f"| {load} | {law} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float | None], text: Callable[[float | None], str]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    middle = text(statistics.median(known))
    return middle if len(known) == 1 else f"{middle} ({text(min(known))} … {text(max(known))})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="loadtest.demo.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--runs", type=int, default=3, help="runs of every load and law (default 3)")
    add("--laws", default=",".join(["off", *(name for name in LAWS if name != "off")]), help="default %(default)s")
    add("--loads", default="", help=f"of step, {', '.join(_LOADS)} and trace (default: all)")
    add_shared(parser, "results/study")
    args = parser.parse_args(argv)
    check_shared(parser, args)
    laws, wanted = args.laws.split(","), args.loads.split(",") if args.loads else None
    for law in laws:
        if law not in LAWS:
            parser.error(f"--laws: {law!r} is none of {', '.join(LAWS)}")
    if args.runs < 1:
        parser.error(f"--runs must be at least 1, got {args.runs}")
    try:
        _study(args, laws, wanted, Console())
    except (ConfigError, UnavailableError) as error:
        parser.exit(1, f"{error}\n")
    return 0


def _study(args: argparse.Namespace, laws: list[str], wanted: list[str] | None, console: Console) -> None:
    env = {"MOE_LLM_CHECKPOINT": DEMO, "MOE_LLM_WIDEN_EXPERTS": str(args.widen)}
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(str(DEMO_CHECKPOINT), None)
    profile = read_profile(DEMO_CHECKPOINT / PROFILE_NAME)
    shape = BurstShape()
    with running_server(env=env, log=args.output / "ground.server.log") as server:
        ground = asyncio.run(
            measure_ground(server, partial(ConversationPrompts, tokenizer=tokenizer), shape, args.seed, console)
        )
    console.print(
        f"Capacity {ground.capacity_rps:.1f} requests/s, promises {ms(ground.slo.ttft_s)} and {ms(ground.slo.itl_s)}"
    )
    runs: list[StudyRun] = []
    for number in range(args.runs):
        seed = args.seed + number
        prompts = ConversationPrompts(seed, tokenizer)
        loads = schedules(ground, shape, args.trace, seed)
        if wanted and (unknown := set(wanted) - set(loads)):
            raise ConfigError(f"--loads: {', '.join(sorted(unknown))} is none of {', '.join(loads)}")
        for load in wanted or loads:
            for law in laws:
                name = f"{load}-{law}-{number}"
                summary, records = run_against_fresh_server(
                    name,
                    loads[load],
                    ground.slo,
                    prompts,
                    seed=seed,
                    env=env,
                    folder=args.output,
                    law=None if law == "off" else law,
                    max_loss_percent=args.max_quality_loss,
                    console=console,
                )
                quality = quality_of_run(records, read_course(args.output / f"{name}.jsonl"), profile)
                runs.append(StudyRun(load=load, law=law, number=number, summary=summary, quality=quality))
                console.print(f"{name}: {_in_short(summary)}", highlight=False)
        _write(args.output, ground, runs)
    console.print(f"Wrote {args.output / 'study.json'} and {args.output / 'study.md'}.")


def _in_short(summary: RunSummary) -> str:
    r = summary.result
    late = f"late first tokens {percent(r.ttft_violation_ratio)}, late tokens {percent(r.itl_violation_ratio)}"
    return late if summary.valid else f"{late}, INVALID"


def _write(folder: Path, ground: Ground, runs: list[StudyRun]) -> None:
    """All runs so far, and the table of them."""
    content = {"ground": msgspec.to_builtins(ground), "runs": msgspec.to_builtins(runs)}
    (folder / "study.json").write_text(json.dumps(content, indent=2) + "\n")
    (folder / "study.md").write_text(markdown(runs))


if __name__ == "__main__":
    sys.exit(main())
