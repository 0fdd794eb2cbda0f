"""The question families. Each has thousands of different prompts and answers that no constant guess gets right.

Lists are written with spaces, so that a letter, a digit or a common word is one token each. Look-ups are answered with
their key ("Find q" with "q 1"), so that the answer continues what stands in the prompt.
"""

from __future__ import annotations

import random

from backend.demo.tasks import Generator, Question, make_question
from backend.demo.words import (
    CALENDAR,
    CAPITALS,
    CATEGORIES,
    DIGIT_WORDS,
    FRENCH,
    INITIAL_WORDS,
    LETTERS,
    NAMES,
    OPPOSITES,
    PLACES,
    PLURALS,
    THINGS,
    UNITS,
)

Made = tuple[str, str, list[str]]


def _letters(rng: random.Random, low: int, high: int) -> list[str]:
    return rng.sample(LETTERS, rng.randint(low, high))


def _text(items: list[str]) -> str:
    return " ".join(items)


def _swaps(items: list[str], rng: random.Random) -> list[str]:
    """The list with two neighbours exchanged, in up to five ways."""
    made = []
    for i in rng.sample(range(len(items) - 1), min(5, len(items) - 1)):
        made.append(_text([*items[:i], items[i + 1], items[i], *items[i + 2 :]]))
    return made


def _near(number: int, rng: random.Random) -> list[str]:
    """Numbers that slips of one, ten or a carry would give."""
    return [str(number + step) for step in rng.sample((-20, -10, -2, -1, 1, 2, 10, 20), 6) if number + step >= 0]


def repeat(rng: random.Random) -> Made:
    items = _letters(rng, 3, 6)
    return f"Repeat: {_text(items)}", _text(items), _swaps(items, rng)


def first(rng: random.Random) -> Made:
    items = _letters(rng, 4, 7)
    return f"First of {_text(items)}", items[0], items[1:]


def last(rng: random.Random) -> Made:
    items = _letters(rng, 4, 7)
    return f"Last of {_text(items)}", items[-1], items[:-1]


def item(rng: random.Random) -> Made:
    items = _letters(rng, 4, 5)
    place = rng.randrange(4)
    return f"Item {place + 1} of {_text(items)}", items[place], items


def follows(rng: random.Random) -> Made:
    items = _letters(rng, 4, 7)
    place = rng.randrange(len(items) - 1)
    answers = [f"{items[place]} {other}" for other in items]
    return f"In {_text(items)} what follows {items[place]}", answers[place + 1], answers


def before(rng: random.Random) -> Made:
    items = _letters(rng, 4, 7)
    place = rng.randrange(1, len(items))
    return f"In {_text(items)} what is before {items[place]}", items[place - 1], items


def recall(rng: random.Random) -> Made:
    keys, values = rng.sample(LETTERS, 4), rng.sample(range(10), 4)
    asked = rng.randrange(4)
    pairs = ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
    answers = [f"{keys[asked]} {value}" for value in values]
    return f"Pairs: {pairs}. Find {keys[asked]}", answers[asked], answers


def where(rng: random.Random) -> Made:
    names, places = rng.sample(NAMES, 3), rng.sample(PLACES, 4)
    asked = rng.randrange(3)
    facts = ", ".join(f"{name} {place}" for name, place in zip(names, places, strict=False))
    answers = [f"{names[asked]} {place}" for place in places]
    return f"Places: {facts}. Where is {names[asked]}", answers[asked], answers


def upper(rng: random.Random) -> Made:
    items = _letters(rng, 2, 4)
    answer = [letter.upper() for letter in items]
    return f"Upper case: {_text(items)}", _text(answer), _swaps(answer, rng) if len(items) > 2 else []


def lower(rng: random.Random) -> Made:
    items = _letters(rng, 2, 4)
    upper_case = [letter.upper() for letter in items]
    return f"Lower case: {_text(upper_case)}", _text(items), _swaps(items, rng) if len(items) > 2 else []


def reverse(rng: random.Random) -> Made:
    items = _letters(rng, 3, 4)
    answer = items[::-1]
    return f"Reverse: {_text(items)}", _text(answer), [_text(items), *_swaps(answer, rng)]


def sort_digits(rng: random.Random) -> Made:
    digits = [str(digit) for digit in rng.sample(range(10), rng.randint(4, 5))]
    answer = sorted(digits)
    return f"Sort: {_text(digits)}", _text(answer), _swaps(answer, rng)


def sort_letters(rng: random.Random) -> Made:
    items = _letters(rng, 3, 3)
    answer = sorted(items)
    return f"Sort letters: {_text(items)}", _text(answer), [_text(rng.sample(items, 3)) for _ in range(6)]


def remove(rng: random.Random) -> Made:
    items = _letters(rng, 4, 5)
    gone = rng.choice(items)
    answers = [_text([letter for letter in items if letter != other]) for other in items]
    return f"Remove {gone} from {_text(items)}", answers[items.index(gone)], answers


def append(rng: random.Random) -> Made:
    extra, *items = _letters(rng, 4, 6)
    answer = [*items, extra]
    return f"Add {extra} to {_text(items)}", _text(answer), [_text([extra, *items]), *_swaps(answer, rng)]


