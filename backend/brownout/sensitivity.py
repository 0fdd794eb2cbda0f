"""How much each layer's dimming costs, and whether a threshold of its own for each layer is better than one for all.

python -m backend.brownout.sensitivity CHECKPOINT --way 8 --text DOMAIN=FILE --text-as decode --json FILE

Each MoE layer is dimmed alone, at every threshold of --thetas; its loss is the divergence from the full model's predictions
over the text. From these losses and slots, taken as adding up over layers, follows the table of thresholds by layer that loses
least with as many active slots in all as one threshold for all layers has. Both are then measured, with --questions also by the
demo's questions. The file of --json is what backend.brownout.calibrate takes with --layers to put the table into a profile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from backend.brownout.evaluate import (
    FORM_NAMES,
    Measures,
    add_measure_arguments,
    make_measures,
    measure_point,
    open_engine,
)
from backend.brownout.fingerprint import checkpoint_fingerprint
from backend.brownout.layer_thresholds import LayerThresholds
from backend.brownout.measure import Text, apply, apply_by_layer
from backend.brownout.settings import Settings
from backend.engine.llm import LLM
from backend.errors import ConfigError


def layer_losses(
    llm: LLM, text: Text, way: int, thetas: Sequence[float], advance: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, np.ndarray]:
    """With one layer dimmed alone: divergence in nats a token, mean over domains, and the layer's active slots, both [L, G].

    `text` keeps the full model's predictions already (`Text.keep_full` and a first `score`). A threshold of 1 loses nothing.
    """
    layers = sum(llm.engine.runner.model.config.moe_layers)
    apply(llm, Settings())
    slots_of_full = text.score(llm)["active_slots_by_layer"]
    loss, slots = np.zeros((layers, len(thetas))), np.zeros((layers, len(thetas)))
    for layer in range(layers):
        for number, theta in enumerate(thetas):
            if theta == 1.0:
                slots[layer, number] = slots_of_full[layer]  # type: ignore[index]
                continue
            table = [1.0] * layers
            table[layer] = theta
            apply_by_layer(llm, _mean_settings(way, table), table)
            found = text.score(llm)
            by_domain = found["divergence"]
            loss[layer, number] = sum(by_domain.values()) / len(by_domain)  # type: ignore[attr-defined, arg-type]
            slots[layer, number] = found["active_slots_by_layer"][layer]  # type: ignore[index]
            advance()
    apply(llm, Settings())
    return loss, slots


def best_by_layer(thetas: Sequence[float], loss: np.ndarray, slots: np.ndarray) -> LayerThresholds:
    """Thresholds by layer that lose little with as many slots in all as each of the ascending `thetas` (0 … 1) in every layer.

    From 0 on thresholds are raised, always that of the layer which gains most for a slot. Each layer's `loss` against `slots`, both
    [L, G], is taken as its lower convex hull, and losses of layers as adding up: of all thresholds with so many slots none then
    loses less, and no layer's threshold falls while theta rises.
    """
    slots = np.maximum.accumulate(slots, axis=1)
    pieces = []  # (loss per slot, layer, slots from and to)
    for layer, (costs, losses) in enumerate(zip(slots, loss, strict=True)):
        corners = _lower_hull(costs, losses)
        for a, b in itertools.pairwise(corners):
            slope = (losses[b] - losses[a]) / (costs[b] - costs[a]) if costs[b] > costs[a] else -np.inf
            pieces.append((slope, layer, costs[a], costs[b]))
    pieces.sort(key=lambda piece: piece[0])  # stable: the pieces of a layer stay in their order
    rows = []
    for room in slots.sum(0) - slots[:, 0].sum():
        wanted = slots[:, 0].copy()
        for _, layer, low, high in pieces:
            wanted[layer] = low + min(room, high - low)
            room -= wanted[layer] - low
            if room <= 0:
                break
        row = [np.interp(n, costs, thetas) for n, costs in zip(wanted, slots, strict=True)]
        rows.append(tuple(round(float(theta), 4) for theta in row))
    rows[0] = (0.0,) * len(loss)
    rows[-1] = (1.0,) * len(loss)  # whatever the slots say
    return LayerThresholds(tuple(thetas), tuple(rows))


def _lower_hull(x: np.ndarray, y: np.ndarray) -> list[int]:
    """Places of the corners of the lower convex hull of points with x ascending, the first and the last among them."""
    corners: list[int] = []
    for place in range(len(x)):
        while len(corners) >= 2:
            a, b = corners[-2:]
            if (y[b] - y[a]) * (x[place] - x[a]) < (y[place] - y[a]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(place)
    return corners


def compare(
    llm: LLM,
    measures: Measures,
    way: int,
    thetas: Sequence[float],
    table: LayerThresholds,
    full: dict,
    advance: Callable[[], None] = lambda: None,
) -> list[dict]:
    """For each theta between 0 and 1: points, as `measure_point` gives them, of it for all layers and of the table's row."""
    pairs = []
    for theta in thetas:
        if not 0.0 < theta < 1.0:
            continue  # nothing to choose
        pair: dict = {"theta": theta}
        for name, row in (("uniform", [theta] * table.num_layers), ("by_layer", list(table.at(theta)))):
            found = measure_point(llm, _mean_settings(way, row), measures, full, row)
            pair[name] = {"thresholds": row, **found}
            advance()
        pairs.append(pair)
    apply(llm, Settings())
    return pairs


