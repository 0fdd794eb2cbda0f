"""United experts of a model, layer by layer, with finished layers kept so that an interrupted build goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch
from torch import Tensor

from backend.brownout.activations import LayerActivations, activation_bytes, layer_activations
from backend.brownout.distill import DistillOptions, united_layer
from backend.brownout.grouping import SHARED_TOKENS, coactivation, group_by_affinity, group_by_index, output_similarity
from backend.brownout.united_file import UnitedExperts, UnitedLayer, read_united, write_united
from backend.errors import ConfigError
from backend.models.config import ModelConfig
from backend.models.model import MoeModel

#: One window in this many is held out.
HELD_OUT_MODULUS = 10
#: Calibration text must route at least this many tokens to the average expert.
TOKENS_PER_EXPERT = 32


@dataclass(frozen=True)
class BuildOptions:
    """What to build: `grouping` is one of `backend.brownout.grouping.GROUPINGS`."""

    ways: tuple[int, ...] = (2, 4, 8)
    grouping: str = "output"
    seed: int = 0
    distill: DistillOptions = field(default_factory=DistillOptions)


@dataclass
class Built:
    """United experts by way, and by layer the similarity [E, E] of the experts' outputs."""

    united: dict[int, UnitedExperts]
    similarity: dict[int, Tensor]


def build_united(
    model: MoeModel,
    fingerprint: str,
    windows: Sequence[Sequence[int]],
    options: BuildOptions,
    work: Path,
    advance: Callable[[int], None] = lambda steps: None,
) -> Built:
    """Build united experts of every way from calibration `windows` (token ids).

    Every finished (layer, way) is kept in a folder of `work` named after everything that the result depends on, and found
    there by the same call later. `advance` is told of the steps done, of steps × ways × layers.
    """
    folder = work / _digest(fingerprint, windows, options)
    held_out = torch.cat([torch.full((len(w),), is_held_out(i)) for i, w in enumerate(windows)]).to(model.device)
    built = Built({}, {})
    layers: dict[int, dict[int, UnitedLayer]] = {way: {} for way in options.ways}
    reports: dict[int, dict[str, dict[str, float]]] = {way: {} for way in options.ways}
    for acts in layer_activations(model, windows):
        moe = model.layers[acts.layer].moe
        assert moe is not None
        w13, w2 = (w[: model.config.num_experts] for w in (moe.experts.w13, moe.experts.w2))
        rows = (~held_out).nonzero().squeeze(1)
        shared = rows[torch.linspace(0, len(rows) - 1, min(SHARED_TOKENS, len(rows))).long().to(rows.device)]
        similarity = output_similarity(acts.inputs[shared], w13, w2)
        built.similarity[acts.layer] = similarity.cpu()
        for way in options.ways:
            path = folder / f"layer-{acts.layer}-way-{way}.safetensors"
            if path.is_file():
                kept = read_united(path, fingerprint)
                layer, report = kept.layers[acts.layer], kept.report[str(acts.layer)]
                advance(options.distill.steps)
            else:
                groups = _groups(options.grouping, way, acts, similarity, model.config.num_experts)
                seed = options.seed * 1_000_003 + acts.layer * 101 + way
                layer, report = united_layer(acts, held_out, w13, w2, groups, options.distill, seed, advance)
                one = UnitedExperts(way, fingerprint, options.grouping, {acts.layer: layer}, {str(acts.layer): report})
                write_united(path, one)
            layers[way][acts.layer] = layer
            reports[way][str(acts.layer)] = report
    for way in options.ways:
        built.united[way] = UnitedExperts(way, fingerprint, options.grouping, layers[way], reports[way])
    return built


def is_held_out(window: int) -> bool:
    """Whether the window of this number is measured on and not trained on."""
    return window % HELD_OUT_MODULUS == HELD_OUT_MODULUS - 1


def check_input(config: ModelConfig, windows: Sequence[Sequence[int]], options: BuildOptions) -> None:
    """Raise ConfigError for ways that do not fit the model, or too little calibration text."""
    for way in options.ways:
        if not 2 <= way <= config.num_experts:
            raise ConfigError(f"--way must be from 2 to the number of experts ({config.num_experts}), got {way}")
    needed = -(-TOKENS_PER_EXPERT * config.num_experts // config.top_k)
    found = sum(map(len, windows))
    if found < needed or len(windows) < HELD_OUT_MODULUS:
        raise ConfigError(
            f"the calibration text has {found} tokens in {len(windows)} windows, but a model with {config.num_experts} "
            f"experts needs at least {needed} tokens in {HELD_OUT_MODULUS} windows: give more text or a smaller --window"
        )


def needed_bytes(model: MoeModel, tokens: int, options: BuildOptions) -> int:
    """Memory that `build_united` takes at most beside the model, in bytes."""
    config = model.config
    expert = 3 * config.expert_size * config.hidden_size * 4
    groups = -(-config.num_experts // min(options.ways))
    # Training: start, best, weights, gradients, two moments, and a copy to measure; the layer's experts in float32.
    experts = expert * (config.num_experts + 7 * groups)
    targets = tokens * config.top_k * (4 * config.hidden_size + 24)
    batch = groups * options.distill.rows * 4 * (4 * config.hidden_size + 6 * config.expert_size)
    shared = 2 * 4 * config.num_experts * min(tokens, SHARED_TOKENS) * config.hidden_size
    kept = sum(
        -(-config.num_experts // way) * expert // 4 * model.dtype.itemsize * sum(config.moe_layers)
        for way in options.ways
    )
    activations = activation_bytes(config, tokens, model.activation_dtype.itemsize)
    return activations + experts + max(targets + batch, shared) + kept


def check_memory(model: MoeModel, needed: int) -> None:
    """Raise ConfigError if the model's device has less free memory than `needed` bytes."""
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
    else:
        free = psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"building needs {needed / 2**30:.1f} GiB beside the model, {free / 2**30:.1f} GiB are free on {model.device}: "
            "lower --tokens or --rows"
        )


def _groups(grouping: str, way: int, acts: LayerActivations, similarity: Tensor, num_experts: int) -> Tensor:
    if grouping == "index":
        return group_by_index(num_experts, way)
    if grouping == "output":
        return group_by_affinity(similarity, way)
    return group_by_affinity(coactivation(acts.experts, num_experts), way)


def _digest(fingerprint: str, windows: Sequence[Sequence[int]], options: BuildOptions) -> str:
    """Name of the work folder; the ways are in the files' names, so that more ways can be added later."""
    known = asdict(options) | {"ways": None, "fingerprint": fingerprint}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for window in windows:
        digest.update(torch.tensor(window).numpy().tobytes() + b"|")
    return digest.hexdigest()[:16]
