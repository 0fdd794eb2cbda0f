"""What Triton costs: the same workload on the engine alone and through the server's streams, in one run."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import time

import msgspec
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from backend.config import ENV_PREFIX, EngineConfig
from backend.serving.launch_client import running_server
from loadtest.bench import options
from loadtest.bench.budget import Budget
from loadtest.bench.engine import is_on_gpu, sizes_for
from loadtest.bench.our_engine import OurEngine
from loadtest.bench.streams import STREAMS
from loadtest.bench.workload import Workload, machine, write_json

#: A GPU's engine compiles its kernels first.
_STARTUP_TIMEOUT_S = 240.0

HELP = "through Triton Inference Server, against the engine alone"


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_workload(parser)
    options.add_place(parser)
    options.add_runs(parser, 3)
    parser.add_argument("--protocol", choices=sorted(STREAMS), default="http", help="of the streams (default http)")
    options.add_budget(parser)
    options.add_output(parser)


def main(args: argparse.Namespace, console: Console) -> int:
    checkpoint = options.checkpoint_of(args)
    # No spinner: its thread would take time from what is measured.
    console.print(f"Measuring {checkpoint}: {args.runs} runs and one to warm up …")
    result = run(
        checkpoint=checkpoint,
        work=options.workload_of(args),
        dtype=args.dtype,
        device=args.device,
        runs=args.runs,
        protocol=args.protocol,
        budget=Budget(args.budget),
    )
    console.print(table(result, checkpoint))
    console.print(processor_table(result))
    if args.json:
        write_json(args.json, result)
        console.print(f"Wrote {args.json}.")
    return 0


def table(result: dict, checkpoint: str) -> Table:
    made = Table(title=f"{checkpoint}, output tokens per second, medians")
    for name in ("engine alone", "through Triton", "ratio"):
        made.add_column(name, justify="right")
    made.add_row(
        f"{result['engine_tokens_per_s']:.0f}", f"{result['server_tokens_per_s']:.0f}", f"{result['ratio']:.2f}"
    )
    return made


def processor_table(result: dict) -> Table:
    """Who used the processors while the server was measured: all shares of all cores are 100 %."""
    cores = os.cpu_count() or 1
    made = Table(title=f"processor time through Triton, of {cores} cores, medians")
    for name in result["processor_share"]:
        made.add_column(name, justify="right")
    made.add_row(*(f"{share / cores:.0%}" for share in result["processor_share"].values()))
    return made


#: Parts by what their command lines hold.
_PARTS = {"engine_process": "engine", "triton_python_backend_stub": "stubs", "tritonserver": "Triton server"}


class ProcessorTimes:
    """Seconds of processor time by part: engine, stubs, server, client (this process)."""

    def __init__(self) -> None:
        self._started, self._before = time.perf_counter(), self._now()

    def shares(self) -> dict[str, float]:
        """Cores that each part kept busy on average since this was made."""
        elapsed = time.perf_counter() - self._started
        return {part: (seconds - self._before.get(part, 0.0)) / elapsed for part, seconds in self._now().items()}

    def _now(self) -> dict[str, float]:
        process = psutil.Process()
        seconds = dict.fromkeys((*_PARTS.values(), "client"), 0.0)
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                command, times = " ".join(child.cmdline()), child.cpu_times()
                part = next((part for name, part in _PARTS.items() if name in command), None)
                if part is not None:
                    seconds[part] += times.user + times.system
        times = process.cpu_times()
        seconds["client"] = times.user + times.system
        return seconds


def run(
    *,
    checkpoint: str,
    work: Workload,
    dtype: str,
    device: str,
    runs: int,
    protocol: str = "http",
    budget: Budget | None = None,
) -> dict:
    """Output tokens per second of both, their ratio run by run; at least one run, further ones while the budget lasts."""
    budget, streams = budget or Budget(), STREAMS[protocol]
    parameters = {
        "checkpoint": checkpoint,
        "dtype": dtype,
        "device": device,
        **sizes_for(work, is_on_gpu(device)),
    }
    env = {**os.environ, **{ENV_PREFIX + name.upper(): str(value) for name, value in parameters.items()}}
    tokens = work.requests * work.new_tokens
    pairs: list[dict[str, float]] = []
    used: list[dict[str, float]] = []
    # The server first: where none can be started, that shows at once.
    with running_server(env=env, startup_timeout_s=_STARTUP_TIMEOUT_S) as server:
        ours = OurEngine(EngineConfig(**parameters))
        for number in range(runs + 1):
            if number > 1 and budget.spent:
                break
            # Prompts differ from run to run, so that the server's prefix cache holds none of them.
            prompts = msgspec.structs.replace(work, seed=number).prompts(ours.engine.vocab_size)
            engine_s = ours.run(prompts, work.new_tokens).seconds
            processors = ProcessorTimes()
            server_s = asyncio.run(streams(server, prompts, work.new_tokens))
            shares = processors.shares()
            if number:
                pairs.append(
                    {
                        "engine_tokens_per_s": tokens / engine_s,
                        "server_tokens_per_s": tokens / server_s,
                        "ratio": engine_s / server_s,
                    }
                )
                used.append(shares)
    medians = {name: float(np.median([pair[name] for pair in pairs])) for name in pairs[0]}
    share = {part: float(np.median([shares[part] for shares in used])) for part in used[0]}
    return {
        **medians,
        "processor_share": share,
        "protocol": protocol,
        "workload": work,
        "settings": parameters,
        "machine": machine(),
        "runs": pairs,
    }
