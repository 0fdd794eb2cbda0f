"""Questions with one checkable answer: what a question is, its two forms, and which prompts are held out.

Free form: the answer itself, compared exactly. Letter form: four options, one of them right, each followed by its letter;
the reply says the option and its letter ("12 B"), and only the letter counts. (A letter alone would have to be worked out in
one pass, before anything is written, which a model of this size does not learn.)
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

#: One in this many prompts is held out of training.
HELD_OUT_MODULUS = 20
LETTER_LABELS = ("A", "B", "C", "D")
FORMS = ("free", "letter")


@dataclass(frozen=True)
class Question:
    """A prompt, its answer, and three wrong answers that look like it."""

    family: str
    prompt: str
    answer: str
    distractors: tuple[str, str, str]


#: Makes (prompt, answer, plausible wrong answers: any number, repeats and the answer itself allowed).
Generator = Callable[[random.Random], tuple[str, str, list[str]]]


def is_held_out(family: str, prompt: str) -> bool:
    """Whether a question belongs to the held-out 5 %, in both of its forms."""
    digest = hashlib.sha256(f"{family}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_MODULUS == 0


def make_question(family: str, generator: Generator, rng: random.Random, held_out: bool) -> Question:
    """A question of a family from one side of the split."""
    for _ in range(2000):
        prompt, answer, wrong = generator(rng)
        if is_held_out(family, prompt) == held_out:
            return Question(family, prompt, answer, _three(answer, wrong, rng))
    raise RuntimeError(f"family {family} has too few prompts: none found that is{' ' if held_out else ' not '}held out")


def letter_form(question: Question, rng: random.Random) -> tuple[str, str]:
    """(prompt with four options, reply that ends with the letter of the right one), options in random order."""
    options = [question.answer, *question.distractors]
    rng.shuffle(options)
    offered = ", ".join(f"{option} {label}" for label, option in zip(LETTER_LABELS, options, strict=True))
    label = LETTER_LABELS[options.index(question.answer)]
    return f"{question.prompt}\nOptions: {offered}", f"{question.answer} {label}"


def in_form(question: Question, form: str, rng: random.Random) -> tuple[str, str]:
    """(prompt, reply) of a question as free answer or by letter."""
    return (question.prompt, question.answer) if form == "free" else letter_form(question, rng)


def is_right(form: str, said: str, answer: str) -> bool:
    """Whether a completion answers as `in_form` asks: the exact text, or a reply that ends with the right letter."""
    if form == "free":
        return said.strip() == answer
    option, _, label = said.strip().rpartition(" ")
    return bool(option) and label == answer[-1]


def _three(answer: str, wrong: list[str], rng: random.Random) -> tuple[str, str, str]:
    """Three different wrong answers, made up from the answer where the family gives too few."""
    chosen = [text for text in dict.fromkeys(wrong) if text != answer]
    rng.shuffle(chosen)
    chosen = chosen[:3]
    attempts = 0
    while len(chosen) < 3:
        attempts += 1
        text = _altered(answer, rng, wild=attempts > 20)
        if text != answer and text not in chosen:
            chosen.append(text)
    return chosen[0], chosen[1], chosen[2]


def _altered(answer: str, rng: random.Random, wild: bool) -> str:
    """The answer with two items exchanged, or one letter or digit changed to another of its kind."""
    items = answer.split(" ")
    if len(items) > 1 and not wild and rng.random() < 0.5:
        i, j = rng.sample(range(len(items)), 2)
        items[i], items[j] = items[j], items[i]
        return " ".join(items)
    text = list(answer)
    position = rng.randrange(len(text))
    kind = text[position]
    if kind.isdigit():
        text[position] = rng.choice("123456789")
    elif kind.isalpha():
        text[position] = rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ" if kind.isupper() else "abcdefghijklmnopqrstuvwxyz")
    return "".join(text)
