"""Compile on a GPU what the benchmarks are going to launch, in several processes that leave it in Triton's cache.

One after the other, compiling would take most of a short time on a GPU. The engine's kernels do not depend on the number of
layers, so each process runs one of a single layer, with some of the sizes of a step.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace
from itertools import islice
from unittest.mock import patch

import torch

from backend.config import EngineConfig
from backend.engine import cuda_graphs, warm_up
from backend.engine.engine import Engine
from backend.engine.model_runner import resolve_device
from backend.kernels import kernels_for
from backend.models.dummy import PREFIX, SHAPES, raw_config
from backend.models.registry import parse_config
from loadtest.bench.kernel_cases import Sizes, cases, implementation_of

#: Cases that launch no kernel of ours.
_LIBRARY = ("linear", "output_logits", "gated_mlp", "router_scores", "sample")
#: Each process has a context of its own on the device.
_MOST_PROCESSES = 14
#: Processes among them that run an engine.
_ENGINES = 5


def compile_all(config: EngineConfig, dtype: torch.dtype, budget_s: float) -> int:
    """Compile for the kernel cases of a dummy shape and for `config`'s engine on it; returns how many pieces were done.

    Nothing is begun after `budget_s` seconds.
    """
    processes = min(_MOST_PROCESSES, max(2, (os.cpu_count() or 2) - 1))
    engines = max(1, processes * _ENGINES // _MOST_PROCESSES)
    deadline = time.time() + budget_s
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(run_engine, config, part, engines, deadline) for part in range(engines)]
        rest = processes - engines
        jobs += [pool.submit(launch_cases, config, dtype, part, rest, deadline) for part in range(rest)]
        done, _ = wait(jobs)
    return sum(job.result() for job in done)


def launch_cases(config: EngineConfig, dtype: torch.dtype, part: int, parts: int, deadline: float) -> int:
    """Launch every `parts`-th kernel case once, from the `part`-th on; returns how many."""
    device = resolve_device(config.device)
    kernels, count = kernels_for(device), 0
    shape = parse_config(raw_config(config.checkpoint))
    ours = (case for case in cases(shape, dtype, device, Sizes.for_device(device)) if case.kernel not in _LIBRARY)
    for case in islice(ours, part, None, parts):
        if time.time() > deadline:
            break
        with contextlib.suppress(Exception), torch.inference_mode():
            implementation_of(case, kernels)(*case.make(torch.Generator(device).manual_seed(0)))
            count += 1
    return count


def run_engine(config: EngineConfig, part: int, parts: int, deadline: float) -> int:
    """Have an engine of one layer run every `parts`-th size of a step, from the `part`-th on, as it does at its start.

    Returns how many sizes these were.
    """
    if time.time() > deadline:
        return 0
    shape = config.checkpoint.removeprefix(PREFIX)
    buckets = cuda_graphs.buckets_for(config.max_running)[part::parts]
    mixed = cuda_graphs.mixed_buckets_for(config.max_batch_tokens)[part::parts]
    prompts = (*warm_up.WARM_UP_TOKENS, config.max_batch_tokens)[part::parts]
    with (
        patch.dict(SHAPES, {shape: {**SHAPES[shape], "num_hidden_layers": 1}}),
        patch.object(cuda_graphs, "buckets_for", lambda _: buckets),
        patch.object(cuda_graphs, "mixed_buckets_for", lambda _: mixed),
        patch.object(warm_up, "WARM_UP_TOKENS", prompts),
        contextlib.suppress(Exception),  # what fails here fails again where it is reported
    ):
        Engine(replace(config, max_batch_tokens=max([config.max_running, *prompts])))
        return len(buckets) + len(mixed) + len(prompts)
    return 0
