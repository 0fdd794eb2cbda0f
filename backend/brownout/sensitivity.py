"""How much each layer's dimming costs, and whether a threshold of its own for each layer is better than one for all.

python -m backend.brownout.sensitivity CHECKPOINT --way 8 --text DOMAIN=FILE --text-as decode --json FILE

Each MoE layer is dimmed alone, at every threshold of --thetas; its loss is the divergence from the full model's predictions
over the text. From these losses and slots, taken as adding up over layers, follow the thresholds that lose least with no more
active slots in all than one threshold for all layers has. Both are then measured, with --questions also by the demo's questions.
"""

from __future__ import annotations

import argparse
import json
import math
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
from backend.brownout.measure import Text, apply, apply_by_layer
from backend.brownout.settings import Settings
from backend.engine.llm import LLM
from backend.errors import ConfigError

#: Budgets are counted in this part of a slot.
_SLOT_PART = 0.01


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


def least_loss(loss: np.ndarray, slots: np.ndarray, budget: float) -> list[int]:
    """By layer the column with which the sum of `loss` [L, G] is least while that of `slots` [L, G] is within `budget`.

    Exact but for rounding slots to hundredths (a knapsack by dynamic programming). Raises ValueError if nothing is within it.
    """
    costs = np.round(slots / _SLOT_PART).astype(int)
    room = math.ceil(budget / _SLOT_PART + len(costs) / 2)  # what rounding adds at most
    best = np.zeros(room + 1)  # least loss of the layers so far within each budget
    choices = []
    for layer_loss, layer_costs in zip(loss, costs, strict=True):
        rows = np.full((len(layer_loss), room + 1), np.inf)
        for row, value, cost in zip(rows, layer_loss, layer_costs, strict=True):
            row[cost:] = best[: max(0, room + 1 - cost)] + value
        choices.append(rows.argmin(0))
        best = rows.min(0)
    if not np.isfinite(best[room]):
        raise ValueError(f"no choice is within {budget} slots")
    chosen = []
    for number in range(len(choices) - 1, -1, -1):
        chosen.append(int(choices[number][room]))
        room -= costs[number, chosen[-1]]
    return chosen[::-1]


def compare(
    llm: LLM,
    measures: Measures,
    way: int,
    thetas: Sequence[float],
    loss: np.ndarray,
    slots: np.ndarray,
    full: dict,
    advance: Callable[[], None] = lambda: None,
) -> list[dict]:
    """For each theta between 0 and 1: points, as `measure_point` gives them, of it for all layers and of the best by layer."""
    pairs = []
    for number, theta in enumerate(thetas):
        if not 0.0 < theta < 1.0:
            continue  # nothing to choose
        uniform = [theta] * len(loss)
        best = [thetas[i] for i in least_loss(loss, slots, float(slots[:, number].sum()))]
        pair: dict = {"theta": theta}
        for name, table in (("uniform", uniform), ("by_layer", best)):
            found = measure_point(llm, _mean_settings(way, table), measures, full, table)
            pair[name] = {"thresholds": table, **found}
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="backend.brownout.sensitivity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_measure_arguments(parser)
    parser.add_argument("--way", type=int, default=0, help="experts per united expert (default: the most there are)")
    parser.add_argument("--thetas", default="0,0.2,0.4,0.6,0.8,1", help="thresholds of a layer (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        thetas = sorted({float(theta) for theta in args.thetas.split(",")})
    except ValueError:
        parser.error(f"--thetas must be numbers separated by commas, got {args.thetas!r}")
    args.divergence = True
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
            dimmed, between = sum(theta < 1 for theta in thetas), sum(0 < theta < 1 for theta in thetas)
            task = progress.add_task("layers", total=layers * dimmed)
            loss, slots = layer_losses(llm, measures.text, way, thetas, lambda: progress.advance(task))
            task_2 = progress.add_task("comparison", total=2 * between)
            pairs = compare(llm, measures, way, thetas, loss, slots, full, lambda: progress.advance(task_2))
        fingerprint = checkpoint_fingerprint(args.checkpoint)
    except (ConfigError, OSError) as error:
        console.print(f"[red]The checkpoint cannot be measured:[/red] {error}")
        return 1
    show(thetas, loss, slots, pairs, console)
    if args.json is not None:
        content = {"checkpoint": args.checkpoint.resolve().name, "fingerprint": fingerprint, "batch": args.batch,
                   "way": way, "thetas": thetas, "divergence": loss.tolist(), "active_slots": slots.tolist(),
                   "full": full, "comparison": pairs}  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=2) + "\n")
        console.print(f"Wrote {args.json}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
