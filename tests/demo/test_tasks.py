"""Questions: the same for the same seed, right, varied, and never on both sides of the split."""

import random

import pytest

from backend.demo.families import FAMILIES, sample
from backend.demo.quality import held_out_questions
from backend.demo.tasks import LETTER_LABELS, is_held_out, is_right, letter_form


def _argument(prompt: str) -> str:
    return prompt.split(": ", 1)[1]


def _roman_value(signs: list[str]) -> int:
    values = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}[sign] for sign in signs]
    return sum(-a if a < b else a for a, b in zip(values, [*values[1:], 0], strict=True))


def test_roman_numerals_say_their_number():
    rng = random.Random(6)
    for _ in range(200):
        question = sample("roman", rng)
        assert str(_roman_value(question.answer.split())) == _argument(question.prompt)


#: An answer worked out from the prompt's words alone, independently of the generators.
SOLVERS = {
    "repeat": _argument,
    "first": lambda p: p.split(" of ")[1].split()[0],
    "last": lambda p: p.split()[-1],
    "item": lambda p: p.split()[3:][int(p.split()[1]) - 1],
    "follows": lambda p: " ".join(p.split()[p.split().index(p.split()[-1]) :][:2]),
    "before": lambda p: p.split()[p.split().index(p.split()[-1]) - 1],
    "recall": lambda p: next(pair for pair in p[7:].split(". ")[0].split(", ") if pair.startswith(p[-1])),
    "where": lambda p: next(pair for pair in p[8:].split(". ")[0].split(", ") if pair.startswith(p.split()[-1] + " ")),
    "upper": lambda p: _argument(p).upper(),
    "lower": lambda p: _argument(p).lower(),
    "reverse": lambda p: " ".join(reversed(_argument(p).split())),
    "sort_digits": lambda p: " ".join(sorted(_argument(p).split())),
    "sort_letters": lambda p: " ".join(sorted(_argument(p).split())),
    "remove": lambda p: " ".join(x for x in p.split(" from ")[1].split() if x != p.split()[1]),
    "append": lambda p: p.split(" to ")[1] + " " + p.split()[1],
    "replace": lambda p: " ".join(p.split()[3] if x == p.split()[1] else x for x in p.split(" in ")[1].split()),
    "double": lambda p: " ".join(f"{x} {x}" for x in _argument(p).split()),
    "odd_one": lambda p: min(_argument(p).split(), key=_argument(p).split().count),
    "count": lambda p: str(len(_argument(p).split())),
    "largest": lambda p: str(max(map(int, p.split(" of ")[1].split()))),
    "smallest": lambda p: str(min(map(int, p.split(" of ")[1].split()))),
    "compare": lambda p: str(max(map(int, _argument(p).split(" or ")))),
    "add": lambda p: str(eval(p.rstrip("= "))),
    "subtract": lambda p: str(eval(p.rstrip("= "))),
    "story": lambda p: str(sum(int(word) for word in p.split() if word.isdigit())),
    "number_after": lambda p: str(int(p.split()[1]) + 1),
    "number_before": lambda p: str(int(p.split()[1]) - 1),
    "in_digits": lambda p: " ".join(
        str("zero one two three four five six seven eight nine".split().index(word)) for word in _argument(p).split()
    ),
    "initials": lambda p: " ".join(word[0] for word in _argument(p).split()),
    "multiply": lambda p: str(eval(p.rstrip("= ").replace("times", "*").replace("x", "*"))),
    "add_hundreds": lambda p: str(eval(p.rstrip("= "))),
    "total": lambda p: str(sum(map(int, p.split(" of ")[1].split()))),
    "twice": lambda p: str(2 * int(p.split()[1])),
    "half": lambda p: str(int(p.split()[2]) // 2),
    "clock": lambda p: "{}:{:02}".format(
        *divmod((int(p.split()[3].split(":")[0]) * 60 + int(p.split(":")[1]) + int(p.split()[0])) % 1440, 60)
    ),
    "from_roman": lambda p: str(_roman_value(_argument(p).split())),
    "positions": lambda p: " ".join(str(ord(x) - 96) for x in _argument(p).split()),
    "letters_at": lambda p: " ".join(chr(int(x) + 96) for x in _argument(p).split()),
    "last_letters": lambda p: " ".join(word[-1] for word in _argument(p).split()),
    "lengths": lambda p: " ".join(str(len(word)) for word in _argument(p).split()),
    "most": lambda p: max((f.split(" has ") for f in p.split(". ")[0].split(", ")), key=lambda f: int(f[1]))[0],
}


@pytest.mark.parametrize("family", SOLVERS)
def test_answers_are_right(family):
    rng = random.Random(1)
    for _ in range(200):
        question = sample(family, rng)
        assert SOLVERS[family](question.prompt) == question.answer, question.prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_many_prompts_and_no_majority_answer(family):
    rng = random.Random(2)
    questions = [sample(family, rng) for _ in range(1000)]
    answers = [question.answer for question in questions]
    assert len({question.prompt for question in questions}) > 600
    assert max(map(answers.count, set(answers))) < 250


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_questions(family):
    first, second = random.Random("seed"), random.Random("seed")
    assert [sample(family, first) for _ in range(20)] == [sample(family, second) for _ in range(20)]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_never_asks_what_is_held_out(family):
    rng = random.Random(4)
    held_out = {question.prompt for question in (sample(family, rng, held_out=True) for _ in range(100))}
    asked = {question.prompt for question in (sample(family, rng) for _ in range(500))}
    assert not held_out & asked
    assert all(is_held_out(family, prompt) for prompt in held_out)


def test_about_a_twentieth_of_the_prompts_is_held_out():
    share = sum(is_held_out("add", f"{a} + {b} =") for a in range(10, 100) for b in range(10, 100)) / 8100
    assert 0.035 < share < 0.065


@pytest.mark.parametrize("family", FAMILIES)
def test_options_are_four_different_ones_with_the_answer_under_its_letter(family):
    rng = random.Random(5)
    letters = set()
    for _ in range(50):
        question = sample(family, rng)
        prompt, reply = letter_form(question, rng)
        options = {option[-1]: option[:-2] for option in prompt.split("\nOptions: ")[1].split(", ")}
        assert tuple(options) == LETTER_LABELS
        assert len(set(options.values())) == 4
        answer, _, letter = reply.rpartition(" ")
        assert options[letter] == question.answer == answer
        letters.add(letter)
    assert letters == set(LETTER_LABELS)


def test_a_free_answer_counts_when_it_is_the_exact_text():
    assert is_right("free", " a b c", "a b c")
    assert not is_right("free", " a b", "a b c")
    assert not is_right("free", " a b c d", "a b c")


def test_a_letter_answer_counts_by_its_letter_alone():
    assert is_right("letter", " 12 B", "12 B")
    assert is_right("letter", " 13 B", "12 B")
    assert not is_right("letter", " 12 C", "12 B")
    assert not is_right("letter", " B", "12 B")
    assert not is_right("letter", " 12 B or C", "12 B")


def test_held_out_questions_are_different_ones():
    pairs = held_out_questions("add", "free", 50)
    assert len({prompt for prompt, _ in pairs}) == 50
    assert held_out_questions("add", "free", 50) == pairs
