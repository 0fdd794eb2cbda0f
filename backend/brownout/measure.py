"""Quality of a checkpoint under its present brownout settings, through the serving engine, at a stated batch composition."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from backend.brownout.divergence import Divergence
from backend.brownout.settings import Settings
from backend.demo.families import FAMILIES
from backend.demo.quality import MAX_ANSWER_TOKENS, held_out_questions
from backend.demo.tasks import FORMS, is_right
from backend.demo.template import prompt_text
from backend.engine.engine import Engine
from backend.engine.llm import LLM
from backend.engine.request import Request, RequestEnded
from backend.engine.sampling_params import SamplingParams
from backend.engine.scoring import Scorer
from backend.errors import ConfigError

#: A point whose share of replaced assignments is below this part of 1 - threshold cannot be compared with others.
LEAST_SHARE = 0.95


class Meter:
    """What the steps of a measurement were made of; `observe` is called after every step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.steps = self.tokens = self.replaced = 0
        self.slots: np.ndarray | float = 0.0
        self.assignments = 0.0
        config = engine.runner.model.config
        self._per_token = sum(config.moe_layers) * config.top_k

    def observe(self) -> None:
        model = self.engine.runner.model
        slots, assignments = model.slot_usage()
        replaced = model.last_replaced
        assert replaced is not None
        self.steps += 1
        self.tokens += len(replaced)
        self.replaced += int(replaced.sum())
        self.slots = self.slots + np.array(slots, float)
        self.assignments += assignments * len(replaced)

    def slots_by_layer(self) -> list[float]:
        """Active slots of each MoE layer, mean over the steps."""
        return (np.atleast_1d(self.slots) / max(1, self.steps)).tolist()

    def result(self, nominal: float | None) -> dict[str, float | bool | list[float]]:
        """Share of assignments that others than their own experts served, beside the `nominal` one (None: there is none)."""
        share = self.replaced / max(1, self.tokens * self._per_token)
        by_layer = self.slots_by_layer()
        found: dict[str, float | bool | list[float]] = {
            "united_share": share,
            "active_slots": sum(by_layer) / len(by_layer),
            "active_slots_by_layer": by_layer,
            "assignments_per_token": self.assignments / max(1, self.tokens),
            "tokens_per_step": self.tokens / max(1, self.steps),
        }
        if nominal is not None:
            found |= {"nominal_share": nominal, "comparable": share >= LEAST_SHARE * nominal}
        return found


def nominal_share(engine: Engine, prefill_tokens: int, decode_tokens: int) -> float | None:
    """The share of assignments that the thresholds in force give up; None where the mechanism has no such meaning."""
    if engine.settings.mechanism not in ("united", "drop"):
        return None
    model = engine.runner.model
    table = model.thresholds[[i for i, has_experts in enumerate(model.config.moe_layers) if has_experts]]
    prefill, decode = (1 - table.double().mean(0)[:2]).tolist()
    return (prefill * prefill_tokens + decode * decode_tokens) / max(1, prefill_tokens + decode_tokens)


def apply(llm: LLM, settings: Settings) -> None:
    """Set the settings and forget what the KV cache holds from others."""
    llm.set_settings(settings)
    llm.engine.blocks.clear_cache()


def apply_by_layer(llm: LLM, settings: Settings, thresholds: Sequence[float]) -> None:
    """Set the settings, but with a threshold of its own, that of both phases, for each MoE layer, until the next change."""
    apply(llm, settings)
    model = llm.engine.runner.model
    table, own = [settings.by_class()] * model.config.num_layers, iter(thresholds)
    for layer, has_experts in enumerate(model.config.moe_layers):
        if has_experts:
            theta = next(own)
            table[layer] = (theta, theta, *table[layer][2:])
    model.set_thresholds(table)


