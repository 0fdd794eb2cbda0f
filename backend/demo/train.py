"""Train the demo model: first dense, then upcycled to experts and trained on.

python -m backend.demo.train dense --data DIR --run DIR [--steps N] [--minutes M]
python -m backend.demo.train experts --data DIR --run DIR --dense DIR [--steps N] [--minutes M]

A run folder holds state.pt (everything needed to go on) and log.jsonl. The same command goes on where it was stopped;
a run on a CPU that was interrupted ends with the same weights as one that was not. --minutes stops a run by its own
training time, and the learning rate then falls with whichever of steps and minutes is further along.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from backend.demo.batches import BatchMaker, BatchSizes
from backend.demo.model import Shape
from backend.demo.tokenizer import load_tokenizer
from backend.demo.trainer import Schedule, Trainer


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="backend.demo.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    phases = parser.add_subparsers(dest="phase", required=True)
    for name, about in (("dense", "one FFN a layer"), ("experts", "upcycle a dense run and train the experts")):
        phase = phases.add_parser(name, help=about, description=about)
        phase.add_argument("--data", type=Path, required=True, help="folder written by backend.demo.prepare")
        phase.add_argument("--run", type=Path, required=True, help="run folder; a run in it is continued")
        phase.add_argument("--steps", type=int, default=4000, help="steps in all (default 4000)")
        phase.add_argument("--minutes", type=float, help="training time after which to stop, over all continuations")
        phase.add_argument("--decay-start", type=float, default=1.0 if name == "dense" else 0.0,
                           help="share of the run after which the learning rate falls (default %(default)s)")  # fmt: skip
        phase.add_argument(
            "--decay-end", type=float, default=0.02, help="last learning rate, relative (default %(default)s)"
        )
        phase.add_argument("--warmup", type=int, default=100, help="steps of rising learning rate (default 100)")
        phase.add_argument(
            "--muon-lr", type=float, default=0.01, help="learning rate of matrices (default %(default)s)"
        )
        phase.add_argument(
            "--adam-lr", type=float, default=0.003, help="learning rate of the rest (default %(default)s)"
        )
        phase.add_argument("--text-rows", type=int, default=6, help="rows of text in a batch (default 6)")
        phase.add_argument("--text-length", type=int, default=256, help="tokens of a text row (default 256)")
        phase.add_argument("--question-rows", type=int, default=24, help="rows of questions in a batch (default 24)")
        phase.add_argument(
            "--question-length", type=int, default=128, help="tokens of a row of questions (default 128)"
        )
        phase.add_argument("--drill-rows", type=int, default=1, help="question rows that drill repetition (default 1)")
        phase.add_argument(
            "--letter-share", type=float, default=0.35, help="share of questions with options (default 0.35)"
        )
        phase.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default 0)")
        phase.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
        phase.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                           help="type of the matmuls; weights stay float32 (default %(default)s)")  # fmt: skip
        phase.add_argument("--threads", type=int, help="processor threads (default: torch's choice)")
        phase.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
        phase.add_argument("--save-every", type=int, default=100, help="steps between saved states (default 100)")
        phase.add_argument("--hidden", type=int, default=192, help="hidden size (default 192)")
        phase.add_argument("--layers", type=int, default=4, help="layers (default 4)")
        phase.add_argument("--heads", type=int, default=6, help="attention heads (default 6)")
        phase.add_argument("--experts", type=int, default=60, help="experts of a layer (default 60)")
        phase.add_argument("--expert-size", type=int, default=32, help="intermediate size of an expert (default 32)")
        phase.add_argument(
            "--shared-size", type=int, default=32, help="intermediate size of the shared expert (default 32)"
        )
        if name == "experts":
            phase.add_argument("--dense", type=Path, required=True, help="run folder of the dense phase")
            phase.add_argument(
                "--noise", type=float, default=0.15, help="relative noise on copied experts (default 0.15)"
            )
            phase.add_argument("--expert-lr-scale", type=float, default=0.3,
                               help="learning rate of routed experts, relative to other matrices (default %(default)s)")  # fmt: skip
            phase.add_argument("--balance", type=float, default=0.01, help="weight of the balance loss (default 0.01)")
            phase.add_argument("--fewer-share", type=float, default=0.1,
                               help="share of steps that use only 2 experts a token (default %(default)s)")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    console = Console()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        vocab_size = load_tokenizer(args.data).get_vocab_size()
    except FileNotFoundError as error:
        parser.error(f"--data: {error}; run backend.demo.prepare first")
    if args.hidden % args.heads:
        parser.error("--hidden must be a multiple of --heads")
    if not 0 <= args.drill_rows < args.question_rows:
        parser.error(f"--drill-rows must be from 0 to less than --question-rows ({args.question_rows})")
    top_k = 4
    shape = Shape(
        vocab_size, args.hidden, args.layers, args.heads, args.experts, top_k, args.expert_size,
        dense_size=top_k * args.expert_size, shared_size=args.shared_size,
    )  # fmt: skip
    schedule = Schedule(
        args.steps, args.minutes, args.warmup, args.decay_start, args.decay_end, args.muon_lr, args.adam_lr,
        getattr(args, "expert_lr_scale", 1.0), getattr(args, "balance", 0.0), getattr(args, "fewer_share", 0.0),
    )  # fmt: skip
    maker = BatchMaker(
        args.data,
        BatchSizes(
            args.text_rows, args.text_length, args.question_rows, args.question_length, args.drill_rows, args.letter_share
        ),
        args.seed if args.phase == "dense" else args.seed + 1_000_003,
    )  # fmt: skip
    trainer = Trainer(
        shape, schedule, maker, args.run, args.device, args.seed, not args.no_compile, args.dtype == "bfloat16"
    )
    if trainer.can_continue:
        trainer.restore()
    elif args.phase == "dense":
        trainer.start_dense()
    else:
        if not (args.dense / "state.pt").is_file():
            parser.error(f"--dense: there is no state.pt in {args.dense}")
        trainer.start_experts(args.dense, args.noise)
    console.print(f"{args.phase}: step {trainer.step} of {args.steps}, {asdict(shape)}")
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(args.phase, total=1.0, completed=trainer.progress, note="")
        while not trainer.finished:
            record = trainer.train_step()
            progress.update(task, completed=trainer.progress, note=f"step {trainer.step} loss {record['loss']:.3f}")
            if trainer.step % args.save_every == 0:
                trainer.save()
    trainer.save()
    console.print(f"Wrote {args.run / 'state.pt'} and {args.run / 'log.jsonl'} after {trainer.step} steps.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
