"""What the question families share: their result, and wrong answers that look right."""

from __future__ import annotations

import random

from backend.demo.words import LETTERS

#: Prompt, answer, plausible wrong answers.
Made = tuple[str, str, list[str]]


def some_letters(rng: random.Random, low: int, high: int) -> list[str]:
    """From `low` to `high` different letters."""
    return rng.sample(LETTERS, rng.randint(low, high))


def text_of(items: list[str]) -> str:
    """A list with spaces, so that a letter, a digit or a common word is one token each."""
    return " ".join(items)


def swaps(items: list[str], rng: random.Random) -> list[str]:
    """The list with two neighbours exchanged, in up to five ways."""
    made = []
    for i in rng.sample(range(len(items) - 1), min(5, len(items) - 1)):
        made.append(text_of([*items[:i], items[i + 1], items[i], *items[i + 2 :]]))
    return made


def near(number: int, rng: random.Random) -> list[str]:
    """Numbers that slips of one, ten or a carry would give."""
    return [str(number + step) for step in rng.sample((-20, -10, -2, -1, 1, 2, 10, 20), 6) if number + step >= 0]
