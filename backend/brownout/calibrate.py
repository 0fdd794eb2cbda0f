"""Calibrate a checkpoint: which settings lose least quality for what they save.

python -m backend.brownout.calibrate CHECKPOINT --output brownout-profile.json --questions 25

Measures a grid of settings through the serving engine as backend.brownout.evaluate does, and the time of their steps, turn by
turn within one running batch. The settings that no others beat in both loss and cost become the profile's levels, from full
quality on. A picture of all points lies beside the profile.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from backend.brownout.evaluate import (
    Measures,
    add_measure_arguments,
    make_measures,
    measure_point,
    open_engine,
    write_points,
)
from backend.brownout.fingerprint import checkpoint_fingerprint
from backend.brownout.layer_thresholds import LayerThresholds
from backend.brownout.points import SYNTAX, describe, parse_points
from backend.brownout.profile import Level, Profile, write_profile
from backend.brownout.settings import Available, Settings
from backend.brownout.step_time import step_times
from backend.engine.llm import LLM
from backend.errors import ConfigError

COSTS = {"time": "relative_step_time", "slots": "active_slots", "assignments": "assignments_per_token"}
#: Kinds of loss, what is preferred first.
MEASURES = ("letter", "exact_match", "choices", "perplexity")
#: Where a measured point holds them.
_KEYS = {"letter": "letter", "exact_match": "exact_match", "choices": "choices_normalised_loss", "perplexity": "text"}
_NEEDS = {"choices": "--choices", "perplexity": "--text"}
_THETAS = "0,0.2,0.4,0.6,0.8"


def default_grid(available: Available) -> list[str]:
    """Every mechanism that the loaded files allow, but dropping."""
    points = [f"united:{way}:{_THETAS}" for way in available.ways]
    points += [f"reroute/0:0:{_THETAS.removeprefix('0,')}"] if available.similarity else []
    return [*points, "piggyback:0:0.25,0.5,0.75", "top_k:0:0.25,0.5,0.75"]


def read_layers(path: Path, fingerprint: str) -> tuple[int, LayerThresholds]:
    """Way and table of a file that `backend.brownout.sensitivity` wrote; raises ConfigError for another or a foreign one."""
    try:
        raw = json.loads(path.read_text("utf-8"))
        found, way, table = raw["fingerprint"], int(raw["way"]), LayerThresholds.from_json(raw["layer_thresholds"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"thresholds by layer {path}: not a file of backend.brownout.sensitivity ({error})") from None
    if found != fingerprint:
        raise ConfigError(f"thresholds by layer {path} were made for another checkpoint (fingerprint {found})")
    return way, table


def losses(point: dict, kind: str) -> tuple[float, dict[str, float]]:
    """Loss in percent and by task of a measured point; a gain counts as no loss."""
    if kind == "perplexity":
        by_task = point["text"].get("increase_percent", {})
        return max(0.0, sum(by_task.values()) / max(1, len(by_task))), by_task
    found = point.get("choices_normalised_loss" if kind == "choices" else kind, {})
    loss = found.get("loss", {}) if kind != "choices" else found
    return max(0.0, loss.get("mean", 0.0)), loss.get("by_task", {})


def front(levels: Sequence[Level], cost: str) -> list[Level]:
    """The first level (full quality), then those that no other beats in both loss and cost, by falling cost.

    A level with the loss of the one before it stays only because it is cheaper, so loss never falls along the front.
    """
    full = levels[0]
    cheaper = sorted(
        (level for level in levels[1:] if getattr(level, cost) < getattr(full, cost)),
        key=lambda level: (level.loss_percent, getattr(level, cost)),
    )
    chosen = [full]
    for level in cheaper:
        if getattr(level, cost) < getattr(chosen[-1], cost):
            chosen.append(level)
    return chosen


def calibrate(
    llm: LLM, points: Sequence[Settings], measures: Measures, kind: str, rounds: int, progress: Progress
) -> tuple[list[Level], list[dict]]:
    """Every point as a level, the full model first, and as `evaluate.measure_point` gives it."""
    task = progress.add_task("quality", total=len(points) + 1)
    full = measure_point(llm, Settings(), measures)
    progress.advance(task)
    measured = [full]
    for settings in points:
        measured.append(measure_point(llm, settings, measures, full))
        progress.advance(task)
    every = [Settings(), *points]
    task = progress.add_task("step times", total=rounds)
    times = step_times(llm, every, prompts(measures), measures.batch, rounds, lambda: progress.advance(task))
    levels = []
    for settings, point, time in zip(every, measured, times, strict=True):
        steps = point.get("questions") or point.get("text") or next(iter(point["choices"].values()))
        loss, by_task = losses(point, kind)
        levels.append(
            Level(
                mechanism=settings.mechanism,
                way=settings.way,
                threshold_prefill=settings.threshold_prefill,
                threshold_decode=settings.threshold_decode,
                loss_percent=loss,
                active_slots=time.active_slots,
                assignments_per_token=time.assignments_per_token,
                relative_step_time=time.decode,
                loss_by_task=by_task,
                similarity_min=settings.similarity_min,
                ranking=settings.ranking,
                united_share=steps["united_share"],
                relative_prefill_time=time.prefill,
                other_losses={
                    name: losses(point, name)[0] for name in MEASURES if name != kind and _KEYS[name] in point
                },
            )
        )
    return levels, measured


def prompts(measures: Measures) -> list[list[int]]:
    """Token sequences like those that were measured, to time steps with."""
    found = [question.prompt for question in measures.questions]
    if measures.text is not None:
        found += [list(ids) for _, ids in measures.text.order]
    return found


def draw(path: Path, levels: Sequence[Level], chosen: Sequence[Level], cost: str, kind: str) -> None:
    """A picture of loss against cost; raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    names = dict.fromkeys(f"{level.mechanism} {level.way or ''}".strip() for level in levels[1:])
    for name in names:
        own = [level for level in levels[1:] if f"{level.mechanism} {level.way or ''}".strip() == name]
        own.sort(key=lambda level: level.threshold_decode)
        axes.plot([getattr(x, cost) for x in own], [x.loss_percent for x in own], "o:", label=name, markersize=4)
    axes.plot([getattr(x, cost) for x in chosen], [x.loss_percent for x in chosen], "k-", linewidth=1, label="profile")
    axes.set_xlabel(cost.replace("_", " "))
    axes.set_ylabel(f"loss of {kind.replace('_', ' ')}, %")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def show(chosen: Sequence[Level], console: Console) -> None:
    table = Table(title="Levels of the profile", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("level", "settings", "loss %", "replaced %", "slots", "assign.", "decode time", "prefill time"):
        table.add_column(column, justify="left" if column == "settings" else "right", no_wrap=column == "settings")
    for number, level in enumerate(chosen):
        table.add_row(
            str(number), describe(level.settings()), f"{level.loss_percent:.1f}", f"{100 * level.united_share:.0f}",
            f"{level.active_slots:.1f}", f"{level.assignments_per_token:.2f}", f"{level.relative_step_time:.2f}",
            f"{level.relative_prefill_time:.2f}",
        )  # fmt: skip
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="backend.brownout.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_measure_arguments(parser)
    parser.add_argument("--grid", action="extend", nargs="+", default=[], metavar="POINTS", help="points to measure (default: "
                        f"all mechanisms but drop): {SYNTAX}")  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("brownout-profile.json"), help="profile to write (default %(default)s)"
    )
    parser.add_argument(
        "--measure", choices=MEASURES, help="what loss is of (default: the first of these that is measured)"
    )
    parser.add_argument("--cost", choices=COSTS, default="time", help="what levels save (default %(default)s)")
    parser.add_argument("--layers", type=Path, action="append", default=[], metavar="FILE", help="thresholds by layer, written by "
                        "backend.brownout.sensitivity --json; measured with and put into the profile; may be given again for "
                        "another way (default: one threshold for all layers)")  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=7, help="times that every point's steps are timed (default %(default)s)"
    )
    args = parser.parse_args(argv)
    args.profile = "none"
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    console = Console()
    try:
        fingerprint = checkpoint_fingerprint(args.checkpoint)
        tables = dict(read_layers(path, fingerprint) for path in args.layers)
        llm = open_engine(args)
        llm.engine.runner.set_layer_thresholds(tables)
        points = parse_points(args.grid or default_grid(llm.engine.available))
        for settings in points:
            llm.engine.available.way_of(settings)
        measures = make_measures(args, llm)
        has = dict(
            zip(MEASURES, (measures.questions, measures.questions, measures.choices, measures.text), strict=True)
        )
        kind = args.measure or next(name for name in MEASURES if has[name])
        if not has[kind]:
            raise ConfigError(f"--measure {kind} needs {_NEEDS.get(kind, '--questions')}")
        if not prompts(measures):
            raise ConfigError("step times need --questions or --text")
        with Progress(console=console, transient=True) as progress:
            levels, measured = calibrate(llm, points, measures, kind, args.rounds, progress)
        chosen = front(levels, COSTS[args.cost])
        name = args.checkpoint.resolve().name
        write_profile(args.output, Profile(name, fingerprint, args.batch, kind, tuple(chosen), tables))
    except (ConfigError, OSError) as error:
        console.print(f"[red]The checkpoint cannot be calibrated:[/red] {error}")
        return 1
    show(chosen, console)
    console.print(f"Wrote {args.output}.")
    if args.json is not None:
        write_points(args, fingerprint, measured)
        console.print(f"Wrote {args.json}.")
    picture = args.output.with_suffix(".png")
    try:
        draw(picture, levels, chosen, COSTS[args.cost], kind)
        console.print(f"Wrote {picture}.")
    except ImportError:
        console.print("No picture: it needs matplotlib (pip install matplotlib).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