def complete(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    after_step: Callable[[], None],
    is_enough: Callable[[int, int], bool] = lambda prompt, token: False,
) -> list[list[int]]:
    """Tokens made from each prompt, with as many at once as the engine's max_running allows.

    `is_enough` is told of every token made from a prompt, by number, and says whether no more are wanted. No step is launched
    ahead: after each one the model's last step is the one whose tokens have just been read.
    """
    engine, made = llm.engine, [[] for _ in prompts]  # type: list[list[int]]
    with _nothing_ahead(engine):
        waiting = 0
        while waiting < len(prompts) or engine.has_work:
            while waiting < len(prompts) and engine.has_room:
                engine.add(Request(waiting, list(prompts[waiting]), params))
                waiting += 1
            for event in engine.step():
                if isinstance(event, RequestEnded):
                    raise RuntimeError(f"prompt {event.request_id}: {event.message}")
                made[event.request_id].append(event.token_id)
                if is_enough(event.request_id, event.token_id) and event.finish_reason is None:
                    engine.abort(event.request_id)
            after_step()
    return made


@contextmanager
def _nothing_ahead(engine: Engine) -> Iterator[None]:
    overlap, engine.overlap = engine.overlap, False
    try:
        yield
    finally:
        engine.overlap = overlap


@dataclass(frozen=True)
class Asked:
    """A question of a demo family in one of its forms, as tokens."""

    family: str
    form: str
    prompt: list[int]
    answer: str


def demo_questions(llm: LLM, number: int, seed: int, mixed: bool = True) -> list[Asked]:
    """`number` held-out questions of every family and form: families mixed, or one after another."""
    asked = [
        Asked(family, form, llm.tokenizer.encode(prompt_text(prompt)), answer)
        for family in FAMILIES
        for form in FORMS
        for prompt, answer in held_out_questions(family, form, number, seed)
    ]
    if mixed:
        random.Random(seed).shuffle(asked)
    return asked


def ask(llm: LLM, questions: Sequence[Asked]) -> dict[str, object]:
    """Share of right answers in percent by form and family, with the steps' composition."""
    meter = Meter(llm.engine)
    params = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0)
    made = complete(llm, [q.prompt for q in questions], params, meter.observe)
    right: dict[str, dict[str, list[bool]]] = {form: {family: [] for family in FAMILIES} for form in FORMS}
    for question, tokens in zip(questions, made, strict=True):
        said = llm.tokenizer.decode(tokens)
        right[question.form][question.family].append(is_right(question.form, said, question.answer))
    prefill = sum(len(q.prompt) for q in questions)
    nominal = nominal_share(llm.engine, prefill, sum(len(tokens) - 1 for tokens in made))
    scores = {form: {family: 100.0 * sum(r) / len(r) for family, r in by.items() if r} for form, by in right.items()}
    return {"accuracy": scores, **meter.result(nominal)}


def relative_loss(full: Mapping[str, float], found: Mapping[str, float]) -> dict[str, object]:
    """Loss in percent of the full model's score: mean over tasks, the worst task, and every one; tasks at 0 do not count."""
    loss = {task: 100.0 * (1.0 - found[task] / score) for task, score in full.items() if score > 0}
    if not loss:
        return {"mean": 0.0, "worst": 0.0, "worst_task": None, "by_task": {}}
    worst = max(loss, key=lambda task: loss[task])
    return {"mean": sum(loss.values()) / len(loss), "worst": loss[worst], "worst_task": worst, "by_task": loss}


