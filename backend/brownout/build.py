"""Build the united experts of a checkpoint from calibration text.

python -m backend.brownout.build CHECKPOINT --way 2,4,8 --group output --calibration FILE…

Writes united-<way>.safetensors for every way, and expert-similarity.safetensors, into the output folder. The model is run
over the text layer by layer; the united experts of each layer are distilled from what its own experts gave; then, with
--end-to-end, those of all layers are trained together towards the full model's predictions. An interrupted build goes on
after the last finished layer when the same command is given again. Calibration files are .txt, .jsonl with "text" on each
line, or .npy with token ids.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from backend.brownout.builder import (
    BuildOptions,
    Built,
    build_united,
    check_input,
    check_memory,
    is_held_out,
    needed_bytes,
)
from backend.brownout.calibration_text import read_calibration
from backend.brownout.distill import DistillOptions
from backend.brownout.end_to_end import EndToEndOptions, end_to_end_bytes, train_end_to_end
from backend.brownout.fingerprint import checkpoint_fingerprint
from backend.brownout.grouping import GROUPINGS
from backend.brownout.similarity_file import FILE_NAME as SIMILARITY_FILE
from backend.brownout.similarity_file import write_similarity
from backend.brownout.united_file import write_united
from backend.engine.model_runner import resolve_device
from backend.errors import ConfigError
from backend.models import load_model
from backend.models.registry import read_config
from backend.tokenizer import TOKENIZER_FILES, load_tokenizer


def make_parser() -> argparse.ArgumentParser:
    defaults = DistillOptions()
    parser = argparse.ArgumentParser(
        prog="backend.brownout.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="Hugging Face checkpoint folder")
    parser.add_argument("--way", default="2,4,8", help="experts per united expert, one or a list (default %(default)s)")
    parser.add_argument("--group", choices=GROUPINGS, default="output", help="how experts are grouped: by number (the "
                        "paper), by likeness of outputs, or by being chosen together (default %(default)s)")  # fmt: skip
    parser.add_argument("--calibration", type=Path, nargs="+", required=True, metavar="FILE", help="calibration text")
    parser.add_argument("--output", type=Path, help="folder to write to (default: the checkpoint's)")
    parser.add_argument("--tokens", type=int, default=100_000, help="calibration tokens (default %(default)s)")
    parser.add_argument("--window", type=int, default=256, help="longest stretch of text run as one sequence, in tokens "
                        "(default %(default)s)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=defaults.steps, help="distillation steps per layer; 0: averaged "
                        "members (default %(default)s)")  # fmt: skip
    parser.add_argument("--rows", type=int, default=defaults.rows, help="tokens of a group in a distillation step "
                        "(default %(default)s)")  # fmt: skip
    parser.add_argument("--rate", type=float, default=defaults.rate, help="step size relative to the weights (default "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--init", choices=("aligned", "mean"), default=defaults.init, help="whether members' neurons are "
                        "matched before they are averaged (default %(default)s)")  # fmt: skip
    parser.add_argument("--loss", choices=("chosen", "mean"), default=defaults.loss, help="imitate the members that a token "
                        "chose, or the mean of all members (the paper; default %(default)s)")  # fmt: skip
    parser.add_argument("--end-to-end", type=int, default=0, metavar="STEPS", help="steps of training all layers together; "
                        "the ways take turns (default %(default)s: none)")  # fmt: skip
    parser.add_argument("--end-to-end-tokens", type=int, default=EndToEndOptions.tokens, metavar="N", help="tokens of such a "
                        "step (default %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for finished layers; kept if named (default: in the output folder, "
                        "removed at the end)")  # fmt: skip
    return parser


def build(args: argparse.Namespace, ways: tuple[int, ...], console: Console) -> Built:
    """Run the build that the arguments ask for and write its files."""
    fingerprint = checkpoint_fingerprint(args.checkpoint)
    config = read_config(args.checkpoint)
    has_tokenizer = any((args.checkpoint / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = load_tokenizer(str(args.checkpoint), config.vocab_size) if has_tokenizer else None
    windows = read_calibration(args.calibration, tokenizer, config.vocab_size, args.tokens, args.window, args.seed)
    distill = DistillOptions(args.steps, args.rows, args.rate, args.init, args.loss)
    options = BuildOptions(ways, args.group, args.seed, distill)
    check_input(config, windows, options)
    model = load_model(str(args.checkpoint), device=resolve_device(args.device), united="none", similarity="none")
    tokens = sum(map(len, windows))
    needed = needed_bytes(model, tokens, options)
    last = EndToEndOptions(args.end_to_end, args.end_to_end_tokens, seed=args.seed)
    if last.steps:
        groups = sum(-(-config.num_experts // way) for way in ways) * sum(config.moe_layers)
        needed = max(needed, end_to_end_bytes(model, groups * 3 * config.expert_size * config.hidden_size, last))
    console.print(
        f"{tokens} calibration tokens; needs up to {needed / 2**20:.0f} MiB beside the model's "
        f"{model.weight_bytes() / 2**20:.0f} MiB on {model.device}"
    )
    check_memory(model, needed)
    output = args.output or args.checkpoint
    work = args.work or output / "united-work"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("distillation", total=max(1, args.steps) * len(ways) * sum(config.moe_layers))
        built = build_united(model, fingerprint, windows, options, work, lambda n: progress.advance(task, n))
        if last.steps:
            task_2 = progress.add_task("end to end", total=last.steps)
            sides = [[w for i, w in enumerate(windows) if is_held_out(i) == side] for side in (False, True)]
            built.united = train_end_to_end(model, built.united, *sides, last, lambda n: progress.advance(task_2, n))
    similarity = output / SIMILARITY_FILE
    write_similarity(similarity, fingerprint, built.similarity)
    console.print(f"Wrote {similarity} ({similarity.stat().st_size / 1e6:.2f} MB).")
    for way, united in built.united.items():
        path = output / f"united-{way}.safetensors"
        write_united(path, united)
        console.print(f"Wrote {path} ({path.stat().st_size / 1e6:.2f} MB).")
    if args.work is None:
        shutil.rmtree(work, ignore_errors=True)
    return built


def show(built: Built, console: Console) -> None:
    """The error of every layer and way on held-out tokens, beside that of averaged members."""
    table = Table(title="Squared error on held-out tokens, % of the squared outputs (100: dropped)")
    table.add_column("layer")
    for way in built.united:
        table.add_column(f"{way}-way averaged", justify="right")
        table.add_column("distilled", justify="right")
    for layer in map(str, next(iter(built.united.values())).layers):
        reports = [united.report[layer] for united in built.united.values()]
        table.add_row(layer, *(f"{100 * r[key]:.1f}" for r in reports for key in ("averaged_error", "relative_error")))
    console.print(table)
    for way, united in built.united.items():
        if (last := united.report.get("end_to_end")) is not None:
            console.print(
                f"{way}-way, all layers at threshold 0: divergence from the full model {last['divergence_before']:.4f} nats a "
                f"token before the training end to end, {last['divergence_after']:.4f} after it (held-out text)"
            )


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        ways = tuple(dict.fromkeys(int(way) for way in args.way.split(",")))
    except ValueError:
        parser.error(f"--way must be a number or a comma-separated list of numbers, got {args.way!r}")
    for name, least in (
        ("tokens", 1),
        ("window", 2),
        ("rows", 1),
        ("steps", 0),
        ("end_to_end", 0),
        ("end_to_end_tokens", 1),
    ):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    console = Console()
    try:
        built = build(args, ways, console)
    except (ConfigError, OSError) as error:
        console.print(f"[red]The united experts cannot be built:[/red] {error}")
        return 1
    show(built, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
