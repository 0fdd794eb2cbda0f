"""Tokens to text while they come: never half a character, never a part of a stop string.

Text is released once no further token can change it. What a token contributes is looked up, so a token costs the same
however long the text before it is.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from typing import Protocol

import tokenizers

from backend.errors import ConfigError

REPLACEMENT = "\ufffd"
#: A run of SentencePiece byte tokens is decoded as a whole, for one bad byte makes all of it U+FFFD. Text in a script
#: that the vocabulary lacks would never stream that way: of longer runs the complete characters are released.
MAX_HELD_BYTES = 64


class TokenPieces:
    """What each token contributes to the text, for the two kinds of decoder that language models use.

    Byte-level BPE (Qwen, OLMoE, …): a token is a string of bytes. SentencePiece (Mixtral, …): a token is text, or a
    single byte written <0xE2>, and one space at the very beginning of a text is dropped.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Raises ConfigError if the tokenizer's decoder is of another kind."""
        self._backend = backend
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._cache: dict[int, bytes | str] = {}
        steps = _decoder_steps(backend)
        kinds = [step["type"] for step in steps]
        self.byte_level = kinds == ["ByteLevel"]
        #: Whether a space at the beginning of a text is dropped.
        self.drops_first_space = kinds[-1:] == ["Strip"]
        self._byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
        self._space = ""
        if not self.byte_level:
            self._space = _sentencepiece_space(steps)
            if not self._space:
                raise ConfigError(
                    f"the tokenizer's decoder ({' + '.join(kinds) or 'none'}) is not supported: byte-level BPE "
                    "(ByteLevel) and SentencePiece (Replace + ByteFallback + Fuse, then possibly Strip) are"
                )

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def __getitem__(self, token_id: int) -> bytes | str:
        """The token's bytes (always, if `byte_level`; else of byte tokens only) or text; empty for an unknown id."""
        piece = self._cache.get(token_id)
        if piece is None:
            piece = self._cache[token_id] = self._piece(self._backend.id_to_token(token_id) or "")
        return piece

    def _piece(self, token: str) -> bytes | str:
        if self.byte_level:
            if all(char in self._byte_of for char in token):
                return bytes(self._byte_of[char] for char in token)
            return token.encode("utf-8")
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass  # looks like a byte token and is none
        return token.replace(self._space, " ")

    def text(self, token_id: int) -> str:
        """One token as text, for logprobs: special tokens in full, U+FFFD for a part of a character."""
        piece = self[token_id]
        return piece if isinstance(piece, str) else piece.decode("utf-8", "replace")


class HasPieces(Protocol):
    """What a Detokenizer needs of a tokenizer; `pieces` is best made once, for it caches."""

    @property
    def pieces(self) -> TokenPieces: ...


class Detokenizer:
    """Turns the output tokens of one sequence into text.

    `stopped` says that a stop string was found; text ends before it and later tokens are ignored. `num_tokens` counts
    the tokens up to and including the one that completed the stop string. `finished` is true once everything was
    released.
    """

    def __init__(
        self,
        tokenizer: HasPieces,
        stop: Iterable[str] = (),
        skip_special_tokens: bool = True,
        *,
        min_tokens: int = 0,
        continues: bool = False,
    ) -> None:
        """Begin a text.

        Args:
            tokenizer: whose tokens these are.
            stop: stop strings; of those that end at the same character the longest counts.
            skip_special_tokens: leave special tokens out of the text.
            min_tokens: stop strings are looked for in the text after this many tokens only.
            continues: the text continues another one, so a space at its beginning stays (SentencePiece).
        """
        self._pieces = tokenizer.pieces
        self._text = (
            _ByteText() if self._pieces.byte_level else _PieceText(self._pieces.drops_first_space and not continues)
        )
        self._stop = _StopStrings(stop)
        self._skip_special_tokens = skip_special_tokens
        self._min_tokens = min_tokens
        self.num_tokens = 0
        self.stopped = False
        self.finished = False

    def append(self, token_ids: Iterable[int], finished: bool) -> str:
        """Add tokens; returns the text that is final now and was not returned before."""
        released = []
        for token_id in token_ids:
            if self.stopped or self.finished:
                break
            self.num_tokens += 1
            if not (self._skip_special_tokens and self._pieces.is_special(token_id)):
                released.append(self._release(self._text.add(self._pieces[token_id])))
        if finished and not self.finished:
            self.finished = True
            if not self.stopped:
                released.append(self._release(self._text.end()))
            if not self.stopped:
                released.append(self._stop.held)
        return "".join(released)

    def decode_token(self, token_id: int) -> str:
        """One token as text, for logprobs."""
        return self._pieces.text(token_id)

    def _release(self, text: str) -> str:
        if self.num_tokens <= self._min_tokens:
            return text
        released, self.stopped = self._stop.feed(text)
        return released


