"""Write questions of all families as calibration text for backend.brownout.build.

python -m backend.demo.calibration --output FILE.jsonl

The questions are from the training side of the split, in the chat format and in both forms, one {"text": …} a line.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from backend.demo.families import FAMILIES, sample
from backend.demo.tasks import FORMS, in_form
from backend.demo.template import answer_text, prompt_text


def calibration_texts(number: int, seed: int) -> list[str]:
    """`number` questions with their answers of every family and form, in random order."""
    rng = random.Random(seed)
    texts = []
    for family in FAMILIES:
        for form in FORMS:
            for _ in range(number):
                prompt, answer = in_form(sample(family, rng), form, rng)
                texts.append(prompt_text(prompt) + answer_text(answer))
    rng.shuffle(texts)
    return texts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="backend.demo.calibration", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="file to write (.jsonl)")
    parser.add_argument("--questions", type=int, default=100, help="questions of every family and form (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default 0)")
    args = parser.parse_args(argv)
    if args.questions < 1 or args.output.suffix != ".jsonl":
        parser.error("--questions must be at least 1 and --output must end in .jsonl")
    texts = calibration_texts(args.questions, args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    print(f"Wrote {len(texts)} questions into {args.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
