"""Record activations of a checkpoint, train its load predictor, and report how well it predicts.

python -m backend.elastic.train_predictor --checkpoint DIR [--distances 1,2,4] [--json FILE]

Writes load-predictor.safetensors beside the checkpoint (--output for another place). A layer and distance whose plain router
finds fewer than 80 % of the experts on held-out sequences is fine-tuned. Recall and load error are reported per layer and
distance on held-out sequences, by domain, and across a domain shift: trained on half of the domains, measured on the rest,
beside baselines that know past loads only. (An oracle has recall 1 and error 0.)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from backend.elastic.predictor import FILE_NAME, Ewma, HiddenLayer, LastWindow, LoadPredictor, load_error, recall
from backend.elastic.recording import Recording, record_traffic
from backend.elastic.traffic import demo_questions, mixed
from backend.errors import ConfigError
from backend.models.dummy import PREFIX

#: Below this held-out recall a layer is fine-tuned (MoEless).
ENOUGH = 0.8
#: Width of the hidden layer where a matrix is not enough.
HIDDEN_UNITS = 256
STEPS = 2500
_BATCH, _RATE, _CHECK_EVERY = 1024, 5e-3, 250
#: Tokens of a simulated step over which load error is taken.
_STEP_TOKENS = 64
#: Requests that share the steps of a batched measurement.
_TOGETHER = 16


class Data(NamedTuple):
    """N tokens for one predictor."""

    inputs: Tensor  # [N, M] of the earlier layer
    experts: Tensor  # [N, K] that the predicted layer's router chose


def split_sequences(recording: Recording, seed: int, held_out: float = 0.25) -> tuple[list[int], list[int]]:
    """(training, held-out) sequences; whole sequences, so that no token's neighbours leak, and some of every domain."""
    generator = torch.Generator().manual_seed(seed)
    training, testing = [], []
    for domain in range(len(recording.domain_names)):
        members = torch.nonzero(recording.domains == domain).flatten()
        members = members[torch.randperm(len(members), generator=generator)].tolist()
        count = max(1, round(held_out * len(members))) if len(members) > 1 else 0
        testing += members[:count]
        training += members[count:]
    if not testing:
        raise ConfigError("the recording has no domain with two sequences: nothing can be held out")
    return sorted(training), sorted(testing)