def replace(rng: random.Random) -> Made:
    new, *items = _letters(rng, 4, 5)
    answers = [_text([*items[:i], new, *items[i + 1 :]]) for i in range(len(items))]
    chosen = rng.randrange(len(items))
    return f"Replace {items[chosen]} by {new} in {_text(items)}", answers[chosen], answers


def double(rng: random.Random) -> Made:
    items = _letters(rng, 2, 3)
    answer = [letter for letter in items for _ in range(2)]
    return f"Double: {_text(items)}", _text(answer), [_text(items * 2), *_swaps(answer, rng)]


def pattern(rng: random.Random) -> Made:
    items = _letters(rng, 2, 3)
    length = rng.randint(2 * len(items), 3 * len(items) + 1)
    shown = [items[i % len(items)] for i in range(length)]
    return f"Continue: {_text(shown)}", items[length % len(items)], [*items, rng.choice(LETTERS), rng.choice(LETTERS)]


def odd_one(rng: random.Random) -> Made:
    common, odd = rng.sample(LETTERS, 2)
    items = [common] * rng.randint(3, 6)
    items.insert(rng.randrange(len(items) + 1), odd)
    return f"Odd one: {_text(items)}", odd, [common, *rng.sample(LETTERS, 4)]


def count(rng: random.Random) -> Made:
    number = rng.randint(2, 8)
    items = rng.sample(LETTERS, number)
    return f"How many: {_text(items)}", str(number), [str(number + step) for step in (-2, -1, 1, 2)]


def largest(rng: random.Random) -> Made:
    numbers = [str(number) for number in rng.sample(range(10, 100), 4)]
    answer = max(numbers)
    return f"Largest of {_text(numbers[:3])}", max(numbers[:3]), [*numbers, answer]


def smallest(rng: random.Random) -> Made:
    numbers = [str(number) for number in rng.sample(range(10, 100), 4)]
    return f"Smallest of {_text(numbers[:3])}", min(numbers[:3]), numbers


def compare(rng: random.Random) -> Made:
    a = rng.randint(100, 999)
    b = rng.choice([number for number in (a + rng.randint(-50, 50), rng.randint(100, 999)) if number != a] or [a + 1])
    return f"Which is more: {a} or {b}", str(max(a, b)), [str(min(a, b)), *_near(max(a, b), rng)]


def add(rng: random.Random) -> Made:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return f"{a} + {b} =", str(a + b), _near(a + b, rng)


def subtract(rng: random.Random) -> Made:
    b, a = sorted((rng.randint(10, 99), rng.randint(10, 99)))
    return f"{a} - {b} =", str(a - b), _near(a - b, rng)


def story(rng: random.Random) -> Made:
    a, b = rng.randint(10, 79), rng.randint(2, 9)
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    return f"{name} has {a} {thing} and gets {b} more. How many", str(a + b), _near(a + b, rng)


def number_after(rng: random.Random) -> Made:
    number = rng.randint(100, 9998)
    return f"After {number} comes", str(number + 1), _near(number + 1, rng)


def number_before(rng: random.Random) -> Made:
    number = rng.randint(101, 9999)
    return f"Before {number} comes", str(number - 1), _near(number - 1, rng)


def convert(rng: random.Random) -> Made:
    unit, smaller, power = rng.choice(UNITS)
    number = rng.randint(2, 999)
    answers = [str(number * 10**p) for p in (0, 1, 2, 3, 4)]
    return f"{number} {unit} in {smaller}", answers[power], answers


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
        wrong.append(_text(other))
    return f"{title}: {_text(chosen)}", _text(answer), wrong


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
    return f"Find the {kinds[asked]}: {_text(words)}", words[asked], words


def most(rng: random.Random) -> Made:
    names, numbers = rng.sample(NAMES, 4), rng.sample(range(10, 100), 3)
    facts = ", ".join(f"{name} has {number}" for name, number in zip(names, numbers, strict=False))
    return f"{facts}. Who has most", names[numbers.index(max(numbers))], names


_BOTH_WAYS = OPPOSITES | {value: key for key, value in OPPOSITES.items()}
_NEXT_LETTER = dict(zip(LETTERS, LETTERS[1:] + LETTERS[:1], strict=True))
_NEXT_DATE = {day: cycle[(i + 1) % len(cycle)] for cycle in CALENDAR for i, day in enumerate(cycle)}
_DIGIT_TO_WORD = {str(i): word for i, word in enumerate(DIGIT_WORDS)}
_WORD_TO_DIGIT = {word: str(i) for i, word in enumerate(DIGIT_WORDS)}
_INITIAL = {word: word[0] for word in INITIAL_WORDS}

#: Every family by name, in the order of the result tables.
FAMILIES: dict[str, Generator] = {
    generator.__name__: generator
    for generator in (
        repeat, first, last, item, follows, before, recall, where, upper, lower, reverse, sort_digits, sort_letters, remove,
        append, replace, double, pattern, odd_one, count, largest, smallest, compare, add, subtract, story, number_after,
        number_before, convert, capital, opposites, plurals, french, next_letters, next_dates, in_words, in_digits, initials,
        kind_of, most,
    )
}  # fmt: skip


def sample(family: str, rng: random.Random, held_out: bool = False) -> Question:
    """A random question of the family from the training side of the split, or from the held-out side."""
    return make_question(family, FAMILIES[family], rng, held_out)
