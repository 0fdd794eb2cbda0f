"""The product's engine as the benchmarks drive it."""

from __future__ import annotations

import random
import statistics
import time
from operator import sub
from unittest.mock import patch

from backend.brownout.settings import Settings
from backend.config import EngineConfig
from backend.engine.engine import Engine
from backend.engine.model_runner import resolve_device
from backend.engine.request import Request, RequestEnded, TokenOutput
from backend.engine.sampling_params import SamplingParams
from backend.kernels import kernels_for
from backend.models.attention import KVCache
from backend.models.registry import weight_type
from loadtest.bench import kernel_times
from loadtest.bench.kernel_times import KernelTime
from loadtest.bench.memory import Growth, Memory, peak_bytes, reset_peak, rss_bytes
from loadtest.bench.parts import PartTimes, StepTimes
from loadtest.bench.peers import Run
from loadtest.bench.workload import Workload


class OurEngine:
    """An engine in this process, with what can be asked of it beside its speed."""

    def __init__(self, config: EngineConfig) -> None:
        _load_kernels(config)
        before = rss_bytes()
        reset_peak()
        self.engine = Engine(config)
        self.device = self.engine.runner.device
        self._before_bytes = 0 if self.device.type == "cuda" else before
        #: Of the step half-way through the last run, when all requests decode.
        self.stats = self.engine.stats()
        #: Median time from one step in which all requests got a token to the next, of the last run that had such steps.
        self.decode_step_s: float | None = None

    def run(self, prompts: list[list[int]], new_tokens: int) -> Run:
        """Complete all prompts greedily, from handing them over to the last token; nothing is cached from earlier runs."""
        self.engine.blocks.clear_cache()
        started = time.perf_counter()
        self._add(prompts, new_tokens)
        tokens: list[list[int]] = [[] for _ in prompts]
        made, half, ended = 0, len(prompts) * new_tokens // 2, []
        while self.engine.has_work:
            before = made
            for event in self.engine.step():
                made += _take(event, tokens)
            if made - before == len(prompts):
                ended.append(time.perf_counter())
            if before < half <= made:
                self.stats = self.engine.stats()
        elapsed = time.perf_counter() - started
        if len(ended) > 1:
            self.decode_step_s = statistics.median(map(sub, ended[1:], ended))
        if made != len(prompts) * new_tokens:
            raise RuntimeError(f"{made} tokens were made instead of {len(prompts) * new_tokens}")
        return Run(elapsed, tokens)

    def memory(self) -> Memory:
        """Peak memory since this engine was made."""
        runner = self.engine.runner
        pool = sum(tensor.nbytes for tensor in (*runner.kv_cache.k, *runner.kv_cache.v))
        return Memory.of(
            peak=peak_bytes(self.device),
            before=self._before_bytes,
            weights=runner.model.weight_bytes(),
            united=runner.model.united_bytes(),
            kv_pool=pool,
        )

    def profile(self, prompts: list[list[int]], new_tokens: int) -> dict[str, StepTimes]:
        """Where the time of a prefill step and of a decode step goes."""
        times = PartTimes(self.engine)
        with times.attached(), patch.object(self.engine, "overlap", False):
            # With one new token nothing decodes while other prompts are still computed.
            for length in (1, new_tokens):
                self.engine.blocks.clear_cache()
                self._add(prompts, length)
                while self.engine.has_work:
                    times.step()
        kinds = {"prefill": times.summary("prefill"), "decode": times.summary("decode", skip=1)}
        return {kind: summary for kind, summary in kinds.items() if summary is not None}

    def decode_kernels(self, prompts: list[list[int]], new_tokens: int, steps: int = 8) -> list[KernelTime]:
        """The kernels of a decode step, means over up to `steps` steps in which all prompts decode."""
        self.engine.blocks.clear_cache()
        self._add(prompts, new_tokens)
        scheduler = self.engine.scheduler
        while len(scheduler.running) < len(prompts) or any(not s.prompt_computed for s in scheduler.running):
            self.engine.step()
            if not self.engine.has_work:
                raise ValueError(f"{new_tokens} new tokens are too few for all prompts to decode together")
        left = min(new_tokens - sequence.num_output for sequence in scheduler.running)
        times = kernel_times.measure(self.engine.step, max(1, min(steps, left - 1)), self.device)
        for number in range(len(prompts)):
            self.engine.abort(number)
        return times

    def decode_step_bytes(self, active_slots: float, rows: int, context: float) -> int:
        """Bytes that a decode step must read: the weights of that many slots in each MoE layer, all others, keys and values.

        `context`: cached tokens of each of the `rows` sequences, on average.
        """
        runner, model = self.engine.runner, self.engine.runner.model
        slots = active_slots + (model.moe_blocks[0].num_shared_slots if model.moe_blocks else 0)
        experts = sum(slots * block.experts.num_bytes / len(block.experts.w13) for block in model.moe_blocks)
        tied = model.lm_head is model.embedding
        others = sum(
            tensor.nbytes
            for name, tensor in model.weights()
            if ".experts." not in name and (tied or tensor is not model.embedding)
        )
        folded = any(block.num_shared_slots for block in model.moe_blocks)
        if folded:  # its own matrices are not read then
            others -= sum(t.nbytes for name, t in model.weights() if ".shared_expert." in name)
        token = KVCache.block_bytes(model.config, runner.block_size, model.dtype) / runner.block_size
        return round(experts + others + rows * context * token)

    def growth(self, work: Workload, steps: int) -> Growth:
        """Resident memory over `steps` steps in which requests end and new ones, with other prompts, take their places."""
        rng = random.Random(work.seed)
        warm_up = max(1, steps // 10)
        number = rss = 0
        for step in range(steps):
            while self.engine.num_requests < work.requests:
                prompt = [rng.randrange(self.engine.vocab_size) for _ in range(work.prompt_tokens)]
                # Different lengths, so that prefill and decode mix.
                self._add([prompt], rng.randint(1, work.new_tokens), first=number)
                number += 1
            self.engine.step()
            if step + 1 == warm_up:
                rss = rss_bytes()
        end = rss_bytes()
        for request_id in range(number):
            self.engine.abort(request_id)
        return Growth(
            steps=steps,
            warm_up_steps=warm_up,
            rss_after_warm_up_bytes=rss,
            rss_end_bytes=end,
            growth_bytes=end - rss,
        )

    def _add(self, prompts: list[list[int]], new_tokens: int, first: int = 0) -> None:
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        for number, prompt in enumerate(prompts, start=first):
            self.engine.add(Request(number, prompt, params))


def _load_kernels(config: EngineConfig) -> None:
    """The kernels' machine code, and on a CPU the compiler that comes with it: no memory of the engine's own."""
    device = resolve_device(config.devices[0])
    kernels_for(device)
    if device.type == "cpu":
        from backend.kernels.cpu.warm_up import warm_up

        warm_up(weight_type(config.checkpoint, config.dtype, device))


class AtSettings:
    """Our engine at one point of the brownout settings; several points are measured in turn on one engine."""

    def __init__(self, ours: OurEngine, settings: Settings) -> None:
        """Raises ConfigError if the engine cannot be set so."""
        ours.engine.set_settings(settings)
        self.ours, self.settings = ours, settings
        self.stats, self.decode_step_s = ours.stats, ours.decode_step_s

    def run(self, prompts: list[list[int]], new_tokens: int) -> Run:
        self.ours.engine.set_settings(self.settings)
        run = self.ours.run(prompts, new_tokens)
        self.stats, self.decode_step_s = self.ours.stats, self.ours.decode_step_s
        return run


def _take(event: TokenOutput | RequestEnded, tokens: list[list[int]]) -> int:
    if isinstance(event, RequestEnded):
        raise RuntimeError(f"request {event.request_id} ended: {event.message}")
    tokens[event.request_id].append(event.token_id)
    return 1
