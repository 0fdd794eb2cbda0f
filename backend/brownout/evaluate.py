"""Measure the quality of a checkpoint under brownout, through the serving engine.

python -m backend.brownout.evaluate CHECKPOINT --grid united:2,4,8:0,0.4,0.8 --questions 25

Every point is measured with the same requests at the same batch composition (--batch sequences at once, families and domains
mixed). Beside the quality stands the share of assignments that replaced experts served; a point whose share is below 95 % of
what its thresholds give up is marked, since it cannot be compared with the others. What is measured: the demo's questions
(--questions), perplexity of held-out text (--text), multiple choice (--choices). The full model is always measured first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from backend.brownout import measure
from backend.brownout.calibration_text import read_calibration
from backend.brownout.fingerprint import checkpoint_fingerprint
from backend.brownout.points import SYNTAX, describe, parse_points
from backend.brownout.settings import Settings
from backend.engine.llm import LLM
from backend.errors import ConfigError

FORM_NAMES = {"free": "exact_match", "letter": "letter"}


@dataclass(frozen=True)
class Measures:
    """What is measured at every point; empty parts are left out."""

    questions: Sequence[measure.Asked] = ()
    text: measure.Text | None = None
    choices: Mapping[str, Sequence[measure.Choice]] | None = None
    shots: int = 0
    choice_limit: int | None = None
    batch: int = 32


def measure_point(
    llm: LLM,
    settings: Settings,
    measures: Measures,
    full: dict | None = None,
    by_layer: Sequence[float] | None = None,
) -> dict:
    """All measures under the settings as JSON values; with the `full` model's point also the losses against it.

    `by_layer`: thresholds of the MoE layers instead of the settings', whose thresholds should be their means.
    """
    if by_layer is None:
        measure.apply(llm, settings)
    else:
        measure.apply_by_layer(llm, settings, by_layer)
    values = asdict(settings)
    del values["version"]
    point: dict = {"settings": describe(settings), **values}
    if measures.questions:
        found = measure.ask(llm, measures.questions)
        for form, scores in found.pop("accuracy").items():
            point[FORM_NAMES[form]] = {"mean": sum(scores.values()) / len(scores), "by_task": scores}
        point["questions"] = found
    if measures.text is not None:
        point["text"] = measures.text.score(llm)
    for name, questions in (measures.choices or {}).items():
        limit, batch = measures.choice_limit, measures.batch
        found = measure.multiple_choice(llm, questions, measures.shots, batch, number=limit)
        point.setdefault("choices", {})[name] = found
    if full is not None:
        for name in FORM_NAMES.values():
            if name in point:
                point[name]["loss"] = measure.relative_loss(full[name]["by_task"], point[name]["by_task"])
        if "text" in point:
            change = {
                name: 100 * (value / full["text"]["perplexity"][name] - 1)
                for name, value in point["text"]["perplexity"].items()
            }
            point["text"]["increase_percent"] = change
        if "choices" in point:
            for kind in ("summed", "normalised"):
                scores = [{n: c[kind] for n, c in p["choices"].items()} for p in (full, point)]
                point[f"choices_{kind}_loss"] = measure.relative_loss(*scores)
    return point


def evaluate(
    llm: LLM, points: Sequence[Settings], measures: Measures, advance: Callable[[], None] = lambda: None
) -> list[dict]:
    """The full model, then every point."""
    results = [measure_point(llm, Settings(), measures)]
    advance()
    for settings in points:
        results.append(measure_point(llm, settings, measures, results[0]))
        advance()
    measure.apply(llm, Settings())
    return results


def show(results: Sequence[dict], console: Console) -> None:
    """A table for each kind of measure, one row a point; a star marks what is not comparable."""
    if "questions" in results[0]:
        rows = []
        for point in results:
            cells = []
            for name in FORM_NAMES.values():
                loss = point[name].get("loss", {"mean": 0.0, "worst": 0.0})
                cells += [f"{point[name]['mean']:.1f}", f"{loss['mean']:.1f}", f"{loss['worst']:.0f}"]
            rows.append((point, point["questions"], cells))
        columns = [column for name in FORM_NAMES.values() for column in (name.partition("_")[0], "loss", "worst")]
        console.print(_table("Demo questions: right answers, mean loss and that of the worst family, %", columns, rows))
    if "text" in results[0]:
        domains = list(results[0]["text"]["perplexity"])
        rows = [(p, p["text"], [f"{p['text']['perplexity'][name]:.2f}" for name in domains]) for p in results]
        console.print(_table("Perplexity", domains, rows))
        if "divergence" in results[0]["text"]:
            rows = [(p, p["text"], [f"{p['text']['divergence'][name]:.4f}" for name in domains]) for p in results]
            console.print(_table("Divergence from the full model, nats a token", domains, rows))
    for name in results[0].get("choices", {}):
        kinds = ("summed", "normalised")
        rows = [(p, p["choices"][name], [f"{p['choices'][name][kind]:.1f}" for kind in kinds]) for p in results]
        console.print(_table(f"Multiple choice: {name}", [f"{kind} %" for kind in kinds], rows))


def _table(title: str, columns: Sequence[str], rows: Sequence[tuple[Mapping, Mapping, list[str]]]) -> Table:
    """Rows of (point, composition, cells)."""
    table = Table(
        title=title,
        caption="repl.: replaced assignments, %; * below 95 % of nominal: not comparable",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("settings", no_wrap=True)
    for column in ("repl.", "slots", "assign.", *columns):
        table.add_column(column, justify="right")
    for point, steps, cells in rows:
        mark = "" if steps.get("comparable", True) else " *"
        share, slots = f"{100 * steps['united_share']:.1f}{mark}", f"{steps['active_slots']:.1f}"
        table.add_row(point["settings"], share, slots, f"{steps['assignments_per_token']:.2f}", *cells)
    return table


def add_measure_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that say what is measured and how; `open_engine` and `make_measures` read them."""
    parser.add_argument("checkpoint", type=Path, help="Hugging Face checkpoint folder, with its united experts")
    parser.add_argument(
        "--questions", type=int, default=0, help="questions of every family and form of the demo (default 0)"
    )
    parser.add_argument("--text", action="append", default=[], metavar="DOMAIN=FILE", help="held-out text of a domain (.txt, "
                        ".jsonl, .npy); may be given again")  # fmt: skip
    parser.add_argument("--text-tokens", type=int, default=16384, help="tokens of a domain (default %(default)s)")
    parser.add_argument("--text-window", type=int, default=257, help="longest stretch of text (default %(default)s)")
    parser.add_argument("--text-as", choices=("prefill", "decode"), default="prefill", help="score text in chunks under the "
                        "prefill threshold, or token by token under the decode threshold (default %(default)s)")  # fmt: skip
    parser.add_argument("--score-after", metavar="TOKEN", help="of a stretch of text with this token score only what follows the "
                        "last one (of chats: the answer)")  # fmt: skip
    parser.add_argument(
        "--divergence", action="store_true", help="also how far predictions over the text are from the full model's"
    )
    parser.add_argument("--choices", type=Path, action="append", default=[], metavar="FILE", help="multiple-choice questions, "
                        "JSONL of {question, choices, label}; may be given again")  # fmt: skip
    parser.add_argument("--shots", type=int, default=0, help="answered questions before each (default 0)")
    parser.add_argument("--choice-limit", type=int, help="questions of a file (default: all)")
    parser.add_argument("--batch", type=int, default=32, help="sequences at once (default %(default)s)")
    parser.add_argument("--single", action="store_true", help="domains and families one after another, not mixed: other "
                        "experts are then kept")  # fmt: skip
    parser.add_argument("--united", default="", help="united experts files (default: those in the checkpoint's folder)")
    parser.add_argument(
        "--similarity", default="", help="expert similarity file (default: that in the checkpoint's folder)"
    )
    parser.set_defaults(profile="")  # as it is served
    parser.add_argument("--dtype", default="auto", help="type of the weights (default: the checkpoint's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--widen-experts", type=int, default=1, help="repeat the experts' neurons so often (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the questions (default 0)")
    parser.add_argument("--json", type=Path, help="file to write the figures of all points to")


