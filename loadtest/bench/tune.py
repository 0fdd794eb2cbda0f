"""Block sizes of the grouped expert kernels for one GPU: measure candidates, write the fastest to `backend/kernels/tuned/`.

A shape is tuned at several numbers of tokens, with routing as even as a uniform router's and, in small steps, with the slots
of a folded shared expert; every candidate is timed as CUDA graph replays over several copies of the weights, so that they come
from memory and not from the cache. Compiling takes longer than measuring, so all candidates are compiled beforehand by several
processes, which leave them in Triton's cache.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from backend.kernels.tuning import (
    KERNELS,
    SHARED_MEMORY_BYTES,
    TUNED_DIR,
    ExpertShape,
    TileConfig,
    default_tiles,
    entry,
    write_entries,
)
from backend.models.config import ModelConfig
from backend.models.dummy import PREFIX, SHAPES, raw_config
from backend.models.moe import FOLDED_ROWS, num_folded
from backend.models.registry import parse_config
from loadtest.bench.interpreter import INTERPRETER, kernels_on
from loadtest.bench.timing import median_s

HELP = "find block sizes of the expert kernels for this GPU"

#: Weights are read from copies of at least this size in all, several times any GPU's cache.
_WEIGHT_BYTES = 2**30
_MOST_COPIES = 16
_RUNS = 5
#: Processes that compile: each has a context of its own on the device.
_MOST_PROCESSES = 14
#: Share of the budget that compiling may take.
_COMPILING = 0.5

#: Seconds of one call with the given tiles, or None if they do not fit the device.
Measure = Callable[[ExpertShape, dict[str, TileConfig]], float | None]


@dataclass(frozen=True)
class Tuned:
    """The outcome for one number of tokens; seconds of one expert layer."""

    shape: ExpertShape
    tiles: dict[str, TileConfig]
    seconds: float
    default_seconds: float | None


@dataclass(frozen=True)
class Routing:
    """Slots that are in use: those of the experts, evenly, and in small steps the last ones, which hold a shared expert."""

    experts: int
    shared: int

    def shared_for(self, tokens: int) -> int:
        """Slots that every token of such a step has."""
        return self.shared if tokens <= FOLDED_ROWS else 0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen1.5-moe-a2.7b", help="sizes of this model")
    parser.add_argument("--united-ways", type=int, nargs="*", default=[8], help="ways of united experts with slots")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 4, 16, 32, 64, 256, 2048, 8192], help="rows of a step"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N (default cuda); interpreter: only to try it")
    parser.add_argument("--budget-s", type=float, default=300.0, help="stop after this many seconds (default 300)")
    parser.add_argument(
        "--folder", type=Path, default=TUNED_DIR, help="where the file goes (default: where it is read)"
    )


def main(args: argparse.Namespace, console: Console) -> int:
    """Tune, print a table and write the file; exit status."""
    if min(args.tokens) < 1 or min(args.united_ways, default=2) < 2 or args.budget_s <= 0:
        console.print("[red]--tokens must be at least 1, --united-ways at least 2, --budget-s above 0[/red]")
        return 2
    started = time.monotonic()
    interpreted = args.device == INTERPRETER
    if not interpreted and not _has_cuda(args.device):
        console.print("[red]tune needs a CUDA device; without one the rule in backend/kernels/tuning.py is used[/red]")
        return 1
    config = parse_config(raw_config(PREFIX + args.shape))
    routing = Routing(config.num_experts, num_folded(config))
    with kernels_on(args.device) as device:
        shapes = shapes_of(args, config, routing, "interpreter" if interpreted else _device_name(device))
        if not interpreted:
            number = compile_all(shapes, routing, str(device), _COMPILING * args.budget_s)
            console.print(f"Compiled {number} pairs of candidates.")
        left = args.budget_s - (time.monotonic() - started)
        results = []
        # Interpreted kernels take seconds, and there is no cache to be kept out of.
        layers = Layers(routing, str(device), copies=1 if interpreted else None)
        for result in tune(shapes, layers.measure, left, console):
            results.append(result)
            path = write_entries(args.folder, result.shape, [entry(result.shape, result.tiles)])
    if not results:
        console.print("[red]no candidate was measured: raise --budget-s[/red]")
        return 1
    console.print(_table(args.shape, results))
    console.print(f"Wrote {path}.")
    return 0


def shapes_of(args: argparse.Namespace, config: ModelConfig, routing: Routing, device: str) -> list[ExpertShape]:
    """What is to be tuned: as the layers of a model with these united experts run."""
    slots = config.num_experts + sum(-(-config.num_experts // way) for way in args.united_ways) + routing.shared
    size = (slots, config.hidden_size, config.expert_size)
    return [
        ExpertShape(*size, tokens, config.top_k + routing.shared_for(tokens), args.dtype, device)
        for tokens in sorted(set(args.tokens))
    ]


def _has_cuda(device: str) -> bool:
    import torch

    return torch.device(device).type == "cuda" and torch.cuda.is_available()


def _device_name(device: object) -> str:
    import torch

    return torch.cuda.get_device_name(device)


def tune(shapes: list[ExpertShape], measure: Measure, budget_s: float, console: Console) -> Iterator[Tuned]:
    """The fastest tiles for each shape; shapes share the time evenly, and those it does not reach are left out."""
    deadline = time.monotonic() + budget_s
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("tuning", total=len(shapes))
        for number, shape in enumerate(shapes):
            left = deadline - time.monotonic()
            if left > 0:
                result = _tune_one(shape, measure, time.monotonic() + left / (len(shapes) - number))
                if result is not None:
                    yield result
            progress.advance(task)


def _tune_one(shape: ExpertShape, measure: Measure, deadline: float) -> Tuned | None:
    """One kernel after the other from the default on: their times add up, so each can be chosen alone."""
    default = default_tiles(shape)
    default_seconds = measure(shape, default)
    best, best_seconds = default, default_seconds
    for rows, start in _starts(shape):
        chosen = start
        seconds = measure(shape, chosen) if rows != default["gate_up"].rows else default_seconds
        for kernel in start:
            for config in _shuffled(candidates(shape, kernel, rows)):
                if time.monotonic() > deadline:
                    break
                tried = {**chosen, kernel: config}
                took = measure(shape, tried)
                if took is not None and (seconds is None or took < seconds):
                    chosen, seconds = tried, took
        if seconds is not None and (best_seconds is None or seconds < best_seconds):
            best, best_seconds = chosen, seconds
    return None if best_seconds is None else Tuned(shape, best, best_seconds, default_seconds)


def _shuffled(configs: Iterable[TileConfig]) -> list[TileConfig]:
    """In an order of its own, always the same: what the time does not suffice for is then nothing in particular."""
    order = list(configs)
    random.Random(0).shuffle(order)
    return order


def candidates(shape: ExpertShape, kernel: str, rows: int) -> Iterator[TileConfig]:
    """Tiles worth trying for a kernel in the shape's phase."""
    decode = shape.phase == "decode"
    columns = (32, 64, 128) if decode else (64, 128, 256)
    depths = (64, 128, 256) if decode else (32, 64)
    warps = (4, 8)
    stages = (3, 4, 5) if decode else (3, 4)
    matrices = 2 if kernel == "gate_up" else 1
    for size, depth, num_warps, num_stages in itertools.product(columns, depths, warps, stages):
        config = TileConfig(rows, size, depth, num_warps, num_stages)
        if config.shared_memory_bytes(matrices, itemsize=2) <= SHARED_MEMORY_BYTES:
            yield config


