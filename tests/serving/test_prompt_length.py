"""A guess of a prompt's tokens is low, and bounded by what the tokenizer can find at most."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from backend.serving.prompt_length import PromptLengths
from backend.tokenizer import Tokenizer, load_tokenizer


def test_texts_of_one_kind_are_guessed_and_a_mixture_is_not() -> None:
    lengths = PromptLengths()
    assert lengths.guess("x" * 1000) == (1, 1)
    for _ in range(16):
        lengths.observe("x" * 400, 100)
    assert lengths.guess("x" * 1000) == (250, 250)
    for number in range(200):
        lengths.observe("x" * 400, 100 if number % 2 else 800)
    low, likely = lengths.guess("x" * 1000)
    assert low == 1
    assert likely == pytest.approx(1125, rel=0.1)


@settings(max_examples=100)
@given(text=st.text(min_size=1))
@pytest.mark.parametrize("normalizer", [None, normalizers.NFKC()])
def test_no_text_has_more_tokens_than_its_bound(normalizer, text: str) -> None:
    backend = load_tokenizer("dummy:tiny", 512)._backend
    if normalizer is not None:
        backend.normalizer = normalizer
    tokenizer = Tokenizer(backend, [256])
    assert len(tokenizer.encode(text)) <= tokenizer.most_tokens(text)
    worst = "\ufdfa"
    assert len(tokenizer.encode(worst)) <= tokenizer.most_tokens(worst)
