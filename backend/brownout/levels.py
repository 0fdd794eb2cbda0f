"""The levels of a calibrated profile (brownout-profile.json): named points from full quality downwards."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec

from backend.brownout.settings import Settings
from backend.errors import ConfigError

PROFILE_NAME = "brownout-profile.json"


class Level(msgspec.Struct, frozen=True):
    """One point; `relative_step_time` is 1 at full quality."""

    mechanism: str
    way: int
    threshold_prefill: float
    threshold_decode: float
    loss_percent: float
    relative_step_time: float

    def settings(self, base: Settings) -> Settings:
        """`base` with this level's values."""
        return replace(
            base,
            mechanism=self.mechanism,
            way=self.way,
            threshold_prefill=self.threshold_prefill,
            threshold_decode=self.threshold_decode,
        )


class _Profile(msgspec.Struct):
    levels: list[Level]


def read_levels(path: Path) -> tuple[Level, ...]:
    """The levels of a profile, best quality first. Raises ConfigError, naming the file and what is wrong with it."""
    try:
        levels = tuple(msgspec.json.decode(path.read_bytes(), type=_Profile).levels)
        for level in levels:
            level.settings(Settings())
    except OSError as error:
        raise ConfigError(f"the brownout profile {path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # not JSON, a missing or wrong field, a value out of range
        raise ConfigError(f"{path} is not a brownout profile: {error}") from None
    if not levels or any(b.loss_percent < a.loss_percent for a, b in pairwise(levels)):
        raise ConfigError(f"{path} is not a brownout profile: it needs levels of non-decreasing loss_percent")
    return levels


def deepest_within(levels: tuple[Level, ...], max_loss_percent: float) -> Level | None:
    """The fastest level that loses no more than that; None if even the first loses more."""
    allowed = [level for level in levels if level.loss_percent <= max_loss_percent]
    return min(allowed, key=lambda level: level.relative_step_time, default=None)