def _starts(shape: ExpertShape) -> Iterator[tuple[int, dict[str, TileConfig]]]:
    """Numbers of rows worth trying in the shape's phase, each with the default tiles in so many rows."""
    default = default_tiles(shape)
    for rows in [default["gate_up"].rows] if shape.phase == "decode" else [64, 128]:
        yield rows, {kernel: replace(config, rows=rows) for kernel, config in default.items()}


def compile_all(shapes: list[ExpertShape], routing: Routing, device: str, budget_s: float) -> int:
    """Compile every candidate for these shapes in several processes; returns how many were done in this time."""
    jobs: list[tuple[ExpertShape, dict[str, TileConfig]]] = []
    kinds: set[tuple[str, int]] = set()
    for shape in shapes:
        for rows, chosen in _starts(shape):
            if (shape.phase, rows) in kinds:  # kernels do not depend on the number of tokens otherwise
                continue
            kinds.add((shape.phase, rows))
            pairs = itertools.zip_longest(*(_shuffled(candidates(shape, kernel, rows)) for kernel in KERNELS))
            jobs += [(shape, {k: tile or chosen[k] for k, tile in zip(KERNELS, pair, strict=True)}) for pair in pairs]
    processes = min(_MOST_PROCESSES, max(1, (os.cpu_count() or 2) - 1), len(jobs))
    parts = [jobs[i::processes] for i in range(processes)]
    deadline = time.time() + budget_s
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        done, _ = wait([pool.submit(_compile, part, routing, device, deadline) for part in parts])
    return sum(future.result() for future in done)


