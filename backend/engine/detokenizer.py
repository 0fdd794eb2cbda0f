"""Tokens to text while they come: never half a character, never a part of a stop string.

Text is released once no further token can change it. A token's contribution is looked up as bytes or text and cached, so
a token costs the same however long the text is.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from typing import Protocol

import tokenizers

from backend.errors import ConfigError

REPLACEMENT = "\ufffd"
#: A run of byte tokens (SentencePiece) decodes as a whole: one bad byte makes all of it U+FFFD. A longer run is released
#: character by character all the same, or text made of byte tokens only would never stream.
MAX_HELD_BYTES = 64


class HasPieces(Protocol):
    """What `Detokenizer` needs of a tokenizer."""

    @property
    def pieces(self) -> TokenPieces: ...


class TokenPieces:
    """What each token of a tokenizer contributes to the text, for the two kinds of decoder that language models use.

    Byte-level BPE (Qwen, OLMoE, …): every token is a string of bytes. SentencePiece (Mixtral, …): a token is text, with
    "▁" for a space, or a single byte written <0xE2>; one space at the beginning of the whole text is dropped.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Raises ConfigError if the tokenizer's decoder is of another kind."""
        self._backend = backend
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._cache: dict[int, bytes | str] = {}
        steps = _decoder_steps(backend)
        kinds = [step["type"] for step in steps]
        self.byte_level = kinds == ["ByteLevel"]
        #: Leading spaces dropped from a text; -1: all of the first token's.
        self.strip_left = 0
        self._replacements: list[tuple[str, str]] = []
        self._byte_tokens = False
        if self.byte_level:
            self._byte_of = {char: byte for byte, char in enumerate(_byte_alphabet())}
            return
        for step in steps:
            if not self._understands(step):
                raise ConfigError(
                    f"the tokenizer's decoder ({', '.join(kinds) or 'none'}) is not supported: only byte-level BPE and "
                    f"SentencePiece (Metaspace, ByteFallback) are"
                )

    def _understands(self, step: dict) -> bool:
        """Take one step of a SentencePiece-like decoder into account."""
        kind = step["type"]
        if kind == "Replace" and "String" in step["pattern"]:
            self._replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace":
            self._replacements.append((step["replacement"], " "))
            self.strip_left = 0 if step["prepend_scheme"] == "never" else -1
        elif kind == "ByteFallback":
            self._byte_tokens = True
        elif kind == "Strip" and step["content"] == " " and step["stop"] == 0:
            self.strip_left = step["start"]
        else:
            return kind == "Fuse"
        return True

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def __getitem__(self, token_id: int) -> bytes | str:
        """The token's bytes (always, if `byte_level`; else byte tokens only) or text. Unknown ids are empty."""
        piece = self._cache.get(token_id)
        if piece is None:
            piece = self._cache[token_id] = self._piece(self._backend.id_to_token(token_id) or "")
        return piece

    def _piece(self, token: str) -> bytes | str:
        if self.byte_level:
            try:
                return bytes([self._byte_of[char] for char in token])
            except KeyError:
                return token.encode("utf-8")
        for old, new in self._replacements:
            token = token.replace(old, new)
        if self._byte_tokens and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                return token
        return token

    def text(self, token_id: int) -> str:
        """One token as text, for logprobs: special tokens in full, U+FFFD for parts of a character."""
        piece = self[token_id]
        return piece if isinstance(piece, str) else piece.decode("utf-8", "replace")
