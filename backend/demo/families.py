"""The question families. Each has thousands of different prompts and answers that no constant guess gets right.

Here are those that can be answered from what stands in the prompt; `arithmetic` and `lookups` have the others. Look-ups are
answered with their key ("Find q" with "q 1"), so that the answer continues what stands in the prompt.
"""

from __future__ import annotations

import random

from backend.demo import arithmetic, lookups
from backend.demo.making import Made, some_letters, swaps, text_of
from backend.demo.tasks import Generator, Question, make_question
from backend.demo.words import LETTERS, NAMES, PLACES


def repeat(rng: random.Random) -> Made:
    items = some_letters(rng, 3, 6)
    return f"Repeat: {text_of(items)}", text_of(items), swaps(items, rng)


def first(rng: random.Random) -> Made:
    items = some_letters(rng, 4, 7)
    return f"First of {text_of(items)}", items[0], items[1:]


def last(rng: random.Random) -> Made:
    items = some_letters(rng, 4, 7)
    return f"Last of {text_of(items)}", items[-1], items[:-1]


def item(rng: random.Random) -> Made:
    items = some_letters(rng, 4, 5)
    place = rng.randrange(4)
    return f"Item {place + 1} of {text_of(items)}", items[place], items


def follows(rng: random.Random) -> Made:
    items = some_letters(rng, 4, 7)
    place = rng.randrange(len(items) - 1)
    answers = [f"{items[place]} {other}" for other in items]
    return f"In {text_of(items)} what follows {items[place]}", answers[place + 1], answers


def before(rng: random.Random) -> Made:
    items = some_letters(rng, 4, 7)
    place = rng.randrange(1, len(items))
    return f"In {text_of(items)} what is before {items[place]}", items[place - 1], items


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
    items = some_letters(rng, 2, 4)
    answer = [letter.upper() for letter in items]
    return f"Upper case: {text_of(items)}", text_of(answer), swaps(answer, rng) if len(items) > 2 else []


def lower(rng: random.Random) -> Made:
    items = some_letters(rng, 2, 4)
    upper_case = [letter.upper() for letter in items]
    return f"Lower case: {text_of(upper_case)}", text_of(items), swaps(items, rng) if len(items) > 2 else []


def reverse(rng: random.Random) -> Made:
    items = some_letters(rng, 3, 4)
    answer = items[::-1]
    return f"Reverse: {text_of(items)}", text_of(answer), [text_of(items), *swaps(answer, rng)]


def sort_digits(rng: random.Random) -> Made:
    digits = [str(digit) for digit in rng.sample(range(10), rng.randint(4, 5))]
    answer = sorted(digits)
    return f"Sort: {text_of(digits)}", text_of(answer), swaps(answer, rng)


def sort_letters(rng: random.Random) -> Made:
    items = some_letters(rng, 3, 3)
    answer = sorted(items)
    return f"Sort letters: {text_of(items)}", text_of(answer), [text_of(rng.sample(items, 3)) for _ in range(6)]


def remove(rng: random.Random) -> Made:
    items = some_letters(rng, 4, 5)
    gone = rng.choice(items)
    answers = [text_of([letter for letter in items if letter != other]) for other in items]
    return f"Remove {gone} from {text_of(items)}", answers[items.index(gone)], answers


def append(rng: random.Random) -> Made:
    extra, *items = some_letters(rng, 4, 6)
    answer = [*items, extra]
    return f"Add {extra} to {text_of(items)}", text_of(answer), [text_of([extra, *items]), *swaps(answer, rng)]


def replace(rng: random.Random) -> Made:
    new, *items = some_letters(rng, 4, 5)
    answers = [text_of([*items[:i], new, *items[i + 1 :]]) for i in range(len(items))]
    chosen = rng.randrange(len(items))
    return f"Replace {items[chosen]} by {new} in {text_of(items)}", answers[chosen], answers


def double(rng: random.Random) -> Made:
    items = some_letters(rng, 2, 3)
    answer = [letter for letter in items for _ in range(2)]
    return f"Double: {text_of(items)}", text_of(answer), [text_of(items * 2), *swaps(answer, rng)]


def pattern(rng: random.Random) -> Made:
    items = some_letters(rng, 2, 3)
    length = rng.randint(2 * len(items), 3 * len(items) + 1)
    shown = [items[i % len(items)] for i in range(length)]
    return f"Continue: {text_of(shown)}", items[length % len(items)], [*items, rng.choice(LETTERS), rng.choice(LETTERS)]


def odd_one(rng: random.Random) -> Made:
    common, odd = rng.sample(LETTERS, 2)
    items = [common] * rng.randint(3, 6)
    items.insert(rng.randrange(len(items) + 1), odd)
    return f"Odd one: {text_of(items)}", odd, [common, *rng.sample(LETTERS, 4)]


def count(rng: random.Random) -> Made:
    number = rng.randint(2, 8)
    items = rng.sample(LETTERS, number)
    return f"How many: {text_of(items)}", str(number), [str(number + step) for step in (-2, -1, 1, 2)]


def most(rng: random.Random) -> Made:
    names, numbers = rng.sample(NAMES, 4), rng.sample(range(10, 100), 3)
    facts = ", ".join(f"{name} has {number}" for name, number in zip(names, numbers, strict=False))
    return f"{facts}. Who has most", names[numbers.index(max(numbers))], names


#: Every family by name, in the order of the result tables.
FAMILIES: dict[str, Generator] = {
    generator.__name__: generator
    for generator in (
        repeat,
        first,
        last,
        item,
        follows,
        before,
        recall,
        where,
        upper,
        lower,
        reverse,
        sort_digits,
        sort_letters,
        remove,
        append,
        replace,
        double,
        pattern,
        odd_one,
        count,
        most,
        arithmetic.largest,
        arithmetic.smallest,
        arithmetic.compare,
        arithmetic.add,
        arithmetic.subtract,
        arithmetic.story,
        arithmetic.number_after,
        arithmetic.number_before,
        arithmetic.convert,
        arithmetic.multiply,
        arithmetic.add_hundreds,
        arithmetic.total,
        arithmetic.twice,
        arithmetic.half,
        arithmetic.clock,
        arithmetic.roman,
        arithmetic.from_roman,
        lookups.capital,
        lookups.opposites,
        lookups.plurals,
        lookups.french,
        lookups.next_letters,
        lookups.next_dates,
        lookups.in_words,
        lookups.in_digits,
        lookups.initials,
        lookups.kind_of,
        lookups.positions,
        lookups.letters_at,
        lookups.last_letters,
        lookups.lengths,
        lookups.capitals,
        lookups.countries,
        lookups.symbols,
        lookups.past,
        lookups.german,
        lookups.from_french,
    )
}


def sample(family: str, rng: random.Random, held_out: bool = False) -> Question:
    """A random question of the family from the training side of the split, or from the held-out side."""
    return make_question(family, FAMILIES[family], rng, held_out)
