"""Calibration files: evenly mixed, fixed by the seed, and what is wrong is named."""

import json

import numpy as np
import pytest

from backend.brownout.calibration_text import read_calibration
from backend.errors import ConfigError


class _Characters:
    """A tokenizer with a token per character."""

    def encode(self, text):
        return [ord(c) for c in text]


_TOKENIZER = _Characters()


def _read(*files, tokens=1000, window=8, seed=0, vocab=256, tokenizer=_TOKENIZER):
    return read_calibration(list(files), tokenizer, vocab, tokens, window, seed)


def test_files_give_alike_and_a_window_stays_in_its_document(tmp_path):
    np.save(tmp_path / "a.npy", np.full(500, 97, np.uint16))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": "b" * 5}) + "\n" for _ in range(100)))
    (tmp_path / "c.txt").write_text("c" * 30)
    windows = _read(tmp_path / "a.npy", tmp_path / "b.jsonl", tmp_path / "c.txt", tokens=300)
    count = {letter: sum(len(w) for w in windows if w[0] == ord(letter)) for letter in "abc"}
    assert sum(count.values()) == 300 and count["c"] == 30 and abs(count["a"] - count["b"]) <= 8
    assert all(len(set(w)) == 1 and len(w) <= 8 for w in windows)


def test_the_seed_fixes_which_windows_are_drawn(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(200, dtype=np.int32))
    path = tmp_path / "a.npy"
    assert _read(path, tokens=50) == _read(path, tokens=50) != _read(path, tokens=50, seed=1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b"{}", r"x\.json must end in \.txt, \.jsonl or \.npy"),
        ("x.jsonl", b'{"text": "a"}\n{"a": 1}\n', r"x\.jsonl: line 2 is not an object"),
        ("x.jsonl", b'{"text": 3}', r"line 1 is not text"),
        ("x.txt", b"\xff\xfe\xff", r"x\.txt cannot be read"),
        ("x.npy", b"nothing", r"x\.npy cannot be read"),
    ],
)
def test_an_unusable_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        _read(tmp_path / name)


def test_ids_of_another_vocabulary_or_type_and_text_without_a_tokenizer_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1, 300], np.uint16))
    with pytest.raises(ConfigError, match="token ids from 1 to 300, the vocabulary has 256"):
        _read(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.zeros(3))
    with pytest.raises(ConfigError, match="must hold token ids of type uint16"):
        _read(tmp_path / "b.npy")
    (tmp_path / "c.txt").write_text("text")
    with pytest.raises(ConfigError, match="no tokenizer"):
        _read(tmp_path / "c.txt", tokenizer=None)
    with pytest.raises(ConfigError, match="cannot be read"):
        _read(tmp_path / "missing.txt")
