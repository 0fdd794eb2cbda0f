"""Brownout inside the simulator: what united experts take over, and what that costs in quality."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backend.errors import ConfigError

#: Accuracy loss in percent by share of assignments that 8-way united experts serve (BrownoutServe, Qwen1.5-MoE-A2.7B).
PUBLISHED_LOSS = ((0.0, 0.0), (0.2, 1.59), (0.4, 2.66), (0.6, 4.82), (0.8, 10.71), (1.0, 15.77))


@dataclass(frozen=True)
class LossCurve:
    """Quality loss in percent as a function of the united share, linear between points."""

    shares: tuple[float, ...]
    losses: tuple[float, ...]
    source: str

    def __call__(self, share: float) -> float:
        return float(np.interp(share, self.shares, self.losses))


def published_loss() -> LossCurve:
    """The paper's figures for another model: a placeholder that is named as such in every result."""
    shares, losses = zip(*PUBLISHED_LOSS, strict=True)
    return LossCurve(shares, losses, "published, Qwen1.5-MoE-A2.7B, 8-way")


def profile_loss(path: Path) -> LossCurve:
    """From a calibrated brownout-profile.json whose levels say their united_share and loss_percent."""
    try:
        levels = json.loads(path.read_text(encoding="utf-8"))["levels"]
        points = sorted({(float(level["united_share"]), float(level["loss_percent"])) for level in levels})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"profile {path} has no levels with united_share and loss_percent: {error!r}") from None
    if not points:
        raise ConfigError(f"profile {path} has no levels")
    shares, losses = zip(*points, strict=True)
    return LossCurve(shares, losses, path.name)


def split(counts: Sequence[float], threshold: float, way: int) -> tuple[list[float], list[float]]:
    """Assignments [E] → those that stay on original experts [E] and those on united experts [ceil(E / way)].

    BrownoutServe, Algorithm 1: experts ranked by count are kept while those before them carry less than `threshold` of all
    assignments; of the others, two or more active members of a group of `way` neighbours share its united expert, a single
    one stays.
    """
    originals, united = list(counts), [0.0] * -(-len(counts) // way)
    total = sum(originals)
    before, replaced = 0.0, []
    for expert in sorted((e for e, n in enumerate(originals) if n), key=lambda e: (-originals[e], e)):
        if before >= threshold * total:
            replaced.append(expert)
        before += originals[expert]
    groups: dict[int, list[int]] = {}
    for expert in replaced:
        groups.setdefault(expert // way, []).append(expert)
    for group, members in groups.items():
        if len(members) >= 2:
            united[group] = sum(originals[e] for e in members)
            for expert in members:
                originals[expert] = 0.0
    return originals, united
