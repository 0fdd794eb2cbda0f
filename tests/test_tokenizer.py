"""Tokenizers of checkpoint folders and of dummies, and clear errors where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from backend.engine.detokenizer import Detokenizer
from backend.errors import ConfigError, InvalidRequestError
from backend.tokenizer import Tokenizer, load_tokenizer
from tests.models.tiny_checkpoints import build_synthetic_tokenizer

VOCAB = 2000
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def dummy() -> Tokenizer:
    return load_tokenizer("dummy:cpu-s", VOCAB)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder with a tokenizer and a chat template."""
    tokenizer = build_synthetic_tokenizer(VOCAB)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_moe", "vocab_size": VOCAB}))
    return tmp_path


@settings(max_examples=100)
@given(text=st.text())
def test_any_text_round_trips_through_a_dummys_tokenizer(dummy: Tokenizer, text: str) -> None:
    ids = dummy.encode(text)
    assert dummy.decode(ids, skip_special_tokens=False) == text
    assert Detokenizer(dummy, skip_special_tokens=False).append(ids, True) == text


def test_a_dummys_ids_are_bytes_then_special_tokens_then_words(dummy: Tokenizer) -> None:
    assert dummy.vocab_size == VOCAB
    assert [dummy.pieces[i] for i in range(256)] == [bytes([i]) for i in range(256)]
    assert dummy.eos_token_id == 256 and dummy.eos_token_ids == (256,)
    words = [dummy.decode([i]) for i in range(260, VOCAB)]
    assert len(set(words)) == len(words)
    assert all(word[0] == " " and word[1:].isalpha() and word.islower() for word in words)
    assert dummy.encode("".join(words[:100])) == list(range(260, 360))


def test_special_tokens_are_recognised_in_text(dummy: Tokenizer) -> None:
    ids = dummy.encode("a<|im_end|>")
    assert len(ids) == 2
    assert dummy.decode(ids) == "a"


@pytest.mark.parametrize("vocab_size", [260, 4096, 151_936])
def test_dummies_are_made_for_any_vocabulary(vocab_size: int) -> None:
    assert load_tokenizer("dummy:any", vocab_size).vocab_size == vocab_size


def test_a_dummy_needs_a_vocabulary_of_bytes_and_special_tokens() -> None:
    with pytest.raises(ConfigError, match=r"at least 260 tokens .* got 100"):
        load_tokenizer("dummy:tiny", 100)
    with pytest.raises(ConfigError, match="needs the model's vocabulary size"):
        load_tokenizer("dummy:tiny", None)


def test_a_checkpoints_tokenizer_is_the_one_transformers_loads(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder), VOCAB)
    reference = AutoTokenizer.from_pretrained(folder)
    for text in ("Hello baba meka", "naïve 🎉\n", "<|im_start|>x<|endoftext|>"):
        assert tokenizer.encode(text) == reference.encode(text)
    ids = [300, 1999, 72, 256]
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert tokenizer.eos_token_id == reference.eos_token_id


def test_more_end_tokens_come_from_the_generation_settings(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256]}))
    tokenizer = load_tokenizer(str(folder), VOCAB)
    assert tokenizer.eos_token_id == 256
    assert tokenizer.eos_token_ids == (256, 258)


def test_chat_template(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder), VOCAB)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(InvalidRequestError, match="no such role"):
        tokenizer.apply_chat_template([{"role": "bad", "content": ""}])


def test_no_chat_template_is_a_clear_error(dummy: Tokenizer, tmp_path: Path) -> None:
    build_synthetic_tokenizer(VOCAB).save_pretrained(tmp_path)
    for tokenizer in (dummy, load_tokenizer(str(tmp_path), None)):
        with pytest.raises(InvalidRequestError, match="no chat template"):
            tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(ConfigError, match="no folder /nowhere/at-all"):
        load_tokenizer("/nowhere/at-all", VOCAB)


def test_a_folder_without_tokenizer_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path} has no tokenizer .* copy the tokenizer files"):
        load_tokenizer(str(tmp_path), VOCAB)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}', "\x00\x01"])
def test_a_broken_tokenizer_is_one_clear_sentence(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        load_tokenizer(str(folder), VOCAB)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_with_too_many_ids_is_the_wrong_one(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"wrong tokenizer.*ids go up to 1999.*has 1000 tokens"):
        load_tokenizer(str(folder), 1000)


def test_a_model_may_have_more_ids_than_its_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder), VOCAB + 500)
    assert tokenizer.decode([300, VOCAB + 1, 301]) == tokenizer.decode([300, 301])


def test_a_tokenizer_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"{tmp_path}: the tokenizer's decoder .WordPiece. is not supported"):
        load_tokenizer(str(tmp_path), 100)
