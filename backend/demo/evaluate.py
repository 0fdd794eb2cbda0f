"""Measure a checkpoint: accuracy by family and form, perplexity by domain, routing, ablations.

python -m backend.demo.evaluate --checkpoint DIR [--data DIR] [--json FILE]

Accuracy and ablations run through the engine (backend.engine.llm.LLM), greedily, on held-out questions. Perplexity and
routing run in transformers, because the engine returns no log-probabilities of the prompt; they need --data for the
held-out text. `--parts transformers` answers the same questions with transformers for comparison.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from backend.demo.ablations import ablations, changed
from backend.demo.families import FAMILIES
from backend.demo.quality import accuracy, engine_answerer, mean, perplexity, transformers_answerer
from backend.demo.routing import Routing
from backend.demo.tasks import FORMS
from backend.errors import ConfigError

PARTS = ("accuracy", "perplexity", "routing", "ablations", "transformers")
_DEFAULT_PARTS = "accuracy,perplexity,routing,ablations"
_HIGH, _MIDDLE = 90.0, 60.0


def evaluate(
    checkpoint: Path, data: Path | None, parts: list[str], questions: int, few: int, seed: int, progress: Progress
) -> dict[str, object]:
    """The chosen parts' figures as JSON values. `few` questions a family go into comparisons and ablations."""
    result: dict[str, object] = {"checkpoint": checkpoint.name, "questions": questions, "seed": seed}

    def measure(title: str, folder: Path, number: int, forms: tuple[str, ...] = FORMS, engine: bool = True) -> dict:
        task = progress.add_task(title, total=len(FAMILIES))
        answerer = engine_answerer(folder) if engine else transformers_answerer(folder)
        return accuracy(answerer, number, forms, seed, lambda: progress.advance(task))

    if "accuracy" in parts:
        result["accuracy"] = measure("answers", checkpoint, questions)
    if "transformers" in parts:
        result["few"] = few
        result["transformers"] = measure("answers of transformers", checkpoint, few, engine=False)
        result["engine_few"] = measure("answers to the same", checkpoint, few)
    if "perplexity" in parts and data is not None:
        result["perplexity"] = perplexity(checkpoint, data)
    if "routing" in parts or "ablations" in parts:
        routing = Routing(checkpoint, data, seed=seed)
        if "routing" in parts:
            result["routing"] = routing.report(seed)
        if "ablations" in parts:
            rows = {"as trained": {form: mean(found) for form, found in measure("as trained", checkpoint, few).items()}}
            for name, (change, top_k) in ablations(routing).items():
                with changed(checkpoint, change, top_k) as folder:
                    rows[name] = {form: mean(found) for form, found in measure(name, folder, few).items()}
            result["few"], result["ablations"] = few, rows
    return result


def show(result: dict, console: Console) -> None:
    """Tables for people."""
    if "accuracy" in result:
        found = result["accuracy"]
        table = Table(title=f"Held-out accuracy, {result['questions']} questions a family and form")
        for column in ("family", "free answer %", "letter %"):
            table.add_column(column, justify="left" if column == "family" else "right")
        for family in FAMILIES:
            table.add_row(family, *(f"{found[form][family]:.0f}" for form in FORMS))
        table.add_section()
        table.add_row("mean", *(f"{mean(found[form]):.1f}" for form in FORMS))
        console.print(table)
        free = found["free"].values()
        high, middle = sum(value >= _HIGH for value in free), sum(_MIDDLE <= value < _HIGH for value in free)
        console.print(f"{high} families at {_HIGH:.0f} % or more, {middle} from {_MIDDLE:.0f} to {_HIGH:.0f} %")
    for domain, values in result.get("perplexity", {}).items():
        console.print(
            f"{domain}: perplexity {values['perplexity']:.1f} per token, {values['bits_per_byte']:.2f} bits per byte"
        )
    if "transformers" in result:
        for form in FORMS:
            ours, theirs = mean(result["engine_few"][form]), mean(result["transformers"][form])
            console.print(
                f"{form}: engine {ours:.1f} %, transformers {theirs:.1f} %, {result['few']} questions a family"
            )
    if "routing" in result:
        for key in (
            "least_used_times_uniform",
            "most_used_times_uniform",
            "active_experts_of_32_tokens",
            "output_cosine",
        ):
            console.print(f"{key}: {result['routing'][key]}")
        console.print(f"top-12 experts in common, by layer: {result['routing']['top12_in_common']}")
    if "ablations" in result:
        base = result["ablations"]["as trained"]
        table = Table(title=f"Ablations, {result['few']} questions a family and form (loss relative to as trained)")
        for column in ("change", "free %", "loss", "letter %", "loss"):
            table.add_column(column, justify="left" if column == "change" else "right")
        for name, row in result["ablations"].items():
            cells = [(f"{row[form]:.1f}", f"{100 * (1 - row[form] / max(base[form], 1e-9)):.0f} %") for form in FORMS]
            table.add_row(name, *(cell for pair in cells for cell in pair))
        console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="backend.demo.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--data", type=Path, help="folder of backend.demo.prepare, for held-out text")
    parser.add_argument(
        "--parts", default=_DEFAULT_PARTS, help=f"what to measure, of {','.join(PARTS)} (default {_DEFAULT_PARTS})"
    )
    parser.add_argument("--questions", type=int, default=50, help="questions a family and form (default 50)")
    parser.add_argument("--few", type=int, default=20, help="questions a family and form in comparisons (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the questions (default 0)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args(argv)
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts: unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if args.questions < 1 or args.few < 1:
        parser.error("--questions and --few must be at least 1")
    console = Console()
    try:
        with Progress(console=console, transient=True) as progress:
            result = evaluate(args.checkpoint, args.data, parts, args.questions, args.few, args.seed, progress)
    except (ConfigError, OSError) as error:
        console.print(f"[red]The checkpoint cannot be measured:[/red] {error}")
        return 1
    show(result, console)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"Wrote {args.json}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
