"""Training batches: rows of text, and rows filled with questions and answers, made anew for every step from its number."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from backend.demo.corpus import DOMAINS
from backend.demo.families import FAMILIES, sample
from backend.demo.tasks import in_form
from backend.demo.template import END_OF_TEXT, answer_text, prompt_text
from backend.demo.tokenizer import load_tokenizer
from backend.demo.words import LETTERS

FAMILY_NAMES = tuple(FAMILIES)
TEXT, DRILL = -1, len(FAMILY_NAMES)
#: Share of text rows by domain, where the domain has text.
DOMAIN_SHARES = {"prose": 0.32, "docs": 0.20, "code": 0.20, "chat": 0.13, "math": 0.15}


@dataclass(frozen=True)
class BatchSizes:
    """How a batch is made up: rows of text, and shorter rows that questions fill, `letter_share` of them in letter form."""

    text_rows: int = 6
    text_length: int = 256
    question_rows: int = 24
    question_length: int = 128
    #: Of the question rows, those that hold a drill instead.
    drill_rows: int = 1
    letter_share: float = 0.35
    answer_weight: float = 2.5


@dataclass(frozen=True)
class Batch:
    """Arrays of one step. Targets are given by position in the flat text rows, then question rows.

    A target's family is TEXT, the number of its question's family, or DRILL.
    """

    text: np.ndarray  # [text rows, text length] int64
    questions: np.ndarray  # [question rows, question length] int64
    documents: np.ndarray  # like questions: the question's number, 0 where the row is not filled
    positions: np.ndarray  # [targets] int64
    targets: np.ndarray  # [targets] int64
    weights: np.ndarray  # [targets] float32
    families: np.ndarray  # [targets] int64


class BatchMaker:
    """Batches from a folder that `prepare` wrote. The same seed, step and mix give the same batch."""

    def __init__(self, data: Path, sizes: BatchSizes, seed: int) -> None:
        self.sizes, self.seed = sizes, seed
        self.tokenizer: Tokenizer = load_tokenizer(data)
        self.end_of_text = self.tokenizer.token_to_id(END_OF_TEXT)
        self.letters = [self.tokenizer.encode(f" {letter}").ids[-1] for letter in (*LETTERS, *"0123456789")]
        self.texts = {}
        for domain in DOMAINS:
            path = data / f"{domain}.train.npy"
            tokens = np.load(path) if path.is_file() else np.zeros(0, np.uint16)
            if len(tokens) > sizes.text_length + 1:
                self.texts[domain] = tokens

    def make(self, step: int, mix: Mapping[str, float]) -> Batch:
        """The batch of a step; `mix` is how often each family is asked."""
        rng = random.Random(f"{self.seed} {step}")
        sizes = self.sizes
        length = sizes.text_length
        text = np.full((sizes.text_rows if self.texts else 0, length), self.end_of_text, np.int64)
        questions = np.full((sizes.question_rows, sizes.question_length), self.end_of_text, np.int64)
        documents = np.zeros_like(questions)
        positions, targets, weights, families = [], [], [], []
        shares = [DOMAIN_SHARES[domain] for domain in self.texts]
        for row in range(len(text)):
            tokens = self.texts[rng.choices(list(self.texts), shares)[0]]
            start = rng.randrange(len(tokens) - length)
            piece = tokens[start : start + length + 1].astype(np.int64)
            text[row] = piece[:-1]
            positions.append(np.arange(length) + row * length)
            targets.append(piece[1:])
            weights.append(np.ones(length, np.float32))
            families.append(np.full(length, TEXT))
        offsets = range(text.size, text.size + questions.size, sizes.question_length)
        for row in range(sizes.drill_rows):
            self._drill(rng, questions[row])
            half = sizes.question_length // 2
            documents[row] = 1
            positions.append(np.arange(half, sizes.question_length - 1) + offsets[row])
            targets.append(questions[row, half + 1 :].copy())
            weights.append(np.ones(half - 1, np.float32))
            families.append(np.full(half - 1, DRILL))
        room = [0] * sizes.drill_rows + [sizes.question_length] * (sizes.question_rows - sizes.drill_rows)
        for number, (family, prompt, answer) in enumerate(self._questions(rng, mix)):
            wanted = len(prompt) + len(answer) - 1  # the last token is only a target
            row = next((i for i, left in enumerate(room) if left >= wanted), None)
            if row is None:
                continue
            start = sizes.question_length - room[row]
            room[row] -= wanted
            questions[row, start : start + wanted] = (prompt + answer)[:-1]
            documents[row, start : start + wanted] = number + 1
            first = offsets[row] + start + len(prompt) - 1
            positions.append(np.arange(len(answer)) + first)
            targets.append(np.array(answer))
            weights.append(np.full(len(answer), sizes.answer_weight, np.float32))
            families.append(np.full(len(answer), family))
        joined = (np.concatenate(part) for part in (positions, targets, weights, families))
        return Batch(text, questions, documents, *joined)

    def _drill(self, rng: random.Random, row: np.ndarray) -> None:
        """Fill a row with tokens drawn by chance and the same again: attention learns to look up what followed before."""
        half = len(row) // 2
        kinds = self.letters if rng.random() < 0.5 else range(4, self.tokenizer.get_vocab_size())
        row[:half] = row[half : 2 * half] = rng.choices(kinds, k=half)

    def _questions(self, rng: random.Random, mix: Mapping[str, float]) -> list[tuple[int, list[int], list[int]]]:
        """(family number, prompt ids, answer ids) that about fill the rows."""
        made: list[tuple[int, list[int], list[int]]] = []
        weights = [mix[name] for name in FAMILY_NAMES]
        room = (self.sizes.question_rows - self.sizes.drill_rows) * self.sizes.question_length
        while room > 0:
            chosen = rng.choices(range(len(FAMILY_NAMES)), weights, k=64)
            texts = []
            for family in chosen:
                form = "letter" if rng.random() < self.sizes.letter_share else "free"
                prompt, answer = in_form(sample(FAMILY_NAMES[family], rng), form, rng)
                texts += [prompt_text(prompt), answer_text(answer)]
            encoded = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
            made += list(zip(chosen, encoded[::2], encoded[1::2], strict=True))
            room -= sum(map(len, encoded))
        return made


def family_mix(losses: Mapping[str, float], floor: float = 0.12) -> dict[str, float]:
    """How often to ask each family: by its running answer loss, so that what is not yet learned is asked more."""
    return {name: min(1.0, losses.get(name, 1.0)) + floor for name in FAMILY_NAMES}
