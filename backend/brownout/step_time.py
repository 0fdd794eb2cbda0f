"""How long steps take under different settings: all of them turn by turn, so that a machine's moods hit them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from backend.brownout.measure import Meter
from backend.brownout.settings import Settings
from backend.engine.llm import LLM
from backend.engine.request import Request
from backend.engine.sampling_params import SamplingParams
from backend.engine.scoring import Scorer

#: Decode steps of a point in a round; the first of them is not timed.
_STEPS = 4


@dataclass(frozen=True)
class StepTime:
    """Medians over rounds, relative to the first point of the same round; slots and assignments of decode steps."""

    decode: float
    prefill: float
    active_slots: float
    assignments_per_token: float


def step_times(
    llm: LLM,
    points: Sequence[Settings],
    prompts: Sequence[Sequence[int]],
    batch: int,
    rounds: int,
    advance: Callable[[], None] = lambda: None,
) -> list[StepTime]:
    """Times of decode steps of `batch` sequences and of prefill steps of the engine's max_batch_tokens, for every point.

    Decode continues `prompts` in one running batch whose settings change between steps.
    """
    meters = [Meter(llm.engine) for _ in points]
    decode: list[list[float]] = [[] for _ in points]
    prefill: list[list[float]] = [[] for _ in points]
    half = llm.engine.max_model_len // 2
    starts = [list(prompts[i % len(prompts)])[:half] for i in range(batch)]
    length = max(2, llm.engine.config.max_batch_tokens // batch)
    windows = [(start * (length // len(start) + 1))[: min(length, half)] for start in starts]
    for _ in range(rounds):
        for settings, times in zip(points, prefill, strict=True):
            llm.set_settings(settings)
            started = _now(llm)
            Scorer(llm.engine, batch).score([(ids, len(ids)) for ids in windows])
            times.append(_now(llm) - started)
        for settings, times, meter in zip(points, decode, meters, strict=True):
            if not llm.engine.has_work or _longest(llm) + _STEPS >= llm.engine.max_model_len:
                _start(llm, starts)
            llm.set_settings(settings)
            llm.engine.step()
            spent = []
            for _ in range(_STEPS - 1):
                started = _now(llm)
                llm.engine.step()
                spent.append(_now(llm) - started)
                meter.observe()
            times.append(median(spent))
        _stop(llm)
        advance()
    llm.set_settings(Settings())
    found = []
    for own, prefilled, meter in zip(decode, prefill, meters, strict=True):
        steps = meter.result(None)
        found.append(
            StepTime(
                median(a / b for a, b in zip(own, decode[0], strict=True)),
                median(a / b for a, b in zip(prefilled, prefill[0], strict=True)),
                steps["active_slots"],
                steps["assignments_per_token"],
            )
        )
    return found


def _now(llm: LLM) -> float:
    if llm.engine.runner.device.type == "cuda":
        torch.cuda.synchronize(llm.engine.runner.device)
    return time.perf_counter()


def _start(llm: LLM, prompts: Sequence[Sequence[int]]) -> None:
    """A fresh batch under full quality, its prompts computed."""
    _stop(llm)
    llm.set_settings(Settings())
    params = SamplingParams(max_tokens=llm.engine.max_model_len, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        llm.engine.add(Request(("timed", number), list(prompt), params))
    while (
        any(not sequence.prompt_computed for sequence in llm.engine.scheduler.running)
        or llm.engine.scheduler.num_waiting
    ):
        llm.engine.step()


def _stop(llm: LLM) -> None:
    for request_id in [sequence.request.request_id for sequence in llm.engine.scheduler.running]:
        llm.engine.abort(request_id)
    llm.engine.blocks.clear_cache()


def _longest(llm: LLM) -> int:
    return max(len(sequence.tokens) for sequence in llm.engine.scheduler.running)