class Text:
    """Windows of several domains, scored in one order: domains side by side if `mixed`, else one after another."""

    def __init__(
        self,
        domains: Mapping[str, Sequence[Sequence[int]]],
        batch: int,
        decode: bool = False,
        mixed: bool = True,
        after: int | None = None,
    ) -> None:
        """`batch` windows at once; `decode`: token by token under the decode threshold, else in chunks under that of prefill.

        Of a window with the token `after` in it only what follows the last one is scored: of a chat the last answer.
        """
        self.domains, self.batch, self.decode, self._after = domains, batch, decode, after
        order = [(place, name) for name, windows in domains.items() for place in range(len(windows))]
        if mixed:
            order.sort(key=lambda entry: entry[0])
        self.order = [(name, domains[name][place]) for place, name in order]
        self.divergence: Divergence | None = None

    def keep_full(self, vocab_size: int) -> None:
        """Report the divergence, too: from the model as it is at the next `score`. Raises ConfigError for too much text."""
        self.divergence = Divergence([len(ids) - self._first(ids) for _, ids in self.order], vocab_size)

    def _first(self, ids: Sequence[int]) -> int:
        """The first token of a window that is scored."""
        places = [place for place, token in enumerate(ids) if token == self._after]
        return min(places[-1] + 1, len(ids) - 1) if places else 1

    def score(self, llm: LLM) -> dict[str, object]:
        """Perplexity per token and divergence from the full model (nats per token) by domain, with the steps' composition."""
        meter = Meter(llm.engine)
        scorer = Scorer(llm.engine, self.batch, self.decode, meter.observe)
        if self.divergence is not None:
            scorer.on_logits = self.divergence.observe
        scored = scorer.score([(ids, self._first(ids)) for _, ids in self.order])
        apart = np.zeros(len(scored)) if self.divergence is None else self.divergence.finish()
        counts = dict.fromkeys(self.domains, 0)
        losses, divergences = dict.fromkeys(self.domains, 0.0), dict.fromkeys(self.domains, 0.0)
        for (name, _), found, far in zip(self.order, scored, apart, strict=True):
            counts[name] += len(found.logprobs)
            losses[name] -= float(found.logprobs.sum())
            divergences[name] += float(far)
        tokens = sum(counts.values())
        nominal = nominal_share(llm.engine, *((0, tokens) if self.decode else (tokens, 0)))
        result: dict[str, object] = {"perplexity": {n: math.exp(losses[n] / counts[n]) for n in counts}}
        if self.divergence is not None:
            result["divergence"] = {n: divergences[n] / counts[n] for n in counts}
        return {**result, **meter.result(nominal)}


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question: `label` is the number of the right choice."""

    question: str
    choices: tuple[str, ...]
    label: int


def read_choices(path: Path) -> list[Choice]:
    """Questions of a JSONL file of {question, choices, label}; raises ConfigError naming a line that is not one."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"questions file {path} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
            choice = Choice(str(raw["question"]), tuple(map(str, raw["choices"])), int(raw["label"]))
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"questions file {path}: line {number} is not an object with question, choices and label"
            ) from None
        if not 0 <= choice.label < len(choice.choices):
            raise ConfigError(f"questions file {path}: line {number}: label {choice.label} is not one of the choices")
        found.append(choice)
    if not found:
        raise ConfigError(f"questions file {path} has no questions")
    return found


def multiple_choice(
    llm: LLM, questions: Sequence[Choice], shots: int, batch: int, seed: int = 0, number: int | None = None
) -> dict[str, object]:
    """Accuracy in percent by the choices' summed log-likelihoods, and by those per byte of the choice.

    Each of the first `number` questions follows `shots` others with their answers, drawn with `seed`.
    """
    rng = random.Random(seed)
    sequences, sizes = [], []
    asked = list(questions[:number])
    for question in asked:
        others = [
            other for other in rng.sample(list(questions), min(shots + 1, len(questions))) if other is not question
        ]
        context = "".join(f"{o.question} {o.choices[o.label]}\n\n" for o in others[:shots]) + question.question
        for choice in question.choices:
            ids = llm.tokenizer.encode(f"{context} {choice}")
            first = _common(llm.tokenizer.encode(context), ids)
            cut = max(0, len(ids) - llm.engine.max_model_len)  # the start of a context that is too long
            sequences.append((ids[cut:], max(1, first - cut)))
            sizes.append(len(choice.encode()))
    meter = Meter(llm.engine)
    scored = Scorer(llm.engine, batch, after_step=meter.observe).score(sequences)
    sums = torch.tensor([float(found.logprobs.sum()) for found in scored])
    right = {"summed": 0, "normalised": 0}
    start = 0
    for question in asked:
        part = slice(start, start + len(question.choices))
        start = part.stop
        right["summed"] += int(sums[part].argmax()) == question.label
        right["normalised"] += int((sums[part] / torch.tensor(sizes[part])).argmax()) == question.label
    nominal = nominal_share(llm.engine, 1, 0)
    return {**{kind: 100.0 * count / len(asked) for kind, count in right.items()}, **meter.result(nominal)}


def _common(prefix: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens the two begin with in common; a token that spans the border belongs to what follows."""
    for i, (a, b) in enumerate(zip(prefix, ids, strict=False)):
        if a != b:
            return i
    return min(len(prefix), len(ids))