def open_engine(args: argparse.Namespace) -> LLM:
    """The engine that the arguments ask for, with --batch sequences running at most."""
    return LLM(
        str(args.checkpoint), united=args.united, similarity=args.similarity, device=args.device, dtype=args.dtype,
        max_running=args.batch, widen_experts=args.widen_experts, profile=args.profile,
    )  # fmt: skip


def write_points(args: argparse.Namespace, fingerprint: str, points: Sequence[dict]) -> None:
    """Write the figures of all points to the file that --json names."""
    content = {"checkpoint": args.checkpoint.resolve().name, "fingerprint": fingerprint, "batch": args.batch,
               "seed": args.seed, "questions": args.questions, "mixed": not args.single, "points": list(points)}  # fmt: skip
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(content, indent=2) + "\n")


def make_measures(args: argparse.Namespace, llm: LLM) -> Measures:
    """What the arguments ask for; raises ConfigError for unusable files and if nothing is asked for."""
    domains = {}
    for text in args.text:
        name, _, path = text.rpartition("=")
        name = name or Path(path).stem
        window = min(args.text_window, llm.engine.max_model_len)
        windows = read_calibration(
            [Path(path)], llm.tokenizer, llm.engine.vocab_size, args.text_tokens, window, args.seed
        )
        domains[name] = [ids for ids in windows if len(ids) > 1]
        if not domains[name]:
            raise ConfigError(f"text {path} is empty")
    choices = {path.stem: measure.read_choices(path) for path in args.choices}
    if not (args.questions or domains or choices):
        raise ConfigError("nothing to measure: give --questions, --text or --choices")
    mixed = not args.single
    questions = measure.demo_questions(llm, args.questions, args.seed, mixed) if args.questions else []
    after = None
    if args.score_after is not None:
        found = llm.tokenizer.encode(args.score_after, add_special_tokens=False)
        if len(found) != 1:
            raise ConfigError(
                f"--score-after must be one token of the checkpoint, {args.score_after!r} is {len(found)}"
            )
        after = found[0]
    text = measure.Text(domains, args.batch, args.text_as == "decode", mixed, after) if domains else None
    if args.divergence:
        if text is None:
            raise ConfigError("--divergence needs --text")
        text.keep_full(llm.engine.vocab_size)
    return Measures(questions, text, choices, args.shots, args.choice_limit, args.batch)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="backend.brownout.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_measure_arguments(parser)
    for name in ("--settings", "--grid"):
        parser.add_argument(
            name, action="extend", nargs="+", default=[], metavar="POINTS", help=f"points to measure: {SYNTAX}"
        )
    parser.add_argument("--profile", default="", help="profile with thresholds by layer, none: one threshold for all layers "
                        "(default: that in the checkpoint's folder)")  # fmt: skip
    args = parser.parse_args(argv)
    console = Console()
    try:
        points = parse_points(args.settings + args.grid)
        llm = open_engine(args)
        for settings in points:
            llm.engine.available.way_of(settings)  # names what is not loaded before anything is measured
        measures = make_measures(args, llm)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("points", total=len(points) + 1)
            results = evaluate(llm, points, measures, lambda: progress.advance(task))
        fingerprint = checkpoint_fingerprint(args.checkpoint)
    except (ConfigError, OSError) as error:
        console.print(f"[red]The checkpoint cannot be measured:[/red] {error}")
        return 1
    show(results, console)
    if args.json is not None:
        write_points(args, fingerprint, results)
        console.print(f"Wrote {args.json}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
