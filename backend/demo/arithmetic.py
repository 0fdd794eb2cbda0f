"""Question families about numbers."""

from __future__ import annotations

import random

from backend.demo.making import Made, near, text_of
from backend.demo.words import NAMES, THINGS, UNITS


def largest(rng: random.Random) -> Made:
    numbers = [str(number) for number in rng.sample(range(10, 100), 4)]
    answer = max(numbers)
    return f"Largest of {text_of(numbers[:3])}", max(numbers[:3]), [*numbers, answer]


def smallest(rng: random.Random) -> Made:
    numbers = [str(number) for number in rng.sample(range(10, 100), 4)]
    return f"Smallest of {text_of(numbers[:3])}", min(numbers[:3]), numbers


def compare(rng: random.Random) -> Made:
    a = rng.randint(100, 999)
    b = rng.choice([number for number in (a + rng.randint(-50, 50), rng.randint(100, 999)) if number != a] or [a + 1])
    return f"Which is more: {a} or {b}", str(max(a, b)), [str(min(a, b)), *near(max(a, b), rng)]


def add(rng: random.Random) -> Made:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return f"{a} + {b} =", str(a + b), near(a + b, rng)


def subtract(rng: random.Random) -> Made:
    b, a = sorted((rng.randint(10, 99), rng.randint(10, 99)))
    return f"{a} - {b} =", str(a - b), near(a - b, rng)


def story(rng: random.Random) -> Made:
    a, b = rng.randint(10, 79), rng.randint(2, 9)
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    return f"{name} has {a} {thing} and gets {b} more. How many", str(a + b), near(a + b, rng)


def number_after(rng: random.Random) -> Made:
    number = rng.randint(100, 9998)
    return f"After {number} comes", str(number + 1), near(number + 1, rng)


def number_before(rng: random.Random) -> Made:
    number = rng.randint(101, 9999)
    return f"Before {number} comes", str(number - 1), near(number - 1, rng)


def convert(rng: random.Random) -> Made:
    unit, smaller, power = rng.choice(UNITS)
    number = rng.randint(2, 999)
    answers = [str(number * 10**p) for p in (0, 1, 2, 3, 4)]
    return f"{number} {unit} in {smaller}", answers[power], answers


def multiply(rng: random.Random) -> Made:
    a, b = rng.randint(11, 99), rng.randint(2, 9)
    form = rng.choice(("{a} x {b} =", "{b} x {a} =", "{a} times {b} ="))
    return form.format(a=a, b=b), str(a * b), near(a * b, rng)


def add_hundreds(rng: random.Random) -> Made:
    a, b = rng.randint(100, 899), rng.randint(100, 899)
    return f"{a} + {b} =", str(a + b), near(a + b, rng)


def total(rng: random.Random) -> Made:
    digits = [rng.randint(1, 9) for _ in range(rng.randint(3, 5))]
    return f"Total of {text_of([str(digit) for digit in digits])}", str(sum(digits)), near(sum(digits), rng)


def twice(rng: random.Random) -> Made:
    number = rng.randint(11, 2999)
    return f"Twice {number}", str(2 * number), near(2 * number, rng)


def half(rng: random.Random) -> Made:
    number = 2 * rng.randint(11, 2999)
    return f"Half of {number}", str(number // 2), near(number // 2, rng)


def clock(rng: random.Random) -> Made:
    start, passed = rng.randrange(24 * 60), 5 * rng.randint(1, 11)
    answers = [_time(start + passed + slip) for slip in (0, -60, 60, -10, 10, 5)]
    return f"{passed} minutes after {_time(start)}", answers[0], answers


def _time(minutes: int) -> str:
    return f"{minutes // 60 % 24}:{minutes % 60:02}"


def roman(rng: random.Random) -> Made:
    number = rng.randint(1, 1999)
    answer = _roman(number)
    return f"Roman: {number}", answer, [_roman(int(other)) for other in near(number, rng) if int(other)]


def from_roman(rng: random.Random) -> Made:
    number = rng.randint(1, 1999)
    return f"Number: {_roman(number)}", str(number), near(number, rng)


def _roman(number: int) -> str:
    """Roman numerals with spaces, one token each."""
    letters = ""
    for value, sign in zip(
        (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),
        "M CM D CD C XC L XL X IX V IV I".split(),
        strict=True,
    ):
        letters += sign * (number // value)
        number %= value
    return text_of(list(letters))
