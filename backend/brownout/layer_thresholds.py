"""A threshold of its own for each layer, so that one number still says how far a model is dimmed.

Layers differ in what their dimming costs. A table says which thresholds the layers have when the settings' threshold is theta;
it is made so that as many slots are active in all as with theta in every layer. Plain Python: no tensor library here.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerThresholds:
    """Rows of thresholds, one number for each MoE layer, at ascending `thetas` from 0 to 1; between two rows they are interpolated.

    A layer's threshold never falls from one row to the next, so a higher theta keeps more in every layer, and is 1 at theta = 1
    (full quality). Raises ValueError for a table that is not like that.
    """

    thetas: tuple[float, ...]
    by_layer: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if len(self.thetas) < 2 or (self.thetas[0], self.thetas[-1]) != (0.0, 1.0):
            raise ValueError("thetas must begin with 0 and end with 1")
        if any(not one < other for one, other in itertools.pairwise(self.thetas)):
            raise ValueError("thetas must ascend")
        if len(self.by_layer) != len(self.thetas) or len({len(row) for row in self.by_layer}) != 1:
            raise ValueError("by_layer must have a row for each of thetas and as many thresholds in each row")
        if any(not 0.0 <= value <= 1.0 for row in self.by_layer for value in row):
            raise ValueError("thresholds by layer must be between 0 and 1")
        if any(one > other for rows in itertools.pairwise(self.by_layer) for one, other in zip(*rows, strict=True)):
            raise ValueError("no layer's threshold may fall from one row to the next")
        if any(value != 1.0 for value in self.by_layer[-1]):
            raise ValueError("all thresholds must be 1 at theta = 1")

    @property
    def num_layers(self) -> int:
        return len(self.by_layer[0])

    def at(self, theta: float) -> tuple[float, ...]:
        """The layers' thresholds where the settings say `theta`."""
        above = min(max(1, bisect_right(self.thetas, theta)), len(self.thetas) - 1)
        low, high = self.thetas[above - 1], self.thetas[above]
        part = (theta - low) / (high - low)
        # The form that is exact at both ends: theta = 1 must give 1.
        return tuple(a * (1 - part) + b * part for a, b in zip(*self.by_layer[above - 1 : above + 1], strict=True))

    def to_json(self) -> dict[str, Any]:
        return {"thetas": list(self.thetas), "by_layer": [list(row) for row in self.by_layer]}

    @classmethod
    def from_json(cls, raw: object) -> LayerThresholds:
        """Raises ValueError naming what is wrong."""
        if not isinstance(raw, dict) or set(raw) != {"thetas", "by_layer"}:
            raise ValueError("must be an object with thetas and by_layer")
        thetas, rows = raw["thetas"], raw["by_layer"]
        if not isinstance(rows, list) or not all(map(_are_numbers, [thetas, *rows])):
            raise ValueError("thetas must be a list of numbers and by_layer a list of such lists")
        return cls(tuple(map(float, thetas)), tuple(tuple(map(float, row)) for row in rows))


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )
