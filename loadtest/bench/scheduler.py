"""What the engine's host path costs per step, without a model: scheduling, batches, booking, sampling, detokenising."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from backend.brownout.block import BLOCK_NAME, Block
from backend.config import EngineConfig
from backend.engine.detokenizer import Detokenizer
from backend.engine.engine import Engine
from backend.engine.penalties import SampleRow
from backend.engine.request import Request
from backend.engine.sampler import sample
from backend.engine.sampling_params import SamplingParams
from backend.models.forward_batch import ForwardBatch
from backend.serving.engine_control import WRITE_PERIOD_S, EngineControl
from backend.tokenizer import load_tokenizer
from loadtest.bench import options
from loadtest.bench.budget import Budget
from loadtest.bench.parts import BATCH, BOOKING, EMIT, SAMPLING, SCHEDULING, PartTimes, StepTimes
from loadtest.bench.timing import median_s
from loadtest.bench.workload import machine, write_json

HELP = "the host path of a step, without a model"
#: A quick decode step, against which the host path is held.
STEP_MS = 6.0
#: Steps that are not counted: caches and free lists settle.
_WARM_UP_STEPS = 10


class HostCost(msgspec.Struct, kw_only=True):
    """Medians over the steps, in microseconds per step."""

    steps: int
    parts_us: dict[str, float]
    #: Choosing the step's work, booking it, and laying out its tensors.
    scheduler_and_batch_us: float
    share_of_step: float
    #: The same with what follows sampling: ends of sequences, events.
    host_us: float
    #: The whole step, with the sampling of few logits: median and maximum.
    step_us: float
    step_worst_us: float
    #: A full garbage collection with all that waits and runs; a step that meets one takes so much longer.
    collection_us: float

    @classmethod
    def of(cls, times: StepTimes, worst: StepTimes, collection_s: float) -> HostCost:
        names = (SCHEDULING, BATCH, BOOKING, SAMPLING, EMIT)
        parts = {name: times.parts.get(name, 0.0) * 1e6 for name in names}
        cost = parts[SCHEDULING] + parts[BATCH] + parts[BOOKING]
        return cls(
            steps=times.steps,
            parts_us=parts,
            scheduler_and_batch_us=cost,
            share_of_step=cost / (STEP_MS * 1e3),
            host_us=cost + parts[EMIT],
            step_us=times.step_s * 1e6,
            step_worst_us=worst.step_s * 1e6,
            collection_us=collection_s * 1e6,
        )


class TelemetryCost(msgspec.Struct, kw_only=True):
    """What the control block costs the engine, in microseconds."""

    #: Each step: looking for new settings, counting the step into its bucket.
    step_us: float
    #: Each write of the engine's section, which has a period of its own.
    write_us: float
    #: Both, in a step of `STEP_MS`.
    per_step_us: float
    share_of_step: float

    @classmethod
    def of(cls, step_us: float, write_us: float) -> TelemetryCost:
        per_step = step_us + write_us * min(1.0, STEP_MS / (WRITE_PERIOD_S * 1e3))
        return cls(step_us=step_us, write_us=write_us, per_step_us=per_step, share_of_step=per_step / (STEP_MS * 1e3))


class SchedulerReport(msgspec.Struct, kw_only=True):
    """`steady`: every running request decodes. `turnover`: each makes as many tokens as its prompt has, so that some end and
    waiting ones take their places. Sampling is of `vocab` logits a row."""

    running: int
    waiting: int
    prompt_tokens: int
    step_ms: float = STEP_MS
    steady: HostCost | None = None
    turnover: HostCost | None = None
    vocab: int
    #: Microseconds per step, by what the requests ask for.
    sampling_us: dict[str, float] = {}
    detokenizing_us: float | None = None
    telemetry: TelemetryCost | None = None
    machine: dict[str, object]
    complete: bool = False


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--running", type=options.positive, default=256, help="requests that run (default 256)")
    parser.add_argument("--waiting", type=options.positive, default=10_000, help="requests that wait (default 10000)")
    parser.add_argument("--prompt-tokens", type=options.at_least_two, default=128, help="per request (default 128)")
    parser.add_argument("--steps", type=options.positive, default=200, help="measured steps (default 200)")
    parser.add_argument("--vocab", type=options.positive, default=8192, help="logits per row to sample (default 8192)")
    options.add_budget(parser)
    options.add_output(parser)


def main(args: argparse.Namespace, console: Console) -> int:
    with console.status(f"{args.steps} steps of {args.running} running and {args.waiting} waiting requests"):
        for report in measure(
            running=args.running,
            waiting=args.waiting,
            prompt_tokens=args.prompt_tokens,
            steps=args.steps,
            vocab=args.vocab,
            budget=Budget(args.budget),
        ):
            if args.json:
                write_json(args.json, report)
    console.print(table(report))
    if args.json:
        console.print(f"Wrote {args.json}.")
    return 0


def measure(
    *, running: int, waiting: int, prompt_tokens: int, steps: int, vocab: int, budget: Budget
) -> Iterator[SchedulerReport]:
    """Yields the growing report after each measurement."""
    report = SchedulerReport(
        running=running, waiting=waiting, prompt_tokens=prompt_tokens, vocab=vocab, machine=machine()
    )
    yield report
    for name in ("steady", "turnover"):
        if budget.spent:
            return
        setattr(report, name, host_cost(running, waiting, prompt_tokens, steps, turnover=name == "turnover"))
        yield report
    requested = {
        "greedy": SamplingParams(temperature=0.0),
        "temperature": SamplingParams(),
        "top_p": SamplingParams(top_p=0.9),
    }
    for name, params in requested.items():
        if budget.spent:
            return
        report.sampling_us[name] = sampling_s(running, vocab, params) * 1e6
        yield report
    if budget.spent:
        return
    report.detokenizing_us = detokenizing_s(running) * 1e6
    yield report
    if budget.spent:
        return
    report.telemetry = telemetry_cost(running, waiting, prompt_tokens)
    report.complete = True
    yield report


def host_cost(running: int, waiting: int, prompt_tokens: int, steps: int, *, turnover: bool) -> HostCost:
    """Steps of an engine whose model gives random logits at no cost."""
    measured = steps + _WARM_UP_STEPS
    new_tokens = prompt_tokens if turnover else measured + prompt_tokens
    engine = _engine(running, waiting, prompt_tokens, new_tokens)
    # As in an engine process that is ready: collections pass over what was loaded before there were requests.
    gc.collect()
    gc.freeze()
    try:
        return _served_cost(engine, running, waiting, prompt_tokens, new_tokens, measured, turnover)
    finally:
        gc.unfreeze()


def _served_cost(
    engine: Engine, running: int, waiting: int, prompt_tokens: int, new_tokens: int, steps: int, turnover: bool
) -> HostCost:
    # The first requests have different shares of their tokens left, as in the middle of a long run.
    lengths = [1 + number * new_tokens // running for number in range(running)] if turnover else []
    _fill(engine, running + waiting, prompt_tokens, lengths + [new_tokens] * (running + waiting - len(lengths)))
    times = PartTimes(engine)
    with _random_logits(engine, running):
        while len(engine.scheduler.running) < running or any(not s.prompt_computed for s in engine.scheduler.running):
            if not engine.has_work:
                raise ValueError(f"{waiting} waiting requests are too few to keep {running} running")
            engine.step()
        with times.attached():
            for _ in range(steps):
                times.step()
    medians = times.summary(skip=_WARM_UP_STEPS, average=statistics.median)
    worst = times.summary(skip=_WARM_UP_STEPS, average=max)
    assert medians is not None and worst is not None
    return HostCost.of(medians, worst, _collection_s())


def _collection_s() -> float:
    """Seconds that a full garbage collection takes."""
    started = time.perf_counter()
    gc.collect()
    return time.perf_counter() - started


def telemetry_cost(running: int, waiting: int, prompt_tokens: int) -> TelemetryCost:
    """Of an engine with so many running and waiting requests."""
    engine = _engine(running, waiting, prompt_tokens, prompt_tokens)
    _fill(engine, running + waiting, prompt_tokens, [prompt_tokens] * (running + waiting))
    with _random_logits(engine, running):
        while len(engine.scheduler.running) < running:
            engine.step()
    engine.counters.step_prefill_tokens, engine.counters.step_decode_tokens = 0, running
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        block = Block(Path(folder) / BLOCK_NAME, os.getpid())
        control = EngineControl(engine, block, index=0, generation=1)

        def step() -> None:
            control.follow_settings()
            control.announce(0.0)
            control.stepped(STEP_MS / 1e3)

        device = torch.device("cpu")
        cost = TelemetryCost.of(median_s([step], device, runs=5) * 1e6, median_s([control.write], device, runs=5) * 1e6)
        block.close()
    return cost


@contextlib.contextmanager
def _random_logits(engine: Engine, rows: int) -> Iterator[None]:
    """Have the model give random logits for up to so many rows, at no cost."""
    rng = random.Random(0)
    logits = torch.randn(2 * rows, engine.vocab_size, generator=torch.Generator().manual_seed(0))

    def forward(batch: ForwardBatch, _: object) -> Tensor:
        start = rng.randrange(rows)
        return logits[start : start + len(batch.logit_rows)]

    with patch.object(engine.runner.model, "forward", forward):
        yield


def _engine(running: int, waiting: int, prompt_tokens: int, new_tokens: int) -> Engine:
    return Engine(
        EngineConfig(
            checkpoint="dummy:tiny",
            device="cpu",
            max_model_len=prompt_tokens + new_tokens,
            kv_cache_blocks=running * (-(-(prompt_tokens + new_tokens) // 16) + 2),
            max_running=running,
            max_waiting=running + waiting,
        )
    )


def _fill(engine: Engine, requests: int, prompt_tokens: int, lengths: list[int]) -> None:
    """Queue requests with random prompts that make so many tokens each."""
    prompts = np.random.default_rng(0).integers(0, engine.vocab_size, (requests, prompt_tokens)).tolist()
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        engine.add(Request(number, prompt, SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)))


def sampling_s(rows: int, vocab: int, params: SamplingParams) -> float:
    """Seconds to sample one token for each row of random logits."""
    logits = 2.0 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    described = [SampleRow(params, seed, position=0) for seed in range(rows)]
    return median_s([lambda: sample(logits, described)], logits.device, runs=5)


def detokenizing_s(rows: int) -> float:
    """Seconds to turn one token of each of `rows` sequences into text."""
    tokenizer = load_tokenizer("dummy:cpu-m", vocab_size=8192)
    texts = [Detokenizer(tokenizer) for _ in range(rows)]
    ids = [[300 + i] for i in range(rows)]

    def step() -> None:
        for text, new in zip(texts, ids, strict=True):
            text.append(new, False)

    return median_s([step], torch.device("cpu"), runs=5)


def table(report: SchedulerReport) -> Table:
    made = Table(title=f"{report.running} running, {report.waiting} waiting requests: medians per step")
    made.add_column("")
    made.add_column("µs", justify="right")
    made.add_column(f"of a {report.step_ms:g} ms step", justify="right")

    def row(name: str, microseconds: float, style: str = "") -> None:
        made.add_row(name, f"{microseconds:.0f}", f"{microseconds / report.step_ms / 1e3:.1%}", style=style)

    for name, cost in (("steady", report.steady), ("turnover", report.turnover)):
        if cost is not None:
            for part in (SCHEDULING, BOOKING, BATCH):
                row(f"{name}: {part}", cost.parts_us[part])
            row(f"{name}: scheduler and batch", cost.scheduler_and_batch_us, "bold")
            row(f"{name}: {EMIT}", cost.parts_us[EMIT])
            row(f"{name}: worst step", cost.step_worst_us)
            row(f"{name}: a full garbage collection", cost.collection_us)
            made.add_section()
    for name, microseconds in report.sampling_us.items():
        row(f"sampling, {name}, {report.vocab} logits", microseconds)
    if report.detokenizing_us is not None:
        row("detokenising", report.detokenizing_us)
    if report.telemetry is not None:
        made.add_section()
        row("telemetry: settings, queue and counts of a step", report.telemetry.step_us)
        row("telemetry: a write of the block", report.telemetry.write_us)
        row(f"telemetry: per step, a write every {WRITE_PERIOD_S * 1e3:.0f} ms", report.telemetry.per_step_us, "bold")
    return made
