"""Domain-mixed traffic to record: the demo's questions and, with prepared text, passages the checkpoint was not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backend.demo.prompts import make_prompts
from backend.demo.tokenizer import load_tokenizer
from backend.errors import ConfigError

_SUFFIX = ".held_out.npy"


@dataclass(frozen=True)
class Traffic:
    """Prompts and the domain of each."""

    prompts: list[str]
    domains: list[str]


def demo_questions(repeats: int, seed: int) -> Traffic:
    """The demo's kinds of prompts, whose families are the domains; every repeat has new questions."""
    prompts = [prompt for repeat in range(repeats) for prompt in make_prompts(seed + repeat)]
    # The chat is the same in every set: once is enough, or held-out sequences would not be new.
    prompts = list(dict.fromkeys(prompts))
    return Traffic([prompt.text for prompt in prompts], [prompt.family for prompt in prompts])


def mixed(data: Path, passages: int, length: int, repeats: int, seed: int) -> Traffic:
    """Passages of `length` tokens from every held-out text of `backend.demo.prepare`, and questions as one more domain.

    Passages are spread evenly over each text and do not overlap. They are texts: the folder has a tokenizer of its own, which
    need not be that of the checkpoint that is recorded. Raises ConfigError if there are no texts or one is short.
    """
    questions = demo_questions(repeats, seed)
    prompts = list(questions.prompts)
    domains = [family if family == "chat" else "questions" for family in questions.domains]
    files = sorted(data.glob(f"*{_SUFFIX}"))
    if not files:
        raise ConfigError(f"{data} has no texts (*{_SUFFIX}); backend.demo.prepare writes them")
    try:
        tokenizer = load_tokenizer(data)
    except FileNotFoundError as error:
        raise ConfigError(f"the texts cannot be read: {error}; backend.demo.prepare writes one") from None
    for file in files:
        try:
            tokens = np.load(file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"text {file} cannot be read: {error}") from None
        if len(tokens) < passages * length:
            raise ConfigError(f"text {file} has {len(tokens)} tokens, {passages} passages of {length} need more")
        for start in np.linspace(0, len(tokens) - length, passages).astype(int):
            prompts.append(tokenizer.decode(tokens[start : start + length].tolist(), skip_special_tokens=False))
            domains.append(file.name.removesuffix(_SUFFIX))
    order = np.random.default_rng(seed).permutation(len(prompts))
    return Traffic([prompts[i] for i in order], [domains[i] for i in order])
