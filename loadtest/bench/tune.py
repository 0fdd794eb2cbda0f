"""Block sizes of the grouped expert kernels for one GPU: measure candidates, write the fastest to `backend/kernels/tuned/`.

A shape is tuned at several numbers of tokens, with routing as even as a uniform router's; every candidate is timed as CUDA
graph replays over several copies of the weights, so that they come from memory and not from the cache.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from backend.kernels.tuning import (
    SHARED_MEMORY_BYTES,
    TUNED_DIR,
    ExpertShape,
    TileConfig,
    default_tiles,
    entry,
    write_entries,
)
from backend.models.dummy import PREFIX, SHAPES, raw_config
from backend.models.registry import parse_config

HELP = "find block sizes of the expert kernels for this GPU"

#: Weights are read from copies of at least this size in all, several times any GPU's cache.
_WEIGHT_BYTES = 2**30
_REPLAYS = 20

#: Seconds of one call with the given tiles, or None if they do not fit the device.
Measure = Callable[[ExpertShape, dict[str, TileConfig]], float | None]


@dataclass(frozen=True)
class Tuned:
    """The outcome for one number of tokens; seconds of one expert layer."""

    shape: ExpertShape
    tiles: dict[str, TileConfig]
    seconds: float
    default_seconds: float | None


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen1.5-moe-a2.7b", help="sizes of this model")
    parser.add_argument("--united-ways", type=int, nargs="*", default=[8], help="ways of united experts with slots")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 2048, 8192], help="rows of a step")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget-s", type=float, default=300.0, help="stop after this many seconds (default 300)")
    parser.add_argument(
        "--folder", type=Path, default=TUNED_DIR, help="where the file goes (default: where it is read)"
    )


def main(args: argparse.Namespace, console: Console) -> int:
    """Tune, print a table and write the file; exit status."""
    if min(args.tokens) < 1 or min(args.united_ways, default=2) < 2 or args.budget_s <= 0:
        console.print("[red]--tokens must be at least 1, --united-ways at least 2, --budget-s above 0[/red]")
        return 2
    import torch

    if torch.device(args.device).type != "cuda" or not torch.cuda.is_available():
        console.print("[red]tune needs a CUDA device; without one the rule in backend/kernels/tuning.py is used[/red]")
        return 1
    config = parse_config(raw_config(PREFIX + args.shape))
    slots = config.num_experts + sum(-(-config.num_experts // way) for way in args.united_ways)
    name = torch.cuda.get_device_name(args.device)
    shapes = [
        ExpertShape(slots, config.hidden_size, config.expert_size, tokens, config.top_k, args.dtype, name)
        for tokens in sorted(set(args.tokens))
    ]
    results = tune(shapes, on_device(args.device, config.num_experts), args.budget_s, console)
    if not results:
        console.print("[red]no candidate was measured: raise --budget-s[/red]")
        return 1
    console.print(_table(args.shape, results))
    path = write_entries(args.folder, shapes[0], [entry(result.shape, result.tiles) for result in results])
    console.print(f"Wrote {path}.")
    return 0


def tune(shapes: list[ExpertShape], measure: Measure, budget_s: float, console: Console) -> list[Tuned]:
    """The fastest tiles for each shape; shapes share the time evenly, and those it does not reach are left out."""
    deadline, results = time.monotonic() + budget_s, []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("tuning", total=len(shapes))
        for number, shape in enumerate(shapes):
            left = deadline - time.monotonic()
            if left > 0:
                result = _tune_one(shape, measure, time.monotonic() + left / (len(shapes) - number))
                results += [] if result is None else [result]
            progress.advance(task)
    return results


def _tune_one(shape: ExpertShape, measure: Measure, deadline: float) -> Tuned | None:
    """One kernel after the other from the default on: their times add up, so each can be chosen alone."""
    default = default_tiles(shape)
    default_seconds = measure(shape, default)
    best, best_seconds = default, default_seconds
    rows = [default["gate_up"].rows] if shape.phase == "decode" else [64, 128]
    for count in rows:
        chosen = {kernel: _with_rows(config, count) for kernel, config in default.items()}
        seconds = measure(shape, chosen) if count != default["gate_up"].rows else default_seconds
        for kernel in chosen:
            for config in candidates(shape, kernel, count):
                if time.monotonic() > deadline:
                    break
                tried = {**chosen, kernel: config}
                took = measure(shape, tried)
                if took is not None and (seconds is None or took < seconds):
                    chosen, seconds = tried, took
        if seconds is not None and (best_seconds is None or seconds < best_seconds):
            best, best_seconds = chosen, seconds
    return None if best_seconds is None else Tuned(shape, best, best_seconds, default_seconds)


def candidates(shape: ExpertShape, kernel: str, rows: int) -> Iterator[TileConfig]:
    """Tiles worth trying for a kernel in the shape's phase."""
    decode = shape.phase == "decode"
    columns = (16, 32, 64, 128) if decode else (64, 128, 256)
    depths = (64, 128, 256) if decode else (32, 64)
    warps = (4, 8)
    stages = (3, 4, 5) if decode else (3, 4)
    matrices = 2 if kernel == "gate_up" else 1
    for size, depth, num_warps, num_stages in itertools.product(columns, depths, warps, stages):
        config = TileConfig(rows, size, depth, num_warps, num_stages)
        if config.shared_memory_bytes(matrices, itemsize=2) <= SHARED_MEMORY_BYTES:
            yield config


def _with_rows(config: TileConfig, rows: int) -> TileConfig:
    return TileConfig(rows, config.columns, config.depth, config.num_warps, config.num_stages)


def on_device(device: str, num_experts: int) -> Measure:
    """Measures expert layers on a CUDA device; of the slots, only the experts' own are routed to."""
    import torch
    import triton

    from backend.kernels.gpu.grouped_experts import run_with_tiles

    weights: dict[tuple, list] = {}

    def copies(shape: ExpertShape) -> list:
        key = (shape.slots, shape.hidden, shape.size, shape.dtype)
        if key not in weights:
            dtype = getattr(torch, shape.dtype)
            layer_bytes = 3 * shape.slots * shape.hidden * shape.size * dtype.itemsize
            weights[key] = [
                (
                    torch.randn(shape.slots, 2 * shape.size, shape.hidden, dtype=dtype, device=device),
                    torch.randn(shape.slots, shape.hidden, shape.size, dtype=dtype, device=device),
                )
                for _ in range(max(2, -(-_WEIGHT_BYTES // layer_bytes)))
            ]
        return weights[key]

    def measure(shape: ExpertShape, tiles: dict[str, TileConfig]) -> float | None:
        layers = copies(shape)
        torch.manual_seed(0)
        hidden = torch.randn(shape.tokens, shape.hidden, dtype=layers[0][0].dtype, device=device)
        scores = torch.rand(shape.tokens, num_experts, device=device)
        gate, slots = scores.topk(shape.top_k, dim=1)

        def step() -> None:
            for w13, w2 in layers:
                run_with_tiles(hidden, w13, w2, slots, gate, shape.phase, tiles)

        try:
            step()
        except triton.runtime.errors.OutOfResources:
            return None
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        times = []
        for _ in range(_REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / len(layers))
        return statistics.median(times)

    return measure


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
