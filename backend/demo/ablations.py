"""Changed copies of a checkpoint: fewer experts, none, or united pairs; each is evaluated like the original."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backend.demo.routing import Routing, similar_pairs

Weights = dict[str, Tensor]
Pairs = list[list[tuple[int, int]]]
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def drop_experts(weights: Weights, experts_by_layer: list[list[int]]) -> None:
    """Let experts contribute nothing; they are still routed to."""
    for layer, experts in enumerate(experts_by_layer):
        for expert in experts:
            weights[_name(layer, expert, "down_proj")].zero_()


def average_pairs(weights: Weights, pairs: Pairs) -> None:
    """Give both experts of a pair the plain mean of their weights: 60 experts become 30, served twice."""
    for layer, layer_pairs in enumerate(pairs):
        for a, b in layer_pairs:
            for projection in _PROJECTIONS:
                first, second = weights[_name(layer, a, projection)], weights[_name(layer, b, projection)]
                united = (first.float() + second.float()) / 2
                first.copy_(united)
                second.copy_(united)


def _name(layer: int, expert: int, projection: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"


@contextmanager
def changed(
    checkpoint: Path, change: Callable[[Weights], None] | None = None, top_k: int | None = None
) -> Iterator[Path]:
    """A temporary copy of a checkpoint folder with changed weights or another number of experts per token."""
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "checkpoint"
        shutil.copytree(checkpoint, copy)
        if change is not None:
            weights = load_file(copy / "model.safetensors")
            change(weights)
            save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        if top_k is not None:
            config = json.loads((copy / "config.json").read_text("utf-8"))
            config["num_experts_per_tok"] = top_k
            (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield copy


#: name -> what to do to the checkpoint: (change of the weights, experts per token)
Ablation = tuple[Callable[[Weights], None] | None, int | None]


def ablations(routing: Routing) -> dict[str, Ablation]:
    """Every ablation by name. Pairs are the most similar ones by output; of a dropped pair the less used expert goes."""
    pairs: Pairs = [similar_pairs(similarity) for similarity in routing.similarities()]
    use = torch.stack([routing.shares(domain) for domain in routing.inputs]).mean(dim=0)
    rarer = [
        [a if use[layer, a] < use[layer, b] else b for a, b in layer_pairs] for layer, layer_pairs in enumerate(pairs)
    ]
    every = [list(range(routing.experts)) for _ in pairs]
    half = [layer_pairs[: len(layer_pairs) // 2] for layer_pairs in pairs]
    half_dropped = [[expert for pair in layer for expert in pair] for layer in half]
    return {
        "top-2": (None, 2),
        "top-1": (None, 1),
        "no routed experts": (lambda weights: drop_experts(weights, every), None),
        "all pairs averaged (60 to 30)": (lambda weights: average_pairs(weights, pairs), None),
        "one of each pair dropped": (lambda weights: drop_experts(weights, rarer), None),
        "15 most similar pairs averaged": (lambda weights: average_pairs(weights, half), None),
        "15 most similar pairs dropped": (lambda weights: drop_experts(weights, half_dropped), None),
    }
