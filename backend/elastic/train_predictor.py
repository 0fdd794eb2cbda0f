"""Record activations of a checkpoint, train its load predictor, and report how well it predicts.

python -m backend.elastic.train_predictor --checkpoint DIR [--distances 1,2,4] [--json FILE]

Writes load-predictor.safetensors beside the checkpoint (--output for another place). A layer and distance whose plain router
finds fewer than 80 % of the experts on held-out sequences is fine-tuned. Recall and load error are reported per layer and
distance on held-out sequences, by domain, and across a domain shift: trained on half of the domains, measured on the rest,
beside baselines that know past loads only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from backend.elastic.predictor import FILE_NAME, Ewma, LastWindow, LoadPredictor, load_error, recall
from backend.elastic.recording import Recording, record_demo
from backend.errors import ConfigError
from backend.models.dummy import PREFIX

#: Below this held-out recall a layer is fine-tuned (MoEless).
ENOUGH = 0.8
_EPOCHS, _PATIENCE, _BATCH = 60, 5, 256
#: Tokens of a simulated step over which load error is taken.
_STEP_TOKENS = 64


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
    weight: Tensor, bias: Tensor, inputs: Tensor, experts: Tensor, held_out: tuple[Tensor, Tensor], seed: int
) -> tuple[Tensor, Tensor, float]:
    """Train a copy of weight [E, M] and bias [E] to give the experts [T, K] the highest logits for inputs [T, M].

    The loss is the cross-entropy against equal shares of the true experts; the best epoch by recall on `held_out`
    (inputs, experts) wins, and early stopping ends a search that does not improve. Returns (weight, bias, recall).
    """
    top_k = experts.shape[1]
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=5e-2 * float(weight.detach().std().clamp(min=1e-3)))
    generator = torch.Generator().manual_seed(seed)
    inputs, test_inputs = inputs.float(), held_out[0].float()
    best = (-1.0, weight.detach().clone(), bias.detach().clone())
    since = 0
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(inputs), generator=generator).split(_BATCH):
            logits = F.log_softmax(F.linear(inputs[rows], weight, bias), dim=-1)
            loss = -logits.gather(1, experts[rows].long()).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            found = recall(F.linear(test_inputs, weight, bias).topk(top_k).indices, held_out[1])
        since = 0 if found > best[0] else since + 1
        if found > best[0]:
            best = (found, weight.detach().clone(), bias.detach().clone())
        if since >= _PATIENCE:
            break
    return best[1], best[2], best[0]


def train(
    recording: Recording, distances: Sequence[int], sequences: Sequence[int], seed: int, progress: Progress
) -> LoadPredictor:
    """A predictor from the given sequences; a fifth of them decides when to stop and whether tuning was worth it."""
    predictor = LoadPredictor.of_recording(recording, *distances)
    weights, biases, tuned = dict(predictor.weights), dict(predictor.biases), set()
    validation = list(sequences[::5])
    rows = recording.rows_of([s for s in sequences if s not in set(validation)])
    check = recording.rows_of(validation)
    if not len(rows) or not weights:
        raise ConfigError(
            f"nothing to train: {len(sequences)} sequences, {recording.num_layers} layers, distances {list(distances)}"
        )
    task = progress.add_task("training predictors", total=len(weights))
    for layer, distance in weights:
        inputs, experts = recording.hidden[layer - distance], recording.experts[layer]
        plain = recall(predictor.choose(inputs[check], layer, distance), experts[check])
        if plain < ENOUGH:
            held_out = (inputs[check], experts[check])
            weight, bias, found = fine_tune(
                weights[layer, distance], biases[layer, distance], inputs[rows], experts[rows], held_out, seed
            )
            if found > plain:
                weights[layer, distance], biases[layer, distance] = weight, bias
                tuned.add((layer, distance))
        progress.advance(task)
    progress.remove_task(task)
    return replace(predictor, weights=weights, biases=biases, tuned=frozenset(tuned))


def measure(
    recording: Recording, predictor: LoadPredictor, sequences: Sequence[int], warm_up: Sequence[int] = ()
) -> list[dict[str, object]]:
    """Recall and load errors per layer and distance over steps of 64 tokens; baselines have seen `warm_up` before."""
    plain = LoadPredictor.of_recording(recording, *{distance for _, distance in predictor.weights})
    rows, before = recording.rows_of(sequences), recording.rows_of(warm_up)
    result = []
    for layer, distance in sorted(predictor.weights):
        experts = recording.experts[layer].long()
        inputs = recording.hidden[layer - distance]
        baselines = {"last_window": LastWindow(recording.num_experts), "ewma": Ewma(recording.num_experts)}
        errors: dict[str, list[float]] = {"predictor": [], "router": [], **{name: [] for name in baselines}}
        for step in before.split(_STEP_TOKENS):
            for baseline in baselines.values():
                baseline.observe(_count(experts[step], recording.num_experts))
        for step in rows.split(_STEP_TOKENS):
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
                "tuned": (layer, distance) in predictor.tuned,
                "recall": recall(predictor.choose(inputs[rows], layer, distance), experts[rows]),
                "recall_router": recall(plain.choose(inputs[rows], layer, distance), experts[rows]),
                "load_error": {name: sum(values) / len(values) for name, values in errors.items()},
            }
        )
    return result


def run(recording: Recording, distances: Sequence[int], seed: int, progress: Progress) -> tuple[LoadPredictor, dict]:
    """(predictor trained on all domains, report as JSON values)."""
    training, testing = split_sequences(recording, seed)
    predictor = train(recording, distances, training, seed, progress)
    domains = recording.domains.tolist()
    report: dict[str, object] = {
        "fingerprint": recording.fingerprint,
        "tokens": recording.hidden.shape[1],
        "sequences": {"training": len(training), "held_out": len(testing)},
        "held_out": measure(recording, predictor, testing, training),
    }
    report["by_domain"] = {
        name: measure(recording, predictor, members)
        for index, name in enumerate(recording.domain_names)
        if (members := [s for s in testing if domains[s] == index])
    }
    known = [s for s in training + testing if domains[s] % 2 == 0]
    shifted = [s for s in training + testing if domains[s] % 2 == 1]
    if shifted:
        # Baselines come from the domains before the shift, and adapt as they go.
        abroad = train(recording, distances, known, seed, progress)
        report["domain_shift"] = measure(recording, abroad, shifted, known)
    return predictor, report


def _count(experts: Tensor, num_experts: int) -> Tensor:
    return torch.bincount(experts.flatten(), minlength=num_experts)


def show(report: dict, console: Console) -> None:
    """Tables for people."""
    for key, title in (("held_out", "Held-out sequences"), ("domain_shift", "After a domain shift")):
        if key not in report:
            continue
        table = Table(title=title)
        names = list(report[key][0]["load_error"])
        for column in ("layer", "distance", "recall router", "recall", "tuned", *(f"load error {n}" for n in names)):
            table.add_column(column, justify="right")
        for row in report[key]:
            cells = [str(row["layer"]), str(row["distance"]), f"{row['recall_router']:.3f}", f"{row['recall']:.3f}"]
            cells.append("yes" if row["tuned"] else "")
            table.add_row(*cells, *(f"{row['load_error'][name]:.3f}" for name in names))
        console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="backend.elastic.train_predictor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or dummy:SHAPE to try the command")
    parser.add_argument("--recording", type=Path, help="use this file if it exists, else record and write it")
    parser.add_argument("--distances", default="1,2", help="layers ahead, comma-separated (default 1,2)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens generated per prompt (default 32)")
    parser.add_argument("--repeats", type=int, default=4, help="sets of demo questions (default 4)")
    parser.add_argument("--output", type=Path, help=f"predictor file (default: {FILE_NAME} in the checkpoint folder)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the report")
    args = parser.parse_args(argv)
    if not all(part.isdigit() and int(part) >= 1 for part in args.distances.split(",")):
        parser.error(f"--distances must be whole numbers of at least 1, got {args.distances!r}")
    if args.new_tokens < 1 or args.repeats < 1:
        parser.error("--new-tokens and --repeats must be at least 1")
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
                recording = record_demo(args.checkpoint, progress, args.new_tokens, args.repeats, args.seed)
                if args.recording is not None:
                    recording.write(args.recording)
            predictor, report = run(recording, distances, args.seed, progress)
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
