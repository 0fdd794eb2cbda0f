"""Text by domain: a corpus folder where there is one, this Python's own sources, and text made up here."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import sysconfig
from functools import lru_cache
from pathlib import Path

from backend.demo.smalltalk import SMALLTALK
from backend.demo.template import chat_text

DOMAINS = ("prose", "docs", "code", "chat", "math")
#: Folder of the corpus for each domain that is read from it.
_FOLDERS = {"prose": ("prose_en",), "docs": ("docs_en",), "chat": ("chat_en", "instruct_en"), "math": ("math",)}
#: One in this many documents is held out.
_HELD_OUT_MODULUS = 20
_SPEAKERS = {"User": "user", "Assistant": "assistant", "User 1": "user", "User 2": "assistant"}
#: Longest stretch of a document kept together, in characters: long books must not fall on one side as a whole.
_PIECE = 20_000


def documents(domain: str, corpus: Path | None, seed: int = 0) -> list[str]:
    """The documents of a domain in a shuffled but fixed order; may be empty without a corpus folder (prose)."""
    found: list[str] = []
    for folder in _FOLDERS.get(domain, ()):
        if corpus is not None and (corpus / folder).is_dir():
            found += _read(corpus / folder)
    if domain == "code":
        found += [source for source, _ in _library()]
    if domain == "docs":
        found += [text for _, text in _library() if len(text) > 200]
    if domain == "chat":
        found = [chat_text(turns) if (turns := _turns(text)) else text for text in found]
        found += [chat_text([("user", asked), ("assistant", said)]) for asked, said in SMALLTALK] * 4
    if domain == "math" and not found:
        found += _arithmetic(random.Random(seed), 5000)
    pieces = [text[start : start + _PIECE] for text in found for start in range(0, len(text), _PIECE)]
    random.Random(seed).shuffle(pieces)
    return pieces


def is_held_out(text: str) -> bool:
    """Whether a document is kept for measuring perplexity."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % _HELD_OUT_MODULUS == 0


def _read(folder: Path) -> list[str]:
    lines = (line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text("utf-8").split("\n"))
    return [json.loads(line)["text"] for line in lines if line.strip()]


@lru_cache(maxsize=1)
def _library() -> list[tuple[str, str]]:
    """(source, its docstrings) of the standard library's modules, without tests and third-party packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {
        "test",
        "tests",
        "site-packages",
        "dist-packages",
        "idle_test",
        "__pycache__",
        "lib2to3",
        "encodings",
        "turtledemo",
    }
    found = []
    for path in sorted(root.rglob("*.py")):
        if skipped.intersection(path.relative_to(root).parts):
            continue
        try:
            source = path.read_text("utf-8")
            tree = ast.parse(source)
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
            continue
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes)]
        found.append((source, "\n\n".join(text for text in texts if text)))
    return found


def _turns(text: str) -> list[tuple[str, str]]:
    """A corpus dialogue or instruction as (role, words) turns; empty if it is neither."""
    if text.startswith("### Instruction:"):
        asked, _, said = text.partition("### Response:")
        asked = asked.replace("### Instruction:", "").replace("### Input:", "").strip()
        return [("user", asked), ("assistant", said.strip())]
    turns: list[tuple[str, str]] = []
    for line in text.splitlines():
        speaker, _, words = line.partition(": ")
        if speaker not in _SPEAKERS:
            if turns:
                turns[-1] = (turns[-1][0], f"{turns[-1][1]} {line}")
            continue
        role = _SPEAKERS[speaker]
        if turns and turns[-1][0] == role:
            turns[-1] = (role, f"{turns[-1][1]} {words}")
        else:
            turns.append((role, words))
    return turns


def _arithmetic(rng: random.Random, number: int) -> list[str]:
    """Sheets of a dozen sums."""
    sheets = []
    for _ in range(number):
        pairs = [(rng.randint(0, 999), rng.randint(0, 999)) for _ in range(12)]
        lines = (f"{a} + {b} = {a + b}" if rng.random() < 0.5 else f"{a} - {b} = {a - b}" for a, b in pairs)
        sheets.append("\n".join(lines))
    return sheets
