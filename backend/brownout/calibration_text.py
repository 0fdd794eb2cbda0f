"""Calibration text: files of text or of token ids, as token windows that a model is run over.

Read are .txt (one text), .jsonl (an object with "text" a line) and .npy (token ids, uint16 or a signed integer type).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from backend.errors import ConfigError
from backend.tokenizer import Tokenizer

#: Longest stretch of a text that is tokenized at once, in characters.
_PIECE_CHARACTERS = 20_000
_ID_TYPES = ("uint16", "int32", "int64")


def read_calibration(
    files: Sequence[Path], tokenizer: Tokenizer | None, vocab_size: int, tokens: int, window: int, seed: int
) -> list[list[int]]:
    """Windows of at most `window` token ids, `tokens` in all or as many as there are, drawn evenly from the files.

    The documents of a file come in a random order fixed by `seed`; a window never spans two of them. Raises ConfigError
    naming a file that cannot be used.
    """
    sources = [
        _windows(path, tokenizer, vocab_size, window, random.Random(f"{seed} {i}")) for i, path in enumerate(files)
    ]
    taken = [0] * len(sources)
    open_sources = set(range(len(sources)))
    windows: list[list[int]] = []
    while open_sources and sum(taken) < tokens:
        source = min(open_sources, key=lambda i: (taken[i], i))  # the file that has given least
        ids = next(sources[source], None)
        if ids is None:
            open_sources.remove(source)
            continue
        windows.append(ids[: tokens - sum(taken)])
        taken[source] += len(windows[-1])
    return windows


def require_tokens(windows: Sequence[Sequence[int]], needed: int, why: str) -> None:
    """Raise ConfigError unless the windows have at least `needed` tokens."""
    found = sum(map(len, windows))
    if found < needed:
        raise ConfigError(f"the text has {found} tokens, but {why} needs at least {needed}: give more text")


def _windows(
    path: Path, tokenizer: Tokenizer | None, vocab_size: int, window: int, rng: random.Random
) -> Iterator[list[int]]:
    if path.suffix == ".npy":
        ids = _read_ids(path, vocab_size)
        starts = list(range(0, len(ids), window))
        rng.shuffle(starts)
        for start in starts:
            yield ids[start : start + window].tolist()
        return
    if tokenizer is None:
        raise ConfigError(
            f"calibration file {path} is text, but the checkpoint has no tokenizer: give token ids (.npy)"
        )
    texts = _read_texts(path)
    pieces = [text[i : i + _PIECE_CHARACTERS] for text in texts for i in range(0, len(text), _PIECE_CHARACTERS)]
    rng.shuffle(pieces)
    for piece in pieces:
        ids = tokenizer.encode(piece)
        if ids and max(ids) >= vocab_size:
            raise ConfigError(
                f"the tokenizer gives token {max(ids)}, but the model's vocabulary has {vocab_size} tokens"
            )
        for start in range(0, len(ids), window):
            yield ids[start : start + window]


def _read_ids(path: Path, vocab_size: int) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"calibration file {path} cannot be read: {error}") from None
    if not isinstance(ids, np.ndarray) or ids.dtype.name not in _ID_TYPES:
        raise ConfigError(f"calibration file {path} must hold token ids of type {', '.join(_ID_TYPES)}")
    ids = ids.reshape(-1).astype(np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise ConfigError(
            f"calibration file {path} has token ids from {ids.min()} to {ids.max()}, the vocabulary has {vocab_size} tokens"
        )
    return ids


def _read_texts(path: Path) -> list[str]:
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"calibration file {path} must end in .txt, .jsonl or .npy")
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"calibration file {path} cannot be read: {error}") from None
    if path.suffix == ".txt":
        return [content] if content.strip() else []
    texts = []
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                texts.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f'calibration file {path}: line {number} is not an object with "text"') from None
            if not isinstance(texts[-1], str):
                raise ConfigError(f'calibration file {path}: "text" of line {number} is not text')
    return texts