class _ByteText:
    """Bytes to text; each maximal part of an ill-formed sequence becomes one U+FFFD, as in Unicode's recommendation."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, piece: bytes) -> str:
        return self._decoder.decode(piece)

    def end(self) -> str:
        return self._decoder.decode(b"", True)


class _PieceText:
    """Pieces of text and single bytes to text; each byte of an ill-formed run of bytes becomes U+FFFD."""

    def __init__(self, drop_space: bool) -> None:
        self._drop_space = drop_space
        self._run = b""

    def add(self, piece: bytes | str) -> str:
        if isinstance(piece, str):
            return self._begun(self._end_run() + piece) if piece else ""
        self._run += piece
        return self._begun(self._end_run(final=False)) if len(self._run) > MAX_HELD_BYTES else ""

    def end(self) -> str:
        return self._begun(self._end_run())

    def _end_run(self, final: bool = True) -> str:
        """The bytes held so far as text; if more may come, an incomplete character at the end stays."""
        try:
            text, used = codecs.utf_8_decode(self._run, "strict", final)
        except UnicodeDecodeError:
            text, used = REPLACEMENT * len(self._run), len(self._run)
        self._run = self._run[used:]
        return text

    def _begun(self, text: str) -> str:
        if text and self._drop_space:
            self._drop_space = False
            return text.removeprefix(" ")
        return text


class _StopStrings:
    """Finds stop strings in text that comes in parts (Knuth, Morris, Pratt), holding back what may yet become one.

    `held` is the longest end of the text that begins a stop string.
    """

    def __init__(self, stop: Iterable[str]) -> None:
        self._patterns = [(text, _borders(text)) for text in stop]
        self._matched = [0] * len(self._patterns)
        self.held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Returns the text that cannot belong to a stop string any more, and whether one was completed."""
        if not self._patterns or not text:
            return text, False
        known = self.held + text
        for position, char in enumerate(text, start=len(self.held) + 1):
            complete = 0
            for i, (pattern, borders) in enumerate(self._patterns):
                matched = self._matched[i]
                while matched and pattern[matched] != char:
                    matched = borders[matched - 1]
                matched += pattern[matched] == char
                self._matched[i] = matched
                if matched == len(pattern):
                    complete = max(complete, matched)
            if complete:
                self.held = ""
                return known[: position - complete], True
        final = len(known) - max(self._matched)
        self.held = known[final:]
        return known[:final], False


def _borders(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = borders[length - 1]
        length += pattern[i] == pattern[length]
        borders[i] = length
    return borders


def byte_alphabet() -> list[str]:
    """The printable character by which byte-level BPE (GPT-2) writes each byte 0 … 255."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict]:
    """The decoder of a tokenizer as the steps it consists of."""
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _sentencepiece_space(steps: list[dict]) -> str:
    """The character written for a space by a SentencePiece-like decoder, or "" if the decoder is not one."""
    if [step["type"] for step in steps[:3]] != ["Replace", "ByteFallback", "Fuse"] or len(steps) > 4:
        return ""
    replace, strip = steps[0], steps[3] if len(steps) == 4 else {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if strip != {"type": "Strip", "content": " ", "start": 1, "stop": 0} or replace["content"] != " ":
        return ""
    return replace["pattern"].get("String", "")