def _compile(
    jobs: list[tuple[ExpertShape, dict[str, TileConfig]]], routing: Routing, device: str, deadline: float
) -> int:
    """Run each job once; what is compiled for that is found again by other processes."""
    layers, done = Layers(routing, device, copies=1), 0
    for shape, tiles in jobs:
        if time.time() > deadline:
            break
        layers.calls(shape, tiles)
        done += 1
    return done


class Layers:
    """Expert layers with random weights on a device."""

    def __init__(self, routing: Routing, device: str, copies: int | None = None) -> None:
        """`copies` of the weights; None: as many as take them out of the caches."""
        self._routing, self._device, self._copies = routing, device, copies
        self._weights: dict[tuple, list] = {}

    def measure(self, shape: ExpertShape, tiles: dict[str, TileConfig]) -> float | None:
        """Seconds of one layer, or None if the tiles do not fit the device."""
        import torch

        calls = self.calls(shape, tiles)
        return None if calls is None else median_s(calls, torch.device(self._device), _RUNS)

    def calls(self, shape: ExpertShape, tiles: dict[str, TileConfig]) -> list[Callable[[], object]] | None:
        """Calls of one layer each, of which the first has been made; None if the tiles do not fit the device."""
        import torch
        import triton

        from backend.kernels.gpu.grouped_experts import run_with_tiles

        torch.manual_seed(0)
        layers, options = self._layers(shape), {"device": self._device}
        hidden = torch.randn(shape.tokens, shape.hidden, dtype=layers[0][0].dtype, **options)
        shared = self._routing.shared_for(shape.tokens)
        scores = torch.rand(shape.tokens, self._routing.experts, **options)
        gate, slots = scores.topk(shape.top_k - shared, dim=1)
        always = torch.arange(shape.slots - shared, shape.slots, **options).expand(shape.tokens, shared)
        slots, gate = torch.cat([slots, always], 1), torch.cat([gate, torch.ones(always.shape, **options)], 1)
        calls = [
            lambda w13=w13, w2=w2: run_with_tiles(hidden, w13, w2, slots, gate, shape.phase, tiles)
            for w13, w2 in layers
        ]
        try:
            calls[0]()
        except (triton.TritonError, RuntimeError):  # what does not fit, or what the compiler cannot make
            return None
        return calls

    def _layers(self, shape: ExpertShape) -> list:
        import torch

        key = (shape.slots, shape.hidden, shape.size, shape.dtype)
        if key not in self._weights:
            options = {"dtype": getattr(torch, shape.dtype), "device": self._device}
            layer_bytes = 3 * shape.slots * shape.hidden * shape.size * options["dtype"].itemsize
            copies = self._copies or max(2, min(_MOST_COPIES, -(-_WEIGHT_BYTES // layer_bytes)))
            self._weights[key] = [
                (
                    torch.randn(shape.slots, 2 * shape.size, shape.hidden, **options),
                    torch.randn(shape.slots, shape.hidden, shape.size, **options),
                )
                for _ in range(copies)
            ]
        return self._weights[key]


def _table(shape: str, results: list[Tuned]) -> Table:
    table = Table(title=f"{shape}: one expert layer")
    for column in ("tokens", "phase", "rule (µs)", "tuned (µs)", "gate_up", "down"):
        table.add_column(column, justify="right")
    for result in results:
        default = "does not fit" if result.default_seconds is None else f"{result.default_seconds * 1e6:.1f}"
        tiles = [
            f"{t.rows}×{t.columns}×{t.depth}, {t.num_warps} warps, {t.num_stages} stages" for t in result.tiles.values()
        ]
        table.add_row(
            str(result.shape.tokens), result.shape.phase, default, f"{result.seconds * 1e6:.1f}", tiles[0], tiles[1]
        )
    return table