def fine_tune(
    start: tuple[Tensor, Tensor], data: Data, held_out: Data, top_k: int, seed: int, steps: int, units: int = 0
) -> tuple[Tensor, Tensor, HiddenLayer | None, float]:
    """Train a copy of the matrix [E, M] and bias [E] in `start` on `data`, with `units` hidden units beside it (0: none).

    The loss is the binary cross-entropy of every expert being chosen or not: the likeliest experts are then those most often
    among a token's K, and the probabilities add up to the expected load, of which a constant share is the simplest case.
    The state with the best recall on `held_out` wins. Returns (matrix, bias, hidden layer, that recall).
    """
    generator = torch.Generator().manual_seed(seed)
    width = start[0].shape[1]
    tensors = [start[0].clone(), start[1] - _even_odds(start, held_out.inputs, top_k)]
    if units:
        inner = torch.randn(units, width, generator=generator) / width**0.5
        tensors += [inner, torch.zeros(units), torch.zeros(len(start[1]), units)]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    optimizer = torch.optim.Adam(tensors, lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def logits(inputs: Tensor) -> Tensor:
        out = F.linear(inputs, tensors[0], tensors[1])
        return out + HiddenLayer(*tensors[2:])(inputs) if units else out

    best, found = [tensor.detach().clone() for tensor in tensors], -1.0
    for step in range(1, steps + 1):
        rows = torch.randint(len(data.inputs), (min(_BATCH, len(data.inputs)),), generator=generator)
        optimizer.zero_grad()
        found_odds = logits(data.inputs[rows].float())
        chosen = torch.zeros_like(found_odds).scatter_(1, data.experts[rows], 1.0)
        (F.binary_cross_entropy_with_logits(found_odds, chosen, reduction="sum") / len(rows)).backward()
        optimizer.step()
        schedule.step()
        if step % _CHECK_EVERY == 0 or step == steps:
            with torch.no_grad():
                now = recall(logits(held_out.inputs.float()).topk(top_k).indices, held_out.experts)
            if now > found:
                best, found = [tensor.detach().clone() for tensor in tensors], now
    return best[0], best[1], HiddenLayer(*best[2:]) if units else None, found


def _even_odds(router: tuple[Tensor, Tensor], inputs: Tensor, top_k: int) -> Tensor:
    """What the router's logits are on average half-way between the last expert chosen and the first that is not."""
    ranked = F.linear(inputs.float(), *router).topk(min(top_k + 1, len(router[1]))).values
    return ranked[:, -2:].mean()


def train(
    recording: Recording,
    distances: Sequence[int],
    sequences: Sequence[int],
    seed: int,
    progress: Progress,
    steps: int = STEPS,
) -> LoadPredictor:
    """A predictor from the given sequences; a fifth of them decides which form of it is enough, and when to stop.

    Forms are tried in this order until one finds 80 % of the experts: the router, a fine-tuned matrix, one with hidden units.
    """
    predictor = recording.predictor(*distances)
    weights, biases, tuned, hidden = dict(predictor.weights), dict(predictor.biases), set(), {}
    validation = list(sequences[::5])
    rows = recording.rows_of([s for s in sequences if s not in set(validation)])
    check = recording.rows_of(validation)
    if not len(rows) or not weights:
        raise ConfigError(
            f"nothing to train: {len(sequences)} sequences, {recording.num_layers} layers, distances {list(distances)}"
        )
    task = progress.add_task("training predictors", total=len(weights))
    for pair in weights:
        layer, distance = pair
        data, held_out = _data(recording, layer, distance, rows), _data(recording, layer, distance, check)
        found = recall(predictor.choose(held_out.inputs, layer, distance), held_out.experts)
        start = weights[pair], biases[pair]
        for units in (0, HIDDEN_UNITS):
            if found >= ENOUGH:
                break
            weight, bias, added, better = fine_tune(start, data, held_out, recording.top_k, seed, steps, units)
            if better > found:
                weights[pair], biases[pair], found = weight, bias, better
                tuned.add(pair)
                if added is not None:
                    hidden[pair] = added
        progress.advance(task)
    progress.remove_task(task)
    return replace(predictor, weights=weights, biases=biases, tuned=frozenset(tuned), hidden=hidden)


def _data(recording: Recording, layer: int, distance: int, rows: Tensor) -> Data:
    return Data(recording.hidden[layer - distance, rows], recording.experts[layer, rows].long())


def measure(
    recording: Recording,
    predictor: LoadPredictor,
    sequences: Sequence[int],
    warm_up: Sequence[int] = (),
    together: int = 1,
) -> list[dict[str, object]]:
    """Recall and load errors per layer and distance over steps of 64 tokens; baselines have seen `warm_up` before.

    So many sequences advance `together`: the fewer, the more a step's load differs from that of the steps before.
    """
    plain = recording.predictor(*{distance for _, distance in predictor.pairs})
    rows = recording.rows_of(sequences)
    steps, before = steps_of(recording, sequences, together), steps_of(recording, warm_up, together)
    result = []
    for layer, distance in sorted(predictor.pairs):
        experts = recording.experts[layer].long()
        inputs = recording.hidden[layer - distance]
        baselines = {"last_window": LastWindow(recording.num_experts), "ewma": Ewma(recording.num_experts)}
        errors: dict[str, list[float]] = {"predictor": [], "router": [], **{name: [] for name in baselines}}
        for step in before:
            for baseline in baselines.values():
                baseline.observe(_count(experts[step], recording.num_experts))
        for step in steps:
            loads = _count(experts[step], recording.num_experts)
            errors["predictor"].append(load_error(predictor.loads(inputs[step], layer, distance), loads))
            errors["router"].append(load_error(plain.loads(inputs[step], layer, distance), loads))
            for name, baseline in baselines.items():
                errors[name].append(load_error(baseline.predict(float(loads.sum())), loads))
                baseline.observe(loads)
        result.append(
            {
                "layer": layer,
                "distance": distance,
                "form": _form(predictor, layer, distance),
                "recall": recall(predictor.choose(inputs[rows], layer, distance), experts[rows]),
                "recall_router": recall(plain.choose(inputs[rows], layer, distance), experts[rows]),
                "load_error": {name: sum(values) / len(values) for name, values in errors.items()},
            }
        )
    return result


def steps_of(recording: Recording, sequences: Sequence[int], together: int) -> list[Tensor]:
    """Tokens of each step of 64, when so many sequences are served at a time, token by token in turn."""
    order: list[Tensor] = []
    for first in range(0, len(sequences), together):
        group = [recording.rows_of([s]) for s in sequences[first : first + together]]
        position = torch.cat([torch.arange(len(rows)) for rows in group])
        order.append(torch.cat(group)[position.argsort(stable=True)])
    return list(torch.cat(order).split(_STEP_TOKENS)) if order else []


def run(
    recording: Recording, distances: Sequence[int], seed: int, progress: Progress, steps: int = STEPS
) -> tuple[LoadPredictor, dict]:
    """(predictor trained on all domains, report as JSON values)."""
    training, testing = split_sequences(recording, seed)
    predictor = train(recording, distances, training, seed, progress, steps)
    domains = recording.domains.tolist()
    report: dict[str, object] = {
        "fingerprint": recording.fingerprint,
        "tokens": recording.hidden.shape[1],
        "sequences": {"training": len(training), "held_out": len(testing)},
        "held_out": measure(recording, predictor, testing, training),
        "held_out_batched": measure(recording, predictor, testing, training, _TOGETHER),
    }
    for key, together in (("by_domain", 1), ("by_domain_batched", _TOGETHER)):
        report[key] = {
            name: measure(recording, predictor, members, training, together)
            for index, name in enumerate(recording.domain_names)
            if (members := [s for s in testing if domains[s] == index])
        }
    known = [s for s in training + testing if domains[s] % 2 == 0]
    shifted = [s for s in training + testing if domains[s] % 2 == 1]
    if shifted:
        # Baselines come from the domains before the shift, and adapt as they go.
        abroad = train(recording, distances, known, seed, progress, steps)
        report["domain_shift"] = measure(recording, abroad, shifted, known)
        report["domain_shift_batched"] = measure(recording, abroad, shifted, known, _TOGETHER)
    return predictor, report


def _form(predictor: LoadPredictor, layer: int, distance: int) -> str:
    if (layer, distance) in predictor.hidden:
        return "hidden units"
    return "matrix" if (layer, distance) in predictor.tuned else "router"


def _count(experts: Tensor, num_experts: int) -> Tensor:
    return torch.bincount(experts.flatten(), minlength=num_experts)


def show(report: dict, console: Console) -> None:
    """Tables for people."""
    titles = {
        "held_out": "Held-out sequences, one at a time",
        "held_out_batched": f"Held-out sequences, {_TOGETHER} at a time",
        "domain_shift": "After a domain shift, one sequence at a time",
        "domain_shift_batched": f"After a domain shift, {_TOGETHER} at a time",
    }
    for key, title in titles.items():
        if key not in report:
            continue
        table = Table(title=title)
        names = list(report[key][0]["load_error"])
        for column in ("layer", "distance", "recall router", "recall", "form", *(f"load error {n}" for n in names)):
            table.add_column(column, justify="right")
        for row in report[key]:
            cells = [str(row["layer"]), str(row["distance"]), f"{row['recall_router']:.3f}", f"{row['recall']:.3f}"]
            table.add_row(*cells, row["form"], *(f"{row['load_error'][name]:.3f}" for name in names))
        console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="backend.elastic.train_predictor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or dummy:SHAPE to try the command")
    parser.add_argument("--recording", type=Path, help="use this file if it exists, else record and write it")
    parser.add_argument("--data", type=Path, help="folder of backend.demo.prepare: record its held-out texts too")
    parser.add_argument("--passages", type=int, default=60, help="passages of each text (default 60)")
    parser.add_argument("--passage-tokens", type=int, default=256, help="tokens of a passage (default 256)")
    parser.add_argument("--distances", default="1,2", help="layers ahead, comma-separated (default 1,2)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens generated per prompt (default 32)")
    parser.add_argument("--repeats", type=int, default=4, help="sets of demo questions (default 4)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of fine-tuning (default {STEPS})")
    parser.add_argument("--output", type=Path, help=f"predictor file (default: {FILE_NAME} in the checkpoint folder)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the report")
    args = parser.parse_args(argv)
    if not all(part.isdigit() and int(part) >= 1 for part in args.distances.split(",")):
        parser.error(f"--distances must be whole numbers of at least 1, got {args.distances!r}")
    if min(args.new_tokens, args.repeats, args.passages, args.passage_tokens, args.steps) < 1:
        parser.error("--new-tokens, --repeats, --passages, --passage-tokens and --steps must be at least 1")
    dummy = args.checkpoint.startswith(PREFIX)
    if dummy and args.output is None:
        parser.error("--output is needed for a dummy checkpoint")
    output = args.output or Path(args.checkpoint) / FILE_NAME
    distances = sorted({int(part) for part in args.distances.split(",")})
    console = Console()
    try:
        with Progress(console=console, transient=True) as progress:
            if args.recording is not None and args.recording.exists():
                recording = Recording.read(args.recording)
            else:
                traffic = (
                    mixed(args.data, args.passages, args.passage_tokens, args.repeats, args.seed)
                    if args.data is not None
                    else demo_questions(args.repeats, args.seed)
                )
                recording = record_traffic(args.checkpoint, traffic, args.new_tokens, args.seed, progress)
                if args.recording is not None:
                    recording.write(args.recording)
            predictor, report = run(recording, distances, args.seed, progress, args.steps)
    except ConfigError as error:
        console.print(f"[red]No predictor was trained:[/red] {error}")
        return 1
    predictor.write(output)
    show(report, console)
    console.print(f"Wrote {output}.")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        console.print(f"Wrote {args.json}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
