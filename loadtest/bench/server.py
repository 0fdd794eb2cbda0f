"""What Triton costs: the same workload on the engine alone and through the server's streams, in one run."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import time

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from backend.config import ENV_PREFIX, EngineConfig
from backend.engine.model_runner import resolve_device
from backend.serving.launch_client import running_server
from loadtest.bench import options
from loadtest.bench.budget import Budget
from loadtest.bench.engine import sizes_for
from loadtest.bench.our_engine import OurEngine
from loadtest.bench.workload import Workload, machine, write_json

#: A GPU's engine compiles its kernels first.
_STARTUP_TIMEOUT_S = 240.0

HELP = "through Triton Inference Server, against the engine alone"


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_workload(parser)
    options.add_place(parser)
    options.add_runs(parser, 3)
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


async def stream_all(http: str, prompts: list[list[int]], new_tokens: int) -> float:
    """Seconds from the first request to the last response of all streams, server-sent events: a gRPC stream costs its

    client twice as much for each response, and the client has its part of the processors, too.
    """
    # Not at the top: the other benchmarks run where no client is installed.
    import aiohttp

    from loadtest.clients import STREAM_MODEL

    sampling = json.dumps({"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True})
    body = {"sampling_parameters": sampling, "stream": True, "return_num_output_tokens": True}
    url = f"http://{http}/v2/models/{STREAM_MODEL}/generate_stream"
    # No limits: streams last as long as they last, all at once.
    timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def one(prompt: list[int]) -> int:
            tokens = 0
            async with session.post(url, json=body | {"input_ids": prompt}) as response:
                async for line in response.content:
                    if line.startswith((b"data:", b"{")):  # an error may come without being an event
                        answer = json.loads(line.removeprefix(b"data:"))
                        if "error" in answer:
                            raise RuntimeError(f"a stream ended with: {answer['error']}")
                        tokens += answer["num_output_tokens"]
            return tokens

        started = time.perf_counter()
        counts = await asyncio.gather(*(one(prompt) for prompt in prompts))
        elapsed = time.perf_counter() - started
    if counts != [new_tokens] * len(prompts):
        raise RuntimeError(f"streams brought {counts} tokens instead of {new_tokens} each")
    return elapsed


def run(*, checkpoint: str, work: Workload, dtype: str, device: str, runs: int, budget: Budget | None = None) -> dict:
    """Output tokens per second of both, their ratio run by run; at least one run, further ones while the budget lasts."""
    budget = budget or Budget()
    parameters = {
        "checkpoint": checkpoint,
        "dtype": dtype,
        "device": device,
        **sizes_for(work, resolve_device(device.partition(",")[0].strip()).type == "cuda"),
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
            prompts = Workload(
                requests=work.requests, prompt_tokens=work.prompt_tokens, new_tokens=work.new_tokens, seed=number
            ).prompts(ours.engine.vocab_size)
            engine_s = ours.run(prompts, work.new_tokens).seconds
            processors = ProcessorTimes()
            server_s = asyncio.run(stream_all(server.http, prompts, work.new_tokens))
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
        "workload": work,
        "settings": parameters,
        "machine": machine(),
        "runs": pairs,
    }
