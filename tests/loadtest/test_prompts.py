"""Prompts are repeatable, and as long as they should be."""

import json

import pytest

from backend.errors import ConfigError
from backend.tokenizer import load_tokenizer
from loadtest.prompts import FilePrompts, GeneratedPrompts


def test_generated_prompts_repeat_for_a_seed_and_differ_from_each_other():
    texts = [GeneratedPrompts(5).text(number, 30) for number in range(20)]
    assert texts == [GeneratedPrompts(5).text(number, 30) for number in range(20)]
    assert len(set(texts)) == 20
    assert all(len(text.split()) == 30 for text in texts)


@pytest.mark.parametrize("vocab_size", [512, 4096])
def test_generated_prompts_are_never_longer_than_asked(vocab_size):
    tokenizer = load_tokenizer("dummy:tiny", vocab_size)
    shortest = len(tokenizer.encode(" a"))
    for number, tokens in enumerate([8, 33, 64, 257]):
        length = len(tokenizer.encode(GeneratedPrompts(0, tokenizer).text(number, tokens)))
        assert tokens - shortest < length <= tokens


def test_file_prompts_come_from_the_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({key: text}) for key, text in [("text", "one"), ("prompt", "two")]) + "\n")
    drawn = [FilePrompts(path, 1).text(number, 0) for number in range(50)]
    assert set(drawn) == {"one", "two"}
    assert drawn == [FilePrompts(path, 1).text(number, 0) for number in range(50)]


@pytest.mark.parametrize(
    ("text", "message"), [('{"text": "x"}\n{"a": 1}\n', "line 2"), ("[]", "line 1"), ("", "no line")]
)
def test_unusable_prompt_files_are_named(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        FilePrompts(path, 0)
