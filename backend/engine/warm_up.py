"""What is done on a GPU before the first request: kernels compiled, graphs captured, memory taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from backend.brownout.settings import Settings
from backend.config import EngineConfig
from backend.engine.batch import build_batch
from backend.engine.request import Request
from backend.engine.sampler import SampleRow, sample
from backend.engine.sampling_params import SamplingParams
from backend.engine.scheduler import Schedule
from backend.errors import ConfigError
from backend.models.forward_batch import ForwardBatch

if TYPE_CHECKING:
    from backend.engine.model_runner import ModelRunner

#: Tokens of the prefill steps that are run at the start, beside the largest: kernels differ with sizes and divisibility.
WARM_UP_TOKENS = (5, 20, 40, 100, 200, 300, 400, 600)
#: How tokens may be chosen: each way has operators of its own.
_SAMPLING = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(top_k=40, top_p=0.9),
    SamplingParams(top_p=0.9, min_p=0.01),
    SamplingParams(logprobs=5),
    SamplingParams(repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1, min_tokens=1),
)
#: Shortest context of the single tokens that are computed at the start; attention splits longer ones into more parts.
_CONTEXT = 256


@torch.inference_mode()
def warm_up(runner: ModelRunner, config: EngineConfig, levels: Sequence[Settings]) -> None:
    """Run prefill steps of several sizes, single tokens in contexts of several lengths, capture graphs, and sample.

    Kernels are compiled here and not in the middle of a request, those of all `levels` of brownout too, and if the memory
    does not suffice, that shows now.
    """
    most = min(config.max_batch_tokens, runner.num_blocks * runner.block_size)
    done = set()
    for settings in (Settings(), *levels):
        try:
            runner.apply(settings)
        except ConfigError:
            continue  # whoever asks for this level will be told what is lacking
        if runner.model.variant in done:
            continue
        done.add(runner.model.variant)
        for tokens in sorted({min(most, size) for size in (*WARM_UP_TOKENS, *_doubling(1024, most))}, reverse=True):
            runner.model.forward(_prompts(runner, tokens), runner.kv_cache)
        for length in _doubling(_CONTEXT, runner.max_model_len):
            runner.model.forward(_last_token(runner, length), runner.kv_cache)
        if runner.graphs is not None:
            runner.graphs.capture_all(runner.model.variant)
    runner.apply(Settings())
    # Once more, beside what the graphs have taken: memory that has been free until now may be theirs.
    runner.model.forward(_prompts(runner, most), runner.kv_cache)
    rows = min(config.max_running, config.max_batch_tokens)
    logits = torch.zeros(rows, runner.model.config.vocab_size, device=runner.device)
    for params in _SAMPLING:
        sample(logits, [SampleRow(params, 0, 0, (0,), (0,), (0,))] * rows)
    runner.forget_steps()
    for part in (*runner.kv_cache.k, *runner.kv_cache.v):
        part.zero_()


def _prompts(runner: ModelRunner, num_tokens: int) -> ForwardBatch:
    """A step that computes prompts of `num_tokens` tokens in all, in the first blocks."""
    most = runner.max_model_len // runner.block_size * runner.block_size or num_tokens
    schedule, block = Schedule(), 0
    for start in range(0, num_tokens, most):
        length = min(most, num_tokens - start)
        sequence = Request("warm-up", [0] * length, SamplingParams()).sequences[0]
        needed = -(-length // runner.block_size)
        sequence.blocks.extend(range(block, block + needed))
        block += needed
        schedule.sequences.append(sequence)
        schedule.num_tokens.append(length)
    # Sequences of one token come first; here that can only be the last one.
    if schedule.num_tokens[-1] == 1:
        for entries in (schedule.sequences, schedule.num_tokens):
            entries.insert(0, entries.pop())
        schedule.num_decodes = 1
    return build_batch(schedule, runner.block_size, runner.device)


def _last_token(runner: ModelRunner, length: int) -> ForwardBatch:
    """A step that computes the last token of one sequence, as it stands beside prompts in a step."""
    sequence = Request("warm-up", [0] * length, SamplingParams()).sequences[0]
    sequence.num_computed = length - 1
    sequence.blocks.extend(range(-(-length // runner.block_size)))
    schedule = Schedule()
    schedule.sequences.append(sequence)
    schedule.num_tokens.append(1)
    schedule.num_decodes = 1
    return build_batch(schedule, runner.block_size, runner.device)


def _doubling(first: int, last: int) -> list[int]:
    """first, 2 * first, … below `last`, and `last`."""
    return [*(first << i for i in range(64) if first << i < last), last]
