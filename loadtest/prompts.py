"""Prompts of a load: taken from a file, or made to a length. The same seed and number give the same prompt."""

from __future__ import annotations

import bisect
import random
from pathlib import Path
from typing import Protocol

import msgspec

from backend.errors import ConfigError
from backend.tokenizer import Tokenizer

#: Common English words; most tokenizers have each as one token with its leading space.
_WORDS = (
    "the of and to in a is that for it was on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more her two like him see time could no make than first been its who now people my made over "
    "did down only way find use may water long little very after words called just where most know"
).split()


class Prompts(Protocol):
    """Where prompts come from."""

    def text(self, number: int, input_tokens: int) -> str: ...


class GeneratedPrompts:
    """Random common words, `input_tokens` tokens long.

    With the served checkpoint's tokenizer the length is exact wherever words can add up to it; without one a word counts as
    a token. No two prompts of a run begin alike for long, so that the prefix cache helps none of them.
    """

    def __init__(self, seed: int, tokenizer: Tokenizer | None = None) -> None:
        self._seed = seed
        self._tokenizer = tokenizer

    def text(self, number: int, input_tokens: int) -> str:
        rng = random.Random(f"prompt {self._seed} {number}")
        words = [rng.choice(_WORDS) for _ in range(input_tokens)]
        return " ".join(words if self._tokenizer is None else self._cut(words, input_tokens))

    def _cut(self, words: list[str], tokens: int) -> list[str]:
        """The most words (at least one) that are no more than `tokens` long, filled up with the shortest word there is."""
        kept = bisect.bisect_right(range(1, len(words) + 1), tokens, key=lambda n: self._count(words[:n]))
        words = words[: max(1, kept)]
        while self._count([*words, "a"]) <= tokens:
            words.append("a")
        return words

    def _count(self, words: list[str]) -> int:
        return len(self._tokenizer.encode(" ".join(words)))


class FilePrompts:
    """Prompts of a JSON-lines file (key `text` or `prompt`), drawn at random; the schedule's input lengths do not apply."""

    def __init__(self, path: Path, seed: int) -> None:
        """Raises ConfigError for a file that cannot be read, or a line without text."""
        self._seed = seed
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise ConfigError(f"prompts {path} cannot be read: {error}") from None
        self._texts = [self._parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not self._texts:
            raise ConfigError(f"prompts {path} has no line")

    def text(self, number: int, input_tokens: int) -> str:
        return random.Random(f"prompt {self._seed} {number}").choice(self._texts)

    @staticmethod
    def _parse(path: Path, number: int, line: bytes) -> str:
        try:
            row = msgspec.json.decode(line, type=dict)
            text = row["text"] if "text" in row else row["prompt"]
        except (msgspec.DecodeError, KeyError):
            text = None
        if not isinstance(text, str) or not text:
            raise ConfigError(f'prompts {path}, line {number}: expected a JSON object with a "text"')
        return text
