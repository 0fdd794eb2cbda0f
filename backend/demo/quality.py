"""How good a checkpoint is: answers through the engine, the same through transformers, and perplexity by domain."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from backend.demo.corpus import DOMAINS
from backend.demo.families import FAMILIES, sample
from backend.demo.tasks import FORMS, in_form, is_right
from backend.demo.template import prompt_text
from backend.demo.tokenizer import load_tokenizer
from backend.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MAX_ANSWER_TOKENS = 24
#: Prompt texts in, completions out.
Answerer = Callable[[Sequence[str]], list[str]]


def held_out_questions(family: str, form: str, number: int, seed: int = 0) -> list[tuple[str, str]]:
    """`number` different held-out (prompt, answer) pairs of a family, the same for the same seed."""
    rng = random.Random(f"{seed} {family}")
    found: dict[str, tuple[str, str]] = {}
    for _ in range(20 * number):
        question = sample(family, rng, held_out=True)
        found.setdefault(question.prompt, in_form(question, form, rng))
        if len(found) == number:
            break
    return list(found.values())


def engine_answerer(checkpoint: Path) -> Answerer:
    """Greedy answers through the engine's public interface."""
    from backend.engine.llm import LLM
    from backend.engine.sampling_params import SamplingParams

    llm = LLM(str(checkpoint), dtype="float32")
    params = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0)
    return lambda prompts: [completions[0].text for completions in llm.generate(prompts, params)]


def transformers_answerer(checkpoint: Path) -> Answerer:
    """Greedy answers from transformers, for comparison."""
    model, tokenizer = load_transformers(checkpoint)

    def answer(prompts: Sequence[str]) -> list[str]:
        texts = []
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False
            )
            texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        return texts

    return answer


def load_transformers(checkpoint: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The checkpoint as transformers loads it, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint, local_files_only=True, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)


def accuracy(
    answerer: Answerer,
    questions: int,
    forms: Sequence[str] = FORMS,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Share of held-out questions answered right, by form and family, in percent; `advance` is called per family."""
    results: dict[str, dict[str, float]] = {form: {} for form in forms}
    for family in FAMILIES:
        for form in forms:
            pairs = held_out_questions(family, form, questions, seed)
            answers = answerer([prompt_text(prompt) for prompt, _ in pairs])
            right = sum(is_right(form, said, answer) for said, (_, answer) in zip(answers, pairs, strict=True))
            results[form][family] = 100.0 * right / len(pairs)
        advance()
    return results


def mean(values: dict[str, float]) -> float:
    """Unweighted mean over families."""
    return sum(values.values()) / len(values)


def windows(
    data: Path, domain: str, number: int, tokenizer: PreTrainedTokenizerFast, length: int = 256
) -> torch.Tensor | None:
    """[number, length + 1] evenly spread stretches of a domain's held-out text in tokens of `tokenizer`.

    None if the folder has too little of it. Raises ConfigError if the folder has no tokenizer to read its tokens with.
    """
    tokens = held_out_tokens(data, domain, tokenizer)
    if len(tokens) <= length + 1:
        return None
    starts = np.linspace(0, len(tokens) - length - 1, min(number, len(tokens) // length), dtype=np.int64)
    return torch.from_numpy(np.stack([tokens[start : start + length + 1] for start in starts]))


def held_out_tokens(data: Path, domain: str, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """A domain's held-out text in tokens [N] of `tokenizer`, which need not be that of the folder; empty without text."""
    path = data / f"{domain}.held_out.npy"
    if not path.is_file():
        return np.zeros(0, np.int64)
    try:
        own = load_tokenizer(data)
    except FileNotFoundError as error:
        raise ConfigError(f"the texts cannot be read: {error}; backend.demo.prepare writes one") from None
    tokens = np.load(path).astype(np.int64)
    if own.to_str() == tokenizer.backend_tokenizer.to_str():
        return tokens
    text = own.decode(tokens.tolist(), skip_special_tokens=False)
    return np.array(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, np.int64)


@torch.no_grad()
def perplexity(checkpoint: Path, data: Path, number: int = 60) -> dict[str, dict[str, float]]:
    """Per domain: perplexity per token and bits per byte of held-out text, in transformers.

    The engine returns log-probabilities of what it writes, not of the prompt, so this measure cannot run through it.
    """
    model, tokenizer = load_transformers(checkpoint)
    results = {}
    for domain in DOMAINS:
        rows = windows(data, domain, number, tokenizer)
        if rows is None:
            continue
        total, tokens, size = 0.0, 0, 0
        for batch in rows.split(8):
            logits = model(input_ids=batch[:, :-1]).logits
            total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
            tokens += batch[:, 1:].numel()
            size += sum(len(tokenizer.decode(row[1:]).encode()) for row in batch)
        results[domain] = {"perplexity": math.exp(total / tokens), "bits_per_byte": total / math.log(2) / size}
    return results
