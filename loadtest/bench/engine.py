"""Engine alone, beside other engines on the same checkpoint and prompts."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from backend.brownout.calibration_text import read_calibration, require_tokens
from backend.brownout.points import SYNTAX, describe, parse_points
from backend.brownout.settings import MECHANISMS, WITH_UNITED, Settings
from backend.config import EngineConfig
from backend.engine.model_runner import resolve_device
from backend.errors import ConfigError
from backend.models.dummy import PREFIX
from backend.tokenizer import load_tokenizer
from loadtest.bench import options
from loadtest.bench.budget import Budget
from loadtest.bench.engine_tables import show
from loadtest.bench.our_engine import AtSettings, OurEngine
from loadtest.bench.peer_process import PeerProcess, PeerSpec, peer_spec
from loadtest.bench.peers import Peer, TransformersPeer, export_shape, export_united
from loadtest.bench.rounds import OURS, Rounds, figures
from loadtest.bench.workload import Workload, machine, write_json

HELP = "the engine alone, with or without peers"
#: Way of a shape's seeded united experts if none is asked for.
_SHAPE_WAY = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_workload(parser)
    options.add_place(parser)
    parser.add_argument(
        "--text", action="append", type=Path, default=[], metavar="FILE", help="prompts from this text (.txt, .jsonl, or "
        "token ids .npy) instead of random tokens: experts are then chosen as in service; may be given again"
    )  # fmt: skip
    parser.add_argument("--routing", default="uniform", help="expert skew of a shape: uniform or zipf:S")
    parser.add_argument("--threshold-prefill", type=float, default=1.0, help="share of assignments kept (default 1)")
    parser.add_argument("--threshold-decode", type=float, default=1.0, help="share of assignments kept (default 1)")
    parser.add_argument("--mechanism", choices=MECHANISMS, default="united", help="what is done with the others")
    parser.add_argument(
        "--way", type=int, default=0, help="experts per united expert (default: the most there are; 8 for a shape)"
    )
    parser.add_argument(
        "--beside", action="extend", nargs="+", default=[], metavar="POINTS", help=f"further points, in turn: {SYNTAX}"
    )
    parser.add_argument(
        "--widen", type=options.positive, default=1, metavar="R", help="make each routed and united expert R times as wide "
        "without changing what it computes, so that experts weigh as in a larger model (default 1)"
    )  # fmt: skip
    add_peer(parser)
    parser.add_argument("--profile", action="store_true", help="say where the time of a step goes")
    parser.add_argument("--steps", type=options.positive, help="watch resident memory over this many further steps")
    options.add_runs(parser, 3)
    options.add_budget(parser)
    options.add_output(parser)


def add_peer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peer",
        action="append",
        type=peer_spec,
        default=[],
        metavar="transformers | vllm[:BINDING]=PYTHON",
        help="measure this engine in turn; PYTHON is the interpreter of an environment that has it, BINDING the processors "
        "of its threads (vllm: auto, nobind or as in 0-1; default auto)",
    )


def main(args: argparse.Namespace, console: Console) -> int:
    settings = Settings(
        threshold_prefill=args.threshold_prefill,
        threshold_decode=args.threshold_decode,
        mechanism=args.mechanism,
        way=args.way,
    )
    if args.peer and args.widen > 1:
        raise ConfigError("peers load the checkpoint as it is: measure them without --widen")
    points = {describe(point): point for point in parse_points(args.beside)}
    checkpoint = options.checkpoint_of(args)
    with console.status(f"measuring {checkpoint}: {args.runs} runs and one to warm up"):
        result = run(
            checkpoint=checkpoint,
            work=options.workload_of(args),
            text=args.text,
            settings=settings,
            device=args.device,
            dtype=args.dtype,
            routing=args.routing,
            runs=args.runs,
            peers=args.peer,
            points=points,
            widen=args.widen,
            profile=args.profile,
            steps=args.steps,
            budget=Budget(args.budget),
            write=(lambda partial: write_json(args.json, partial)) if args.json else _drop,
        )
    show(result, checkpoint, console)
    if args.json:
        console.print(f"Wrote {args.json}.")
    return 1 if any("error" in peer for peer in result.get("peers", {}).values()) else 0


def _drop(_: dict) -> None:
    pass


def run(
    *,
    checkpoint: str,
    work: Workload,
    text: Sequence[Path] = (),
    settings: Settings,
    device: str,
    dtype: str,
    routing: str = "uniform",
    runs: int,
    peers: Sequence[PeerSpec] = (),
    points: Mapping[str, Settings] | None = None,
    widen: int = 1,
    profile: bool = False,
    kernel_profile: bool = False,
    steps: int | None = None,
    budget: Budget | None = None,
    write: Callable[[dict], None] = _drop,
) -> dict:
    """Measure ours, further points of its settings and the peers in turn, run by run.

    A peer that fails, or a point that the engine refuses, is reported with the reason and the rest goes on. At least one run is
    measured, further ones while the budget lasts. `write` is called with the growing result, which is returned in the end.
    """
    budget, points = budget or Budget(), points or {}
    on_gpu = is_on_gpu(device)
    with contextlib.ExitStack() as stack:
        united, similarity = _for_dummy(checkpoint, [settings, *points.values()])
        loaded = checkpoint
        # On a GPU transformers takes our weights as they are.
        if exported := checkpoint.startswith(PREFIX) and any(not on_gpu or spec.python for spec in peers):
            # Peers read files: seeded weights are written once, and everyone loads them from there.
            loaded, united = _export(checkpoint, united, dtype, stack)
        config = EngineConfig(
            checkpoint=loaded,
            routing=routing,
            device=device,
            dtype=dtype,
            united=united,
            similarity=similarity,
            widen_experts=widen,
            **sizes_for(work, on_gpu),
        )
        ours = OurEngine(config)
        prompts = _prompts_of(text, work, loaded, ours.engine.vocab_size)
        rounds = Rounds(work, prompts)
        rounds.engines[OURS] = base = AtSettings(ours, settings)
        result = _described(checkpoint, work, text, settings, config, ours)
        _enter_points(rounds, ours, points)
        rounds.round(budget, measured=False)
        # The export and transformers' model are in this process: with them its memory is not ours alone.
        memory = None if exported else ours.memory()
        _enter_peers(rounds, peers, budget, lambda spec: _peer(spec, loaded, ours, dtype, work, stack))
        for number in range(runs):
            if number and budget.spent:
                break
            rounds.round(budget)
            result |= figures(rounds, base, ours, memory, [spec.name for spec in peers], list(points))
            write(result)
        ours.engine.set_settings(settings)
        for further in _further(ours, prompts, work, profile, kernel_profile, steps):
            result |= further
            write(result)
    return result


def _enter_points(rounds: Rounds, ours: OurEngine, points: Mapping[str, Settings]) -> None:
    """Have further points of our settings measured, but for those that the engine refuses."""
    for name, point in points.items():
        try:
            rounds.engines[name] = AtSettings(ours, point)
        except ConfigError as error:
            rounds.fail(name, error)


def _enter_peers(rounds: Rounds, peers: Sequence[PeerSpec], budget: Budget, start: Callable[[PeerSpec], Peer]) -> None:
    """Start the peers and have them measured once they have warmed up, as far as the budget reaches."""
    for spec in peers:
        if budget.spent:
            break
        try:
            rounds.engines[spec.name] = start(spec)
            rounds.warm_up(spec.name)
        except Exception as error:  # a peer may fail in any way; ours is measured all the same
            rounds.fail(spec.name, error)


def _further(
    ours: OurEngine,
    prompts: list[list[int]],
    work: Workload,
    profile: bool,
    kernel_profile: bool,
    steps: int | None,
) -> Iterator[dict]:
    """What is asked for besides the rates, one after the other."""
    if profile:
        yield {"profile": ours.profile(prompts, min(work.new_tokens, 32))}
    if kernel_profile:
        try:
            found = {"decode_kernels": ours.decode_kernels(prompts, work.new_tokens)}
        except (RuntimeError, ValueError) as error:  # torch's profiler does not see every device
            found = {"decode_kernels_error": str(error)}
        yield found
    if steps:
        yield {"memory_growth": ours.growth(work, steps)}


def _export(checkpoint: str, ways: str, dtype: str, stack: contextlib.ExitStack) -> tuple[str, str]:
    """A folder with a dummy's weights, and files of united experts of these ways; they are there until the stack is left."""
    root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
    # Apart from each other: some peers load whatever weights are in a checkpoint's folder.
    (folder := root / "checkpoint").mkdir()
    export_shape(checkpoint, folder, dtype)
    united = {way: root / f"united-{way}.safetensors" for way in filter(None, ways.split(","))}
    for way, path in united.items():
        export_united(folder, int(way), path)
    return str(folder), ",".join(map(str, united.values()))


