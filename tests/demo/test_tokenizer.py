"""The demo's tokenizer and chat format, through the engine's own loader."""

import pytest

from backend.demo.template import answer_text, chat_text, prompt_text
from backend.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(data):
    return load_tokenizer(str(data), 700)


@pytest.mark.parametrize(
    "text", ["Sort: 4 7 2", "  two  spaces\n\n\tand tabs", "cœur, tête — naïve 漢字 🙂", "a\nA) b\nB) c", ""]
)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_digit_is_a_token_of_its_own(tokenizer):
    assert len(tokenizer.encode(" 1234")) == 4
    assert len(tokenizer.encode("x1234y")) == 6


def test_an_option_label_is_one_token(tokenizer):
    assert len(tokenizer.encode(" A")) == 1


def test_the_template_writes_what_training_saw(tokenizer):
    messages = [{"role": "user", "content": "How many: a b"}]
    assert tokenizer.apply_chat_template(messages) == prompt_text("How many: a b")
    turns = [("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye")]
    said = [{"role": role, "content": words} for role, words in turns]
    assert tokenizer.apply_chat_template(said) == chat_text(turns) + "<|assistant|>"


def test_prompt_and_answer_tokenize_apart_as_together(tokenizer):
    together = tokenizer.encode(prompt_text("Repeat: a b") + answer_text("a b"))
    assert together == tokenizer.encode(prompt_text("Repeat: a b")) + tokenizer.encode(answer_text("a b"))


def test_an_answer_ends_with_the_end_token(tokenizer):
    assert tokenizer.encode(answer_text("a"))[-1] == tokenizer.eos_token_id