def _mean_settings(way: int, table: Sequence[float]) -> Settings:
    mean = sum(table) / len(table)
    return Settings(threshold_prefill=mean, threshold_decode=mean, way=way)


def show(thetas: Sequence[float], loss: np.ndarray, slots: np.ndarray, pairs: Sequence[dict], console: Console) -> None:
    table = Table(title="One layer dimmed alone: divergence, nats a token (active slots)", box=SIMPLE_HEAD)
    table.add_column("MoE layer", justify="right")
    for theta in thetas:
        table.add_column(f"θ {theta:g}", justify="right")
    for layer, (losses, used) in enumerate(zip(loss, slots, strict=True)):
        table.add_row(str(layer), *(f"{value:.4f} ({n:.1f})" for value, n in zip(losses, used, strict=True)))
    console.print(table)
    table = Table(title="One threshold for all layers, and each its own with as many slots", box=SIMPLE_HEAD)
    names = [name for name in FORM_NAMES.values() if pairs and name in pairs[0]["uniform"]]
    for column in ("thresholds", "slots", "divergence", *(f"{name} loss %" for name in names)):
        table.add_column(column, justify="left" if column == "thresholds" else "right")
    for pair in pairs:
        for point in (pair["uniform"], pair["by_layer"]):
            divergence = point["text"]["divergence"]
            table.add_row(
                " ".join(f"{theta:g}" for theta in point["thresholds"]),
                f"{point['text']['active_slots']:.1f}",
                f"{sum(divergence.values()) / len(divergence):.4f}",
                *(f"{point[name]['loss']['mean']:.1f}" for name in names),
            )
    console.print(table)


def _thetas(parser: argparse.ArgumentParser, name: str, text: str) -> list[float]:
    try:
        found = sorted({float(theta) for theta in text.split(",")})
    except ValueError:
        parser.error(f"--{name} must be numbers separated by commas, got {text!r}")
    if found[0] < 0 or found[-1] > 1:
        parser.error(f"--{name} must be between 0 and 1, got {text!r}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="backend.brownout.sensitivity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_measure_arguments(parser)
    parser.add_argument("--way", type=int, default=0, help="experts per united expert (default: the most there are)")
    parser.add_argument("--thetas", default="0,0.2,0.4,0.6,0.8,1", help="thresholds of a layer (default %(default)s)")
    parser.add_argument("--compare", help="thresholds at which the table and one for all layers are measured (default: those "
                        "of --thetas)")  # fmt: skip
    args = parser.parse_args(argv)
    thetas, compared = _thetas(parser, "thetas", args.thetas), _thetas(parser, "compare", args.compare or args.thetas)
    if thetas[0] != 0 or thetas[-1] != 1:
        parser.error(f"--thetas must have 0 and 1 among them, got {args.thetas!r}")
    args.divergence, args.profile = True, "none"
    console = Console()
    try:
        llm = open_engine(args)
        for theta in thetas:
            way = llm.engine.available.way_of(Settings(threshold_prefill=theta, way=args.way))
        measures = make_measures(args, llm)
        assert measures.text is not None
        layers = sum(llm.engine.runner.model.config.moe_layers)
        with Progress(console=console, transient=True) as progress:
            full = measure_point(llm, Settings(), measures)
            dimmed, between = sum(theta < 1 for theta in thetas), sum(0 < theta < 1 for theta in compared)
            task = progress.add_task("layers", total=layers * dimmed)
            loss, slots = layer_losses(llm, measures.text, way, thetas, lambda: progress.advance(task))
            task_2 = progress.add_task("comparison", total=2 * between)
            table = best_by_layer(thetas, loss, slots)
            pairs = compare(llm, measures, way, compared, table, full, lambda: progress.advance(task_2))
        fingerprint = checkpoint_fingerprint(args.checkpoint)
    except (ConfigError, OSError) as error:
        console.print(f"[red]The checkpoint cannot be measured:[/red] {error}")
        return 1
    show(thetas, loss, slots, pairs, console)
    if args.json is not None:
        content = {"checkpoint": args.checkpoint.resolve().name, "fingerprint": fingerprint, "batch": args.batch,
                   "way": way, "thetas": thetas, "divergence": loss.tolist(), "active_slots": slots.tolist(),
                   "layer_thresholds": table.to_json(), "full": full, "comparison": pairs}  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=2) + "\n")
        console.print(f"Wrote {args.json}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
