"""Question families that ask for what is known by heart: facts, words, spelling."""

from __future__ import annotations

import random

from backend.demo.making import Made, text_of
from backend.demo.words import (
    CALENDAR,
    CAPITALS,
    CATEGORIES,
    DIGIT_WORDS,
    FRENCH,
    GERMAN,
    INITIAL_WORDS,
    LETTERS,
    NAMES,
    OPPOSITES,
    PAST,
    PLURALS,
    SYMBOLS,
)


def capital(rng: random.Random) -> Made:
    name, country = rng.choice(NAMES), rng.choice(list(CAPITALS))
    form = rng.choice(
        (
            "{} lives in {}. The capital there is",
            "{} flies to the capital of {}. Which city is it",
            "{} was born in {}. Name the capital",
        )
    )
    return form.format(name, country), CAPITALS[country], rng.sample(list(CAPITALS.values()), 4)


def _mapped(title: str, table: dict[str, str], rng: random.Random, low: int = 2, high: int = 3) -> Made:
    """Words of a table, each answered by its counterpart."""
    chosen = rng.sample(list(table), rng.randint(low, high))
    answer = [table[word] for word in chosen]
    wrong = []
    for _ in range(4):
        other = list(answer)
        other[rng.randrange(len(other))] = rng.choice(list(table.values()))
        wrong.append(text_of(other))
    return f"{title}: {text_of(chosen)}", text_of(answer), wrong


def opposites(rng: random.Random) -> Made:
    return _mapped("Opposites", _BOTH_WAYS, rng)


def plurals(rng: random.Random) -> Made:
    return _mapped("Plurals", PLURALS, rng)


def french(rng: random.Random) -> Made:
    return _mapped("French", FRENCH, rng)


def next_letters(rng: random.Random) -> Made:
    return _mapped("Next letters", _NEXT_LETTER, rng, 3, 3)


def next_dates(rng: random.Random) -> Made:
    return _mapped("Next", _NEXT_DATE, rng, 3, 3)


def in_words(rng: random.Random) -> Made:
    return _mapped("In words", _DIGIT_TO_WORD, rng, 3, 4)


def in_digits(rng: random.Random) -> Made:
    return _mapped("In digits", _WORD_TO_DIGIT, rng, 3, 4)


def initials(rng: random.Random) -> Made:
    return _mapped("First letters", _INITIAL, rng, 3, 3)


def kind_of(rng: random.Random) -> Made:
    kinds = rng.sample(list(CATEGORIES), 4)
    words = [rng.choice(CATEGORIES[kind]) for kind in kinds]
    asked = rng.randrange(4)
    return f"Find the {kinds[asked]}: {text_of(words)}", words[asked], words


def positions(rng: random.Random) -> Made:
    return _mapped("Positions", _POSITION, rng, 3, 3)


def letters_at(rng: random.Random) -> Made:
    return _mapped("Letters", {number: letter for letter, number in _POSITION.items()}, rng, 3, 3)


def last_letters(rng: random.Random) -> Made:
    return _mapped("Last letters", {word: word[-1] for word in INITIAL_WORDS}, rng, 3, 3)


def lengths(rng: random.Random) -> Made:
    return _mapped("Lengths", {word: str(len(word)) for word in INITIAL_WORDS}, rng, 3, 3)


def capitals(rng: random.Random) -> Made:
    return _mapped("Capitals", CAPITALS, rng)


def countries(rng: random.Random) -> Made:
    return _mapped("Countries", {city: country for country, city in CAPITALS.items()}, rng)


def symbols(rng: random.Random) -> Made:
    return _mapped("Symbols", SYMBOLS, rng)


def past(rng: random.Random) -> Made:
    return _mapped("Past", PAST, rng)


def german(rng: random.Random) -> Made:
    return _mapped("German", GERMAN, rng)


def from_french(rng: random.Random) -> Made:
    return _mapped("English", {french_word: word for word, french_word in FRENCH.items()}, rng)


_POSITION = {letter: str(i + 1) for i, letter in enumerate(LETTERS)}
_BOTH_WAYS = OPPOSITES | {value: key for key, value in OPPOSITES.items()}
_NEXT_LETTER = dict(zip(LETTERS, LETTERS[1:] + LETTERS[:1], strict=True))
_NEXT_DATE = {day: cycle[(i + 1) % len(cycle)] for cycle in CALENDAR for i, day in enumerate(cycle)}
_DIGIT_TO_WORD = {str(i): word for i, word in enumerate(DIGIT_WORDS)}
_WORD_TO_DIGIT = {word: str(i) for i, word in enumerate(DIGIT_WORDS)}
_INITIAL = {word: word[0] for word in INITIAL_WORDS}
