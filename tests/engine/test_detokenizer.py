"""The detokenizer: the parts add up to the whole text, and nothing is released that could still change."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from backend.engine.detokenizer import MAX_HELD_BYTES, REPLACEMENT, Detokenizer, TokenPieces
from backend.errors import ConfigError
from backend.tokenizer import Tokenizer

CORPUS = [
    "Hello world, the stop is near. 你好，世界 🎉🎉 naïve café Привет мир\n\tif x == 1:",
    "a stop, astop, stopped",
] * 3


@cache
def byte_level() -> Tokenizer:
    """A trained byte-level BPE with special and ordinary added tokens, as Qwen and OLMoE have."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("日 本", special=False)])
    return Tokenizer(backend, [backend.token_to_id("<|end|>")])


@cache
def sentencepiece() -> Tokenizer:
    """A BPE with byte fallback and "▁" for spaces, as Mixtral has."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = "▁ ▁Hello ▁the ▁stop st op s t o p . ▁▁ é 你好 🎉 <0xZZ> ab a b\n".split(" ")
    vocab = {piece: i for i, piece in enumerate([*pieces, *words])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(backend, [2])


KINDS = [byte_level, sentencepiece]


def chunked(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """`ids` in chunks of the given sizes (0 allowed), the rest as the last one."""
    chunks = []
    for size in sizes:
        chunks.append(ids[:size])
        ids = ids[size:]
    return [*chunks, ids]


def run(detokenizer: Detokenizer, chunks: list[list[int]]) -> list[str]:
    return [detokenizer.append(chunk, i == len(chunks) - 1) for i, chunk in enumerate(chunks)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120)
@given(data=st.data(), skip=st.booleans())
def test_parts_add_up_to_the_full_decode(kind, data, skip) -> None:
    tokenizer = kind()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=30))
    sizes = data.draw(st.lists(st.integers(0, 4), max_size=8))
    parts = run(Detokenizer(tokenizer, (), skip), chunked(ids, sizes))
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(text=st.text(max_size=20))
def test_any_text_survives_and_no_part_has_half_a_character(kind, text) -> None:
    tokenizer = kind()
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    parts = run(Detokenizer(tokenizer), [[token_id] for token_id in [*ids, ids[-1] if ids else 0]])
    if REPLACEMENT not in whole:
        assert REPLACEMENT not in "".join(parts[:-1])
    so_far = ""
    for part in parts[:-1]:
        so_far += part
        assert whole.startswith(so_far)


def reference_cut(text: str, stop: list[str]) -> str | None:
    """The text before the stop string that is completed first (the longest of those), or None."""
    for end in range(len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))]
    return None


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120)
@given(data=st.data(), stop=st.lists(st.text("stop. ab", min_size=1, max_size=5), min_size=1, max_size=4))
def test_stop_strings_cut_the_text_whatever_the_token_borders(kind, data, stop) -> None:
    tokenizer = kind()
    text = data.draw(st.text("stop. ab", max_size=25))
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    sizes = data.draw(st.lists(st.integers(0, 4), max_size=8))
    detokenizer = Detokenizer(tokenizer, tuple(stop))
    released = ""
    for i, chunk in enumerate(chunks := chunked(ids, sizes)):
        released += detokenizer.append(chunk, i == len(chunks) - 1)
        cut = reference_cut(whole, stop)
        assert (whole if cut is None else cut).startswith(released)
    assert detokenizer.stopped == (cut is not None)
    assert released == (whole if cut is None else cut)
    if detokenizer.stopped:  # num_tokens is the smallest number of tokens whose text holds the stop string
        before = Detokenizer(tokenizer, tuple(stop))
        before.append(ids[: detokenizer.num_tokens - 1], False)
        assert not before.stopped and detokenizer.num_tokens <= len(ids)
    else:
        assert detokenizer.num_tokens == len(ids)


@settings(max_examples=100)
@given(text=st.text("ab", max_size=30), stop=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3))
def test_no_more_is_held_back_than_may_become_a_stop_string(text, stop) -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer, stop)
    released, known = "", ""
    for char in text:
        released += detokenizer.append([tokenizer.encode(char)[0]], False)
        known += char
        if detokenizer.stopped:
            return
        held = max(n for s in stop for n in range(len(s)) if known.endswith(s[:n]))
        assert released == known[: len(known) - held]


def test_stop_string_across_tokens_is_never_seen() -> None:
    tokenizer = byte_level()
    ids = [token_id for char in "say stop now" for token_id in tokenizer.encode(char)]
    detokenizer = Detokenizer(tokenizer, ("stop",))
    parts = [detokenizer.append([token_id], False) for token_id in ids]
    assert parts == ["", "sa", "y", " ", *[""] * 8]  # the first "s" might have begun "stop"
    assert detokenizer.stopped and detokenizer.num_tokens == 8
    assert detokenizer.append(ids, True) == ""
    assert detokenizer.num_tokens == 8


def test_a_character_of_several_tokens_comes_in_one_piece() -> None:
    tokenizer = byte_level()
    party = list("🎉".encode())
    ids = [tokenizer.encode("a")[0], *(byte_token(byte) for byte in party), tokenizer.encode("b")[0]]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.append([token_id], False) for token_id in ids] == ["a", "", "", "", "🎉", "b"]


def byte_token(byte: int) -> int:
    tokenizer = byte_level()
    return next(i for i in range(256) if tokenizer.pieces[i] == bytes([byte]))


@pytest.mark.parametrize("kind", KINDS)
def test_an_unfinished_character_at_the_end_is_replaced(kind) -> None:
    tokenizer = kind()
    first = byte_token(0xF0) if kind is byte_level else 3 + 0xF0
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.append([first], False) == ""
    assert detokenizer.append([], True) == REPLACEMENT
    assert detokenizer.finished
    assert detokenizer.append([first], True) == ""


def test_a_stop_string_may_be_completed_by_what_the_end_releases() -> None:
    detokenizer = Detokenizer(sentencepiece(), ("é",))
    assert detokenizer.append([3 + 0xC3, 3 + 0xA9], True) == ""
    assert detokenizer.stopped and detokenizer.num_tokens == 2


def test_a_long_run_of_byte_tokens_streams() -> None:
    tokenizer = sentencepiece()
    text = "🎉" * 100
    detokenizer = Detokenizer(tokenizer)
    parts = [detokenizer.append([3 + byte], False) for byte in text.encode()]
    assert len("".join(parts)) > 100 - MAX_HELD_BYTES / 4 - 1
    assert "".join(parts) + detokenizer.append([], True) == text


def test_bad_bytes_in_a_run_spoil_all_of_it_as_in_the_tokenizers_library() -> None:
    tokenizer = sentencepiece()
    ids = [3 + byte for byte in (*"é".encode(), 0xFF)]
    detokenizer = Detokenizer(tokenizer)
    assert "".join(run(detokenizer, [[i] for i in ids])) == REPLACEMENT * 3 == tokenizer.decode(ids)


def test_the_first_space_stays_where_a_text_is_continued() -> None:
    tokenizer = sentencepiece()
    ids = tokenizer.encode("Hello the stop", add_special_tokens=False)
    assert Detokenizer(tokenizer).append(ids, True) == "Hello the stop"
    assert Detokenizer(tokenizer, continues=True).append(ids, True) == " Hello the stop"


def test_stop_strings_are_looked_for_after_min_tokens() -> None:
    tokenizer = byte_level()
    ids = [tokenizer.encode(char)[0] for char in "abab"]
    detokenizer = Detokenizer(tokenizer, ("ab",), min_tokens=1)
    assert "".join(detokenizer.append([token_id], False) for token_id in ids) == "ab"
    assert detokenizer.stopped and detokenizer.num_tokens == 4


def test_special_tokens_show_if_wanted() -> None:
    tokenizer = byte_level()
    ids = [*tokenizer.encode("a"), tokenizer.eos_token_id, *tokenizer.encode("b")]
    assert Detokenizer(tokenizer).append(ids, True) == "ab"
    assert Detokenizer(tokenizer, skip_special_tokens=False).append(ids, True) == "a<|end|>b"


def test_single_tokens_for_logprobs() -> None:
    detokenizer = Detokenizer(byte_level())
    assert detokenizer.decode_token(byte_level().eos_token_id) == "<|end|>"
    assert detokenizer.decode_token(byte_token(0xF0)) == REPLACEMENT
    assert detokenizer.decode_token(10**6) == ""
    detokenizer = Detokenizer(sentencepiece())
    assert detokenizer.decode_token(sentencepiece().encode("Hello")[1]) == " Hello"
    assert detokenizer.decode_token(3 + ord("x")) == "x"


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.Metaspace(),
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 0, 1)]
        ),
        decoders.Sequence([decoders.Replace("▁", "_"), decoders.ByteFallback(), decoders.Fuse()]),
    ],
    ids=str,
)
def test_other_decoders_are_refused_by_name(decoder) -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(ConfigError, match=r"decoder .* is not supported"):
        Detokenizer(SimpleNamespace(pieces=TokenPieces(backend)))
