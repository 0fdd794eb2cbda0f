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

FAMILY_NAMES = tuple(FAMILIES)
#: Share of text rows by domain, where the domain has text.
DOMAIN_SHARES = {"prose": 0.32, "docs": 0.20, "code": 0.20, "chat": 0.13, "math": 0.15}


@dataclass(frozen=True)
class BatchSizes:
    """How a batch is made up. `text_share` of the rows are text; `letter_share` of the questions are in letter form."""

    rows: int = 32
    length: int = 256
    text_share: float = 0.25
    letter_share: float = 0.3
    answer_weight: float = 2.5


@dataclass(frozen=True)
class Batch:
    """Arrays of one step. Targets are given by flat position; their family is -1 in text."""

    ids: np.ndarray  # [B, T] int64
    documents: np.ndarray  # [B, T] int64
    positions: np.ndarray  # [targets] int64, into [B * T]
    targets: np.ndarray  # [targets] int64
    weights: np.ndarray  # [targets] float32
    families: np.ndarray  # [targets] int64


class BatchMaker:
    """Batches from a folder that `prepare` wrote. The same seed, step and mix give the same batch."""

    def __init__(self, data: Path, sizes: BatchSizes, seed: int) -> None:
        self.sizes, self.seed = sizes, seed
        self.tokenizer: Tokenizer = load_tokenizer(data)
        self.end_of_text = self.tokenizer.token_to_id(END_OF_TEXT)
        self.texts = {}
        for domain in DOMAINS:
            path = data / f"{domain}.train.npy"
            tokens = np.load(path) if path.is_file() else np.zeros(0, np.uint16)
            if len(tokens) > sizes.length + 1:
                self.texts[domain] = tokens

    def make(self, step: int, mix: Mapping[str, float]) -> Batch:
        """The batch of a step; `mix` is how often each family is asked."""
        rng = random.Random(f"{self.seed} {step}")
        sizes = self.sizes
        text_rows = round(sizes.rows * sizes.text_share) if self.texts else 0
        ids = np.full((sizes.rows, sizes.length), self.end_of_text, np.int64)
        documents = np.zeros_like(ids)
        positions, targets, weights, families = [], [], [], []
        shares = [DOMAIN_SHARES[domain] for domain in self.texts]
        for row in range(text_rows):
            tokens = self.texts[rng.choices(list(self.texts), shares)[0]]
            start = rng.randrange(len(tokens) - sizes.length)
            piece = tokens[start : start + sizes.length + 1].astype(np.int64)
            ids[row] = piece[:-1]
            positions.append(np.arange(sizes.length) + row * sizes.length)
            targets.append(piece[1:])
            weights.append(np.ones(sizes.length, np.float32))
            families.append(np.full(sizes.length, -1))
        free = [sizes.length] * (sizes.rows - text_rows)
        for number, (family, prompt, answer) in enumerate(self._questions(rng, mix, len(free))):
            wanted = len(prompt) + len(answer) - 1  # the last token is only a target
            row = next((i for i, room in enumerate(free) if room >= wanted), None)
            if row is None:
                continue
            start = sizes.length - free[row]
            free[row] -= wanted
            row += text_rows
            ids[row, start : start + wanted] = (prompt + answer)[:-1]
            documents[row, start : start + wanted] = number + 1
            positions.append(np.arange(len(answer)) + row * sizes.length + start + len(prompt) - 1)
            targets.append(np.array(answer))
            weights.append(np.full(len(answer), sizes.answer_weight, np.float32))
            families.append(np.full(len(answer), family))
        return Batch(ids, documents, *(np.concatenate(part) for part in (positions, targets, weights, families)))

    def _questions(self, rng: random.Random, mix: Mapping[str, float], rows: int) -> list[tuple[int, list[int], list[int]]]:
        """(family number, prompt ids, answer ids) that about fill `rows` rows."""
        made: list[tuple[int, list[int], list[int]]] = []
        weights = [mix[name] for name in FAMILY_NAMES]
        room = rows * self.sizes.length
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
