"""Make the training data: a tokenizer, and each domain's text as token ids, held-out documents apart.

python -m backend.demo.prepare --output DIR [--corpus DIR]

Writes tokenizer files, <domain>.train.npy and <domain>.held_out.npy (uint16 token ids) and data.json into the folder.
Without --corpus the text is this Python's own sources and docstrings and made-up chat and sums; there is no prose then.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from backend.demo import corpus
from backend.demo.families import FAMILIES, sample
from backend.demo.tasks import FORMS, in_form
from backend.demo.template import END_OF_TEXT, prompt_text
from backend.demo.tokenizer import save_tokenizer, train_tokenizer

#: Tokenizer training text, in characters: of each domain, and questions of each family and form.
_SAMPLE_CHARACTERS = 2_000_000
_SAMPLE_QUESTIONS = 800


def tokenizer_texts(texts: dict[str, list[str]], seed: int) -> list[str]:
    """What the tokenizer is trained on: some of every domain, and many questions, so that their words are one token."""
    chosen: list[str] = []
    for domain in texts:
        left = _SAMPLE_CHARACTERS
        for text in texts[domain]:
            if left <= 0:
                break
            chosen.append(text)
            left -= len(text)
    rng = random.Random(f"tokenizer {seed}")
    for family in FAMILIES:
        for form in FORMS:
            for _ in range(_SAMPLE_QUESTIONS):
                prompt, answer = in_form(sample(family, rng), form, rng)
                chosen.append(f"{prompt_text(prompt)} {answer}")
    return chosen


def token_ids(tokenizer: Tokenizer, texts: list[str], limit: int) -> np.ndarray:
    """The documents' ids one after another, each ended by <|endoftext|>, cut at `limit` tokens."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for start in range(0, len(texts), 64):
        for encoding in tokenizer.encode_batch(texts[start : start + 64]):
            ids += encoding.ids
            ids.append(end)
        if len(ids) >= limit:
            break
    return np.array(ids[:limit], dtype=np.uint16)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="backend.demo.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--corpus", type=Path, help='folder with <domain>/*.jsonl of {"text"} documents')
    parser.add_argument("--vocab-size", type=int, default=3072, help="tokens in the vocabulary (default 3072)")
    parser.add_argument(
        "--max-tokens", type=int, default=4_000_000, help="training tokens kept of a domain (default 4000000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the document order (default 0)")
    args = parser.parse_args(argv)
    if args.corpus is not None and not args.corpus.is_dir():
        parser.error(f"--corpus: there is no folder {args.corpus}")
    if args.vocab_size < 512 or args.vocab_size > 65_535:
        parser.error(f"--vocab-size must be from 512 to 65535, got {args.vocab_size}")
    console = Console()
    args.output.mkdir(parents=True, exist_ok=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("reading text", total=2 * len(corpus.DOMAINS) + 1)
        sides: dict[str, dict[str, list[str]]] = {}
        for domain in corpus.DOMAINS:
            texts = corpus.documents(domain, args.corpus, args.seed)
            held_out = [text for text in texts if corpus.is_held_out(text)]
            sides[domain] = {"train": [text for text in texts if not corpus.is_held_out(text)], "held_out": held_out}
            progress.advance(task)
        progress.update(task, description="training the tokenizer")
        train = {domain: side["train"] for domain, side in sides.items()}
        tokenizer = train_tokenizer(tokenizer_texts(train, args.seed), args.vocab_size)
        save_tokenizer(tokenizer, args.output)
        progress.advance(task)
        counts: dict[str, dict[str, int]] = {}
        for domain, side in sides.items():
            progress.update(task, description=f"tokenizing {domain}")
            for name, texts in side.items():
                ids = token_ids(tokenizer, texts, args.max_tokens if name == "train" else args.max_tokens // 10)
                np.save(args.output / f"{domain}.{name}.npy", ids)
                counts.setdefault(domain, {})[name] = len(ids)
            progress.advance(task)
    record = {"vocab_size": tokenizer.get_vocab_size(), "seed": args.seed, "tokens": counts}
    (args.output / "data.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print_json(json.dumps(record))
    console.print(f"Wrote the tokenizer and the domains' tokens into {args.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