def _described(
    checkpoint: str, work: Workload, text: Sequence[Path], settings: Settings, config: EngineConfig, ours: OurEngine
) -> dict:
    """What is measured, for whoever reads the figures."""
    return {
        "settings": {
            **asdict(settings),
            "way": ours.engine.available.way_of(settings),
            "checkpoint": checkpoint,
            "routing": config.routing,
            "dtype": config.dtype,
            "widen_experts": config.widen_experts,
            "device": str(ours.device),
        },
        "workload": work,
        "text": [path.name for path in text],
        "machine": machine(),
    }


def is_on_gpu(device: str) -> bool:
    """Whether the parameter `device` names CUDA devices, or one is found for it."""
    return resolve_device(device.partition(",")[0].strip()).type == "cuda"


def sizes_for(work: Workload, on_gpu: bool) -> dict[str, int]:
    """Parameters of an engine that serves this work."""
    return {
        "max_model_len": work.prompt_tokens + work.new_tokens,
        # On a GPU each further size of a batch takes time to capture, and each sequence memory.
        "max_running": max(64 if on_gpu else 256, work.requests),
        "max_waiting": max(1024, work.requests),
    }


def _prompts_of(text: Sequence[Path], work: Workload, checkpoint: str, vocab_size: int) -> list[list[int]]:
    """Stretches of the texts, drawn evenly from them, short texts end to end; without texts random tokens.

    Raises ConfigError if the texts do not suffice.
    """
    if not text:
        return work.prompts(vocab_size)
    tokenizer = load_tokenizer(checkpoint, vocab_size) if any(path.suffix != ".npy" for path in text) else None
    length, needed = work.prompt_tokens, work.requests * work.prompt_tokens
    windows = read_calibration(text, tokenizer, vocab_size, needed, length, work.seed)
    require_tokens(windows, needed, f"a benchmark of {work.requests} prompts of {length} tokens")
    ids = [token for window in windows for token in window]
    return [ids[start : start + length] for start in range(0, needed, length)]


def _for_dummy(checkpoint: str, points: list[Settings]) -> tuple[str, str]:
    """Parameters `united` and `similarity` with which a dummy has what these settings need; a checkpoint has its own files."""
    if not checkpoint.startswith(PREFIX):
        return "", ""
    ways = sorted({point.way or _SHAPE_WAY for point in points if point.dims and point.mechanism in WITH_UNITED})
    reroutes = any(point.dims and point.mechanism == "reroute" for point in points)
    return ",".join(map(str, ways)), "seeded" if reroutes else ""


def _peer(
    spec: PeerSpec, checkpoint: str, ours: OurEngine, dtype: str, work: Workload, stack: contextlib.ExitStack
) -> Peer:
    if spec.python is None and checkpoint.startswith(PREFIX):
        return TransformersPeer.of_model(ours.engine.runner.model, checkpoint)
    if spec.python is None:
        return TransformersPeer.of_checkpoint(checkpoint, ours.device, dtype)
    return stack.enter_context(
        PeerProcess(
            spec,
            checkpoint=checkpoint,
            dtype=str(ours.engine.runner.model.dtype).removeprefix("torch."),
            device=ours.device.type,
            max_model_len=work.prompt_tokens + work.new_tokens,
            requests=work.requests,
        )
    )
